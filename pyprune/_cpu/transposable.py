"""The `transposable` family on the kernel of csrc/transposable_cpu.h."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune._cpu.common import DTYPE_CODES, Kernels
from pyprune.reference.bits import count_flips


class Transposable(Kernels):
    """The family's op."""

    def transposable_prune(self, scores: Tensor, previous_bits: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = scores.shape
        bits = scores.new_empty(rows, -(-columns // 8), dtype=torch.uint8)
        self.kernels.transposable_prune(
            DTYPE_CODES[scores.dtype], rows, columns, scores.data_ptr(), bits.data_ptr(), torch.get_num_threads()
        )
        return bits, count_flips(bits, bits if previous_bits is None else previous_bits), scores.isnan().sum()
