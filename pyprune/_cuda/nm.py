"""The `nm` family on the CUDA launchers of csrc/nm.h."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune._cpu.common import DTYPE_CODES, address
from pyprune._cuda.common import Launchers
from pyprune.reference.nm import index_bits


class Nm(Launchers):
    """The family's ops."""

    def nm_prune(self, scores: Tensor, n: int, m: int, previous_bits: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = scores.shape
        bits = scores.new_empty(rows, -(-columns // 8), dtype=torch.uint8)
        flips = scores.new_zeros((), dtype=torch.int64)
        first = scores.new_full((), -1, dtype=torch.int64)
        self._launch_nm("nm_prune", (rows, columns, n, m), scores, previous_bits, bits, flips, first)
        return bits, flips, first

    def nm_compress(self, weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = weight.shape
        kept = columns // m * n
        values = weight.new_empty(rows, kept)
        metadata = weight.new_empty(rows, -(-kept * index_bits(m) // 8), dtype=torch.uint8)
        first = weight.new_full((), -1, dtype=torch.int64)
        self._launch_nm("nm_compress", (rows, columns, n, m), weight, values, metadata, first)
        return values, metadata, first

    def nm_decompress(self, values: Tensor, metadata: Tensor, n: int, m: int) -> Tensor:
        rows, columns = len(values), values.shape[1] // n * m
        weight = values.new_empty(rows, columns)
        self._launch_nm("nm_decompress", (rows, columns, n, m), values, metadata, weight)
        return weight

    def _launch_nm(
        self, function: str, shape: tuple[int, int, int, int], first: Tensor, *tensors: Tensor | None
    ) -> None:
        with torch.cuda.device_of(first):
            addresses = [address(tensor) for tensor in (first, *tensors)]
            getattr(self.kernels, function)(shape, DTYPE_CODES[first.dtype], *addresses, self.stream(first.device))
