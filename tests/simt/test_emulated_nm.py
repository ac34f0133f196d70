"""csrc/nm.cu on the emulator: bit for bit what the reference makes, for every pattern, path and schedule."""

from __future__ import annotations

import pytest
import torch
from emulator import EAGER_GREEDY, LAZY, Emulator, Schedule
from sparse_checks import (
    DTYPES,
    PATTERNS,
    Launchers,
    assert_same,
    nm_compress,
    nm_decompress,
    nm_prune,
    nm_weight,
    reference,
)
from torch import Tensor


def rough_scores(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Scores with many ties, infinities and zeros of both signs."""
    g = torch.Generator().manual_seed(rows)
    levels = torch.tensor([-float("inf"), -1.5, -0.0, 0.0, 1.0, 2.0, float("inf")]).to(dtype)
    return levels[torch.randint(len(levels), (rows, columns), generator=g)]


def columns_of(m: int) -> tuple[int, int]:
    """Whole bytes of the mask, and a rest."""
    return 8 * m, 9 * m


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("schedule", [LAZY, EAGER_GREEDY], ids=str)
def test_masks_and_flips(
    emulator: Emulator, launchers: Launchers, schedule: Schedule, n: int, m: int, dtype: torch.dtype
) -> None:
    for columns in columns_of(m):
        scores = rough_scores(5, columns, dtype)
        previous, _, _ = reference.nm_prune(rough_scores(5, columns, dtype).flip(0), n, m, None)
        for before in (None, previous):
            with emulator.using(schedule):
                assert_same(nm_prune(launchers, scores, n, m, before), reference.nm_prune(scores, n, m, before))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 5)])
def test_scores_without_ties_in_more_pieces_than_threads(launchers: Launchers, n: int, m: int) -> None:
    scores = torch.randn(40, 120 * m, generator=torch.Generator().manual_seed(0))
    previous, _, _ = reference.nm_prune(-scores, n, m, None)
    assert_same(nm_prune(launchers, scores, n, m, previous), reference.nm_prune(scores, n, m, previous))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (3, 5)])
@pytest.mark.parametrize("schedule", [LAZY, EAGER_GREEDY], ids=str)
def test_the_first_group_with_nan_is_named(
    emulator: Emulator, launchers: Launchers, schedule: Schedule, n: int, m: int
) -> None:
    scores = torch.randn(6, 8 * m, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    scores[3, 6 * m - 1] = scores[3, 7 * m] = scores[5, 0] = float("nan")
    with emulator.using(schedule):
        _, _, first = nm_prune(launchers, scores, n, m, None)
    assert first == 3 * 8 + 5 == reference.nm_prune(scores, n, m, None)[2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("schedule", [LAZY, EAGER_GREEDY], ids=str)
def test_packing_and_back(
    emulator: Emulator, launchers: Launchers, schedule: Schedule, n: int, m: int, dtype: torch.dtype
) -> None:
    for columns in columns_of(m):
        weight = nm_weight(5, columns, n, m, dtype, odd=True)
        values, metadata, first = reference.nm_compress(weight, n, m)
        assert first == -1
        with emulator.using(schedule):
            assert_same(nm_compress(launchers, weight, n, m), (values, metadata, first))
            dense = nm_decompress(launchers, values, metadata, n, m)
        assert_same((dense,), (reference.nm_decompress(values, metadata, n, m),))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 5)])
def test_the_first_group_with_too_many_is_named(launchers: Launchers, n: int, m: int) -> None:
    weight = nm_weight(6, 8 * m, n, m, torch.float16)
    weight[2, 3 * m : 4 * m] = weight[4, :m] = 1
    _, _, first = nm_compress(launchers, weight, n, m)
    assert first == 2 * 8 + 3 == reference.nm_compress(weight, n, m)[2]


@pytest.mark.parametrize("shape", [(0, 16), (3, 0)], ids=str)
def test_empty(launchers: Launchers, shape: tuple[int, int]) -> None:
    weight = torch.zeros(shape)
    assert_same(nm_prune(launchers, weight, 2, 4, None), reference.nm_prune(weight, 2, 4, None))
    assert_same(nm_compress(launchers, weight, 2, 4), reference.nm_compress(weight, 2, 4))
    values, metadata, _ = reference.nm_compress(weight, 2, 4)
    assert nm_decompress(launchers, values, metadata, 2, 4).shape == shape


@pytest.mark.parametrize("n", [2, 1])
def test_addresses_that_are_no_multiple_of_16(emulator: Emulator, launchers: Launchers, n: int) -> None:
    """A view that begins at its buffer's second element."""
    weight = nm_weight(4, 32, n, 4, torch.bfloat16)

    def shifted(tensor: Tensor) -> Tensor:
        return emulator.copy(torch.cat([tensor.flatten()[:1], tensor.flatten()]))[1:].view(tensor.shape)

    launchers.copy = shifted
    assert_same(nm_compress(launchers, weight, n, 4), reference.nm_compress(weight, n, 4))
    assert_same(nm_prune(launchers, weight, n, 4, None), reference.nm_prune(weight, n, 4, None))


def test_nothing_before_the_start_is_touched(emulator: Emulator, launchers: Launchers) -> None:
    emulator.at_end = False
    for n, m in ((2, 4), (3, 5)):
        weight = nm_weight(3, 9 * m, n, m, torch.float32)
        values, metadata, first = nm_compress(launchers, weight, n, m)
        assert_same((values, metadata, first), reference.nm_compress(weight, n, m))
        assert torch.equal(nm_decompress(launchers, values, metadata, n, m), weight)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 5)])
@pytest.mark.parametrize("which", ["scores", "previous", "weight", "values", "metadata"])
def test_reading_past_the_end_of_any_input_is_noticed(launchers: Launchers, which: str, n: int, m: int) -> None:
    weight = nm_weight(4, 8 * m, n, m, torch.bfloat16)
    previous, _, _ = reference.nm_prune(weight, n, m, None)
    values, metadata, _ = reference.nm_compress(weight, n, m)
    copy = launchers.copy

    def one_row_short(tensor: Tensor) -> Tensor:
        short = {"scores": weight, "weight": weight, "previous": previous, "values": values, "metadata": metadata}
        return copy(tensor[:-1] if tensor is short[which] else tensor)

    launchers.copy = one_row_short
    with pytest.raises(RuntimeError, match=r"out of bounds access: a buffer of \d+ bytes.*block .*thread"):
        if which in ("scores", "previous"):
            nm_prune(launchers, weight, n, m, previous)
        elif which == "weight":
            nm_compress(launchers, weight, n, m)
        else:
            nm_decompress(launchers, values, metadata, n, m)


def test_invalid_arguments_are_refused(launchers: Launchers) -> None:
    for shape, dtype in (
        ((4, 10, 2, 4), 0),
        ((4, 8, 5, 4), 0),
        ((4, 8, 0, 4), 0),
        ((4, 514, 2, 257), 0),
        ((4, 8, 2, 4), 3),
    ):
        with pytest.raises(RuntimeError, match="invalid argument"):
            launchers.cuda.nm_decompress(shape, dtype, 0, 0, 0, 0)
