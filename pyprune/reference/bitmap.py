"""The `bitmap` family in plain torch: weights of any sparsity as bits and packed values, in tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune.reference.bits import is_nonzero, pack_bits, unpack_bits

TILE = 64
"""Rows and columns of a tile."""
ALIGNMENT = 8
"""Every tile's values start at a multiple of so many elements."""


def tile_counts(bitmap: Tensor) -> Tensor:
    """Ones of every tile; int64 [tiles]."""
    ones = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8, device=bitmap.device)
    return ones[bitmap.flatten(1).int()].sum(1, dtype=torch.int64)


def padded_counts(counts: Tensor) -> Tensor:
    """Counts rounded up to the alignment."""
    return (counts + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def tile_offsets(bitmap: Tensor) -> Tensor:
    """Where every tile's values start, and where the last one's end; int64 [tiles + 1], in elements."""
    return torch.nn.functional.pad(padded_counts(tile_counts(bitmap)).cumsum(0), (1, 0))


def to_tiles(weight: Tensor) -> Tensor:
    """[out, in] -> [tiles, 64, 64], tiles row by row, filled up with zeros."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % TILE, 0, -rows % TILE))
    return padded.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).transpose(1, 2).flatten(0, 1)


def from_tiles(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """[tiles, 64, 64] -> [out, in]; the inverse of `to_tiles`."""
    grid = (-(-rows // TILE), -(-columns // TILE))
    return tiles.unflatten(0, grid).transpose(1, 2).flatten(2).flatten(0, 1)[:rows, :columns].contiguous()


def _positions(kept: Tensor, offsets: Tensor) -> Tensor:
    """For every kept element of [tiles, 64, 64], in order, its place in the values."""
    inside = kept.flatten(1).cumsum(1) - 1
    return (offsets[:-1, None] + inside)[kept.flatten(1)]


def bitmap_pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values [total], bitmap [tiles, 64, 8], offsets [tiles + 1]."""
    if weight.numel() == 0:
        empty = weight.new_empty(0)
        return empty, empty.new_empty((0, TILE, 8), dtype=torch.uint8), empty.new_zeros(1, dtype=torch.int64)
    tiles = to_tiles(weight)
    kept = is_nonzero(tiles)
    bitmap = pack_bits(kept)
    offsets = tile_offsets(bitmap)
    values = weight.new_zeros(int(offsets[-1]))
    values[_positions(kept, offsets)] = tiles[kept]
    return values, bitmap, offsets


def bitmap_unpack(values: Tensor, bitmap: Tensor, offsets: Tensor, out_features: int, in_features: int) -> Tensor:
    """The dense weight [out, in], +0 where no bit is set."""
    if len(bitmap) == 0:
        return values.new_zeros(out_features, in_features)
    kept = unpack_bits(bitmap, TILE)
    tiles = values.new_zeros(kept.shape)
    tiles[kept] = values[_positions(kept, offsets)]
    return from_tiles(tiles, out_features, in_features)
