"""The `rank` family on the CUDA launchers of csrc/rank.h."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune._cpu.common import DTYPE_CODES
from pyprune._cuda.common import Launchers


class Rank(Launchers):
    """The family's ops."""

    def rank_mask(self, weight: Tensor, rank: Tensor, threshold: Tensor) -> Tensor:
        out = torch.empty_like(weight)
        tensors = (weight, rank, threshold, out)
        with torch.cuda.device_of(weight):
            addresses = [tensor.data_ptr() for tensor in tensors]
            stream = self.stream(weight.device)
            self.kernels.rank_mask(DTYPE_CODES[weight.dtype], *weight.shape, *addresses, stream)
        return out

    def rank_bucket_grad(self, grad: Tensor, weight: Tensor, rank: Tensor, steps: int) -> Tensor:
        out = weight.new_empty(len(weight), steps + 1, dtype=torch.float32)
        tensors = (grad, weight, rank, out)
        with torch.cuda.device_of(weight):
            addresses = [tensor.data_ptr() for tensor in tensors]
            stream = self.stream(weight.device)
            self.kernels.rank_bucket_grad(DTYPE_CODES[weight.dtype], *weight.shape, steps, *addresses, stream)
        return out
