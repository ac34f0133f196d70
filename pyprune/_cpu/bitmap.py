"""The `bitmap` family on csrc/bitmap_cpu.h."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune._cpu.common import DTYPE_CODES, Kernels
from pyprune.reference.bitmap import ALIGNMENT, TILE


class Bitmap(Kernels):
    """The family's ops."""

    def bitmap_pack(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = weight.shape
        tiles = -(-rows // TILE) * -(-columns // TILE)
        bitmap = weight.new_empty(tiles, TILE, TILE // 8, dtype=torch.uint8)
        sizes = weight.new_empty(tiles + 1, dtype=torch.int64)
        matrix = (DTYPE_CODES[weight.dtype], rows, columns, weight.data_ptr(), bitmap.data_ptr())
        self.kernels.bitmap_scan(*matrix, sizes.data_ptr(), torch.get_num_threads())
        offsets = sizes.cumsum(0)
        values = weight.new_empty(int(offsets[-1]))
        self.kernels.bitmap_pack(*matrix, offsets.data_ptr(), values.data_ptr(), torch.get_num_threads())
        return values, bitmap, offsets

    def bitmap_unpack(
        self, values: Tensor, bitmap: Tensor, offsets: Tensor, out_features: int, in_features: int
    ) -> Tensor:
        self._check_offsets("bitmap_unpack", values, offsets)
        weight = values.new_empty(out_features, in_features)
        self._unpack_rows(values, bitmap, offsets, 0, weight)
        return weight

    def _check_offsets(self, op: str, values: Tensor, offsets: Tensor) -> None:
        """Raises ValueError when a tile lies elsewhere than in values, or values ends elsewhere than the last tile.

        Bits that do not fit are found by `ops.check_bitmap`; the kernels read nothing outside values whatever they say.
        """
        tile = self.kernels.bitmap_misplaced(len(offsets) - 1, len(values), offsets.data_ptr())
        if tile >= 0:
            raise ValueError(
                f"{op}: offsets has tile {tile} from {int(offsets[tile])} to {int(offsets[tile + 1])}, expected "
                f"multiples of {ALIGNMENT}, at most {TILE * TILE} apart, inside the {len(values)} elements of values"
            )
        if int(offsets[-1]) != len(values):
            raise ValueError(
                f"{op}: values has {len(values)} elements, offsets ends at {int(offsets[-1])}; pass those of one weight"
            )

    def _unpack_rows(self, values: Tensor, bitmap: Tensor, offsets: Tensor, first_tile_row: int, rows: Tensor) -> None:
        """Fills `rows` [rows, in] with those of the weight that start with a row of tiles."""
        self.kernels.bitmap_unpack(
            DTYPE_CODES[values.dtype],
            first_tile_row,
            *rows.shape,
            values.data_ptr(),
            bitmap.data_ptr(),
            offsets.data_ptr(),
            len(values),
            rows.data_ptr(),
            torch.get_num_threads(),
        )
