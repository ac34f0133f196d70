"""`transposable_prune` on the CPU: exactly the best of all 90 patterns, found here by another way."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from pyprune import _native, ops
from pyprune.reference.bits import pack_bits, unpack_bits
from pyprune.reference.transposable import patterns

# One tile; half a byte at the end; more tiles than the kernel takes at a time; none.
SHAPES = [(4, 4), (8, 12), (4, 264), (12, 136), (0, 8), (4, 0)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ISAS = _native.cpu.isas() if _native.cpu else ()


@pytest.fixture(params=[*ISAS, "reference"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set this machine runs, and the reference."""
    if request.param == "reference":
        with ops.using("reference"):
            yield request.param
        return
    before = _native.cpu.isa()
    _native.cpu.set_isa(request.param)
    yield request.param
    _native.cpu.set_isa(before)


def all_masks() -> Tensor:
    """bool [90, 4, 4], by trying all 2^16 masks."""
    every = (torch.arange(1 << 16)[:, None] >> torch.arange(16)) & 1
    tiles = every.view(-1, 4, 4)
    return tiles[((tiles.sum(1) == 2) & (tiles.sum(2) == 2)).all(-1)].bool()


def test_there_are_ninety_patterns() -> None:
    assert len(all_masks()) == len(patterns()) == len(set(patterns())) == 90
    assert list(patterns()) == sorted(patterns())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_tile_has_the_largest_sum(implementation: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    scores = torch.randn(shape).abs().to(dtype)
    bits, flips = ops.transposable_prune(scores)
    kept = unpack_bits(bits, shape[1])
    assert torch.equal(pack_bits(kept), bits) and int(flips) == 0  # no bit set past the last column
    masks = all_masks().double()
    for i, j in product(range(0, shape[0], 4), range(0, shape[1], 4)):
        tile, mask = scores[i : i + 4, j : j + 4].double(), kept[i : i + 4, j : j + 4]
        assert mask.sum(0).tolist() == mask.sum(1).tolist() == [2] * 4
        best = (masks * tile).sum((1, 2)).max()
        assert (tile * mask).sum() >= best - 2**-22 * best  # sums are fp32


def test_all_implementations_break_ties_alike(implementation: str) -> None:
    scores = torch.randint(0, 3, (64, 200)).float()
    found, _ = ops.transposable_prune(scores)
    with ops.using("reference"):
        right, _ = ops.transposable_prune(scores)
    assert torch.equal(found, right)
    even = unpack_bits(ops.transposable_prune(torch.ones(4, 4))[0], 4)
    assert even.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]  # the first pattern


def test_flips_are_counted(implementation: str) -> None:
    scores, previous = torch.rand(8, 20), torch.rand(8, 20) < 0.5
    bits, flips = ops.transposable_prune(scores, pack_bits(previous))
    assert int(flips) == int((unpack_bits(bits, 20) != previous).sum())


def test_the_op_is_registered_as_it_should_be() -> None:
    torch.library.opcheck(torch.ops.pyprune.transposable_prune.default, (torch.rand(4, 8), None))


def test_bad_input_is_refused() -> None:
    for shape in ((4, 6), (6, 4), (4,)):
        with pytest.raises(ValueError, match="expected two multiples of 4"):
            ops.transposable_prune(torch.rand(shape))
    with pytest.raises(ValueError, match="scores hold NaN"):
        ops.transposable_prune(torch.full((4, 4), float("nan")))
    with pytest.raises(TypeError, match=r"scores is torch\.int64"):
        ops.transposable_prune(torch.ones(4, 4, dtype=torch.int64))
