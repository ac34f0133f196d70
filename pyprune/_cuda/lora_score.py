"""The `lora_score` family on the launchers of csrc/lora_score.h."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune._cpu.common import DTYPE_CODES
from pyprune._cuda.common import Launchers


class LoraScore(Launchers):
    """The family's ops."""

    def lora_group_score(
        self, weight: Tensor, a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, scale: float, dim: int
    ) -> Tensor:
        sizes = (*weight.shape, a.shape[0])
        if 0 in sizes:
            return a.new_zeros(weight.shape[dim])
        rows, scratch = self.kernels.lora_group_score_sizes(*sizes, dim)
        partials = a.new_empty(rows, weight.shape[dim])
        workspace = a.new_empty(scratch, dtype=torch.uint8)
        with torch.cuda.device_of(weight):
            self.kernels.lora_group_score(
                DTYPE_CODES[weight.dtype],
                *sizes,
                scale,
                dim,
                *(tensor.data_ptr() for tensor in (weight, a, b, grad_a, grad_b, partials, workspace)),
                self.stream(weight.device),
            )
        return partials.sum(0)
