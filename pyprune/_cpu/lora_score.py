"""The `lora_score` family on the kernels of csrc/lora_score_cpu.h."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyprune._cpu.common import DTYPE_CODES, Kernels

BLOCKS = 64
"""Ranges of rows with sums of their own: enough for 64 threads, and independent of their number."""


class LoraScore(Kernels):
    """The family's ops."""

    def lora_group_score(
        self, weight: Tensor, a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, scale: float, dim: int
    ) -> Tensor:
        outputs, inputs = weight.shape
        blocks = max(1, min(BLOCKS, outputs))
        factors = self._strips(a - grad_a, grad_a, scale * a)
        pairs = torch.stack((b, grad_b), -1)
        out = a.new_empty(outputs) if dim == 0 else a.new_empty(blocks, inputs)
        self.kernels.lora_group_score(
            DTYPE_CODES[weight.dtype],
            outputs,
            inputs,
            a.shape[0],
            dim,
            *(tensor.data_ptr() for tensor in (weight, factors, pairs)),
            blocks,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out if dim == 0 else out.sum(0)

    def _strips(self, *factors: Tensor) -> Tensor:
        """Matrices [r, in] as [strips, r, matrices, columns], filled up with zeros."""
        width = self.kernels.LORA_SCORE_STRIP
        stacked = pad(torch.stack(factors, 1), (0, -factors[0].shape[1] % width))
        return stacked.unflatten(2, (-1, width)).permute(2, 0, 1, 3).contiguous()
