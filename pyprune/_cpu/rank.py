"""The `rank` family on the kernels of csrc/rank_cpu.h."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune._cpu.common import DTYPE_CODES, Kernels


class Rank(Kernels):
    """The family's ops."""

    def rank_mask(self, weight: Tensor, rank: Tensor, threshold: Tensor) -> Tensor:
        out = torch.empty_like(weight)
        self.kernels.rank_mask(
            DTYPE_CODES[weight.dtype],
            *weight.shape,
            weight.data_ptr(),
            rank.data_ptr(),
            threshold.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def rank_bucket_grad(self, grad: Tensor, weight: Tensor, rank: Tensor, steps: int) -> Tensor:
        out = weight.new_empty(len(weight), steps + 1, dtype=torch.float32)
        self.kernels.rank_bucket_grad(
            DTYPE_CODES[weight.dtype],
            *weight.shape,
            steps,
            grad.data_ptr(),
            weight.data_ptr(),
            rank.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out
