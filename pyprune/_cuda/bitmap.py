"""The `bitmap` family on the CUDA launchers of csrc/bitmap.h."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune._cpu.common import DTYPE_CODES
from pyprune._cuda.common import Launchers
from pyprune.reference.bitmap import TILE


def sixteen_bytes(tensor: Tensor) -> Tensor:
    """The tensor at an address that is a multiple of 16, a copy if need be: views may begin anywhere."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


class Bitmap(Launchers):
    """The family's ops."""

    def bitmap_pack(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = weight.shape
        tiles = -(-rows // TILE) * -(-columns // TILE)
        bitmap = weight.new_empty(tiles, TILE, TILE // 8, dtype=torch.uint8)
        sizes = weight.new_zeros(tiles + 1, dtype=torch.int64)
        self._launch_bitmap("bitmap_scan", rows, columns, weight, bitmap, sizes)
        offsets = sizes.cumsum(0)
        values = weight.new_empty(int(offsets[-1]))
        self._launch_bitmap("bitmap_pack", rows, columns, weight, bitmap, offsets, values)
        return values, bitmap, offsets

    def bitmap_unpack(
        self, values: Tensor, bitmap: Tensor, offsets: Tensor, out_features: int, in_features: int
    ) -> Tensor:
        weight = values.new_empty(out_features, in_features)
        arguments = (values, len(values), sixteen_bytes(bitmap), offsets, weight)
        self._launch_bitmap("bitmap_unpack", out_features, in_features, *arguments)
        return weight

    def _launch_bitmap(self, function: str, rows: int, columns: int, first: Tensor, *others: Tensor | int) -> None:
        with torch.cuda.device_of(first):
            addresses = [other if isinstance(other, int) else other.data_ptr() for other in (first, *others)]
            stream = self.stream(first.device)
            getattr(self.kernels, function)(rows, columns, DTYPE_CODES[first.dtype], *addresses, stream)
