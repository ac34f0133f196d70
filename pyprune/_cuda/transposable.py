"""The `transposable` family on the launcher of csrc/transposable.h."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune._cpu.common import DTYPE_CODES, address
from pyprune._cuda.common import Launchers


class Transposable(Launchers):
    """The family's op."""

    def transposable_prune(self, scores: Tensor, previous_bits: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = scores.shape
        bits = scores.new_empty(rows, -(-columns // 8), dtype=torch.uint8)
        flips, nans = scores.new_zeros(2, dtype=torch.int64)
        tensors = (scores, previous_bits, bits, flips, nans)
        with torch.cuda.device_of(scores):
            addresses = [address(tensor) for tensor in tensors]
            stream = self.stream(scores.device)
            self.kernels.transposable_prune(DTYPE_CODES[scores.dtype], rows, columns, *addresses, stream)
        return bits, flips, nans
