"""The `nm` family on csrc/nm_cpu.h."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune._cpu.common import DTYPE_CODES, Kernels, address
from pyprune.reference.nm import index_bits


class Nm(Kernels):
    """The family's ops."""

    def nm_prune(self, scores: Tensor, n: int, m: int, previous_bits: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = scores.shape
        bits = scores.new_empty(rows, -(-columns // 8), dtype=torch.uint8)
        flips = scores.new_empty((), dtype=torch.int64)
        offender = self.kernels.nm_prune(
            DTYPE_CODES[scores.dtype],
            rows,
            columns,
            n,
            m,
            scores.data_ptr(),
            address(previous_bits),
            bits.data_ptr(),
            flips.data_ptr(),
            torch.get_num_threads(),
        )
        return bits, flips, torch.tensor(offender)

    def nm_compress(self, weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = weight.shape
        kept = columns // m * n
        values = weight.new_empty(rows, kept)
        metadata = weight.new_empty(rows, -(-kept * index_bits(m) // 8), dtype=torch.uint8)
        offender = self.kernels.nm_compress(
            DTYPE_CODES[weight.dtype],
            rows,
            columns,
            n,
            m,
            weight.data_ptr(),
            values.data_ptr(),
            metadata.data_ptr(),
            torch.get_num_threads(),
        )
        return values, metadata, torch.tensor(offender)

    def nm_decompress(self, values: Tensor, metadata: Tensor, n: int, m: int) -> Tensor:
        rows, kept = values.shape
        weight = values.new_empty(rows, kept // n * m)
        self._decompress_rows(values, metadata, n, m, weight)
        return weight

    def _decompress_rows(self, values: Tensor, metadata: Tensor, n: int, m: int, rows: Tensor) -> None:
        """Fills `rows` [rows, in] with those that values and metadata stand for."""
        self.kernels.nm_decompress(
            DTYPE_CODES[values.dtype],
            *rows.shape,
            n,
            m,
            values.data_ptr(),
            metadata.data_ptr(),
            rows.data_ptr(),
            torch.get_num_threads(),
        )
