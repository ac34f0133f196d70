"""Weights of any sparsity, packed as a bit for every element and the values of those that are not zero.

The packed format is the canonical one, on disk and in memory, on every device: docs/architecture.md, "Packed weights".
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune._ops.dispatch import define, expect_float, expect_like, expect_shape, run
from pyprune.reference.bitmap import ALIGNMENT, TILE, padded_counts, tile_counts

# ---------------------------------------------------------------------------------------------------------------------
# Checks


def tiles_of(out_features: int, in_features: int) -> int:
    """Tiles of a weight."""
    return -(-out_features // TILE) * -(-in_features // TILE)


def _check_dense(weight: Tensor) -> None:
    expect_float("bitmap_pack", "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"bitmap_pack: weight has shape {list(weight.shape)}, expected two dimensions")


def check_packed(op: str, values: Tensor, bitmap: Tensor, offsets: Tensor, out_features: int, in_features: int) -> None:
    """Raises TypeError or ValueError unless dtypes, devices and shapes are those of a packed weight.

    Reads no element: whether bits and offsets agree is `check_bitmap`'s business.
    """
    if out_features < 0 or in_features < 0:
        raise ValueError(f"{op}: out_features is {out_features}, in_features {in_features}; expected none below 0")
    expect_float(op, "values", values)
    expect_like(op, values, torch.uint8, bitmap=bitmap)
    expect_like(op, values, torch.int64, offsets=offsets)
    tiles = tiles_of(out_features, in_features)
    if values.dim() != 1 or values.shape[0] % ALIGNMENT:
        raise ValueError(
            f"{op}: values has shape {list(values.shape)}, expected one dimension, a multiple of {ALIGNMENT} long"
        )
    expect_shape(op, "bitmap", bitmap, tiles, TILE, TILE // 8)
    expect_shape(op, "offsets", offsets, tiles + 1)


# ---------------------------------------------------------------------------------------------------------------------
# The ops and their fake kernels


def _bitmap_pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_dense(weight)
    return run("bitmap_pack", weight, (weight,))


def _bitmap_pack_fake(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_dense(weight)
    tiles = tiles_of(*weight.shape)
    return (
        weight.new_empty(torch.library.get_ctx().new_dynamic_size()),
        weight.new_empty(tiles, TILE, TILE // 8, dtype=torch.uint8),
        weight.new_empty(tiles + 1, dtype=torch.int64),
    )


def _bitmap_unpack(values: Tensor, bitmap: Tensor, offsets: Tensor, out_features: int, in_features: int) -> Tensor:
    check_packed("bitmap_unpack", values, bitmap, offsets, out_features, in_features)
    return run("bitmap_unpack", values, (values, bitmap, offsets), out_features, in_features)


def _bitmap_unpack_fake(values: Tensor, bitmap: Tensor, offsets: Tensor, out_features: int, in_features: int) -> Tensor:
    check_packed("bitmap_unpack", values, bitmap, offsets, out_features, in_features)
    return values.new_empty(out_features, in_features)


define("bitmap_pack(Tensor weight) -> (Tensor values, Tensor bitmap, Tensor offsets)", _bitmap_pack, _bitmap_pack_fake)
define(
    "bitmap_unpack(Tensor values, Tensor bitmap, Tensor offsets, SymInt out_features, SymInt in_features) -> Tensor",
    _bitmap_unpack,
    _bitmap_unpack_fake,
)


# ---------------------------------------------------------------------------------------------------------------------
# The functional API


def bitmap_pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packs a weight [out, in] bit for bit; zeros of either sign are not stored.

    Args:
        weight: bf16, fp16, fp32 or fp64.

    Returns:
        values [total] in weight's dtype, bitmap uint8 [tiles, 64, 8], offsets int64 [tiles + 1] in elements, for tiles
        of 64 x 64. No gradient reaches weight through them.

    Raises:
        TypeError, ValueError: weight's dtype or shape.
    """
    return torch.ops.pyprune.bitmap_pack(weight.detach())


def bitmap_unpack(values: Tensor, bitmap: Tensor, offsets: Tensor, out_features: int, in_features: int) -> Tensor:
    """The dense weight [out_features, in_features] of a packed one, +0 elsewhere; the inverse of `bitmap_pack`.

    Bits are trusted, and on a GPU offsets too: wrong ones give wrong results, though nothing outside values is read.
    See `check_bitmap` for tensors that come from elsewhere.

    Raises:
        TypeError, ValueError: an argument's dtype, device or shape does not fit, or on a CPU an offset.
    """
    return torch.ops.pyprune.bitmap_unpack(values, bitmap, offsets, out_features, in_features)


def check_bitmap(values: Tensor, bitmap: Tensor, offsets: Tensor, out_features: int, in_features: int) -> None:
    """Raises unless these tensors are a packed weight of that shape.

    Every packed weight from outside must pass here before any op sees it: kernels look at no more than where to read.

    Raises:
        TypeError, ValueError: dtype, device or shape; the first tile with a bit outside the weight, or whose offset
            does not follow from the bits before it; or values that end elsewhere than the last tile.
    """
    op = "check_bitmap"
    check_packed(op, values, bitmap, offsets, out_features, in_features)
    if int(offsets[0]) != 0:
        raise ValueError(f"{op}: offsets starts with {int(offsets[0])}, expected 0; the file is damaged")
    sizes, expected = offsets.diff(), padded_counts(tile_counts(bitmap))
    if (wrong := sizes != expected).any():
        tile = int(wrong.nonzero()[0])
        raise ValueError(
            f"{op}: offsets gives tile {tile} {int(sizes[tile])} values, its bits ask for {int(expected[tile])} "
            f"(a multiple of {ALIGNMENT}); the file is damaged"
        )
    if int(offsets[-1]) != len(values):
        raise ValueError(
            f"{op}: values has {len(values)} elements, offsets ends at {int(offsets[-1])}; the file is damaged"
        )
    _check_edges(op, bitmap, out_features, in_features)


def _check_edges(op: str, bitmap: Tensor, out_features: int, in_features: int) -> None:
    """Raises for a bit to the right of the weight or below it."""
    if len(bitmap) == 0:
        return
    grid = bitmap.unflatten(0, (-1, -(-in_features // TILE)))
    outside = torch.zeros_like(grid, dtype=torch.bool)
    columns = torch.arange(TILE // 8, device=bitmap.device) * 8
    used = (in_features - 1) % TILE + 1
    allowed = (1 << (used - columns).clamp(0, 8)) - 1
    outside[:, -1] = (grid[:, -1].int() & ~allowed) != 0
    outside[-1, :, (out_features - 1) % TILE + 1 :] |= grid[-1, :, (out_features - 1) % TILE + 1 :] != 0
    if (wrong := outside.flatten(0, 1).flatten(1).any(1)).any():
        tile = int(wrong.nonzero()[0])
        raise ValueError(
            f"{op}: bitmap of tile {tile} has a bit outside the weight [{out_features}, {in_features}]; "
            "the file is damaged"
        )
