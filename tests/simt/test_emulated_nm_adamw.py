"""csrc/nm_adamw.cu and csrc/transposable.cu on the emulator: right numbers, nothing read or written past the ends."""

from __future__ import annotations

import pytest
import torch
from adamw_checks import (
    CONVERSIONS,
    NUMBERS,
    SHAPES,
    TILED_SHAPES,
    Launchers,
    check_transposable,
    masked_weight,
    step,
    transposable_prune,
)
from adamw_oracle import OPTIONS, Case
from emulator import EAGER_GREEDY, LAZY, Emulator, Schedule

from pyprune import ops
from pyprune._cpu.nm_adamw import adamw_options


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("schedule", [LAZY, EAGER_GREEDY], ids=str)
def test_a_step_agrees_with_fp64(
    emulator: Emulator,
    launchers: Launchers,
    schedule: Schedule,
    shape: tuple[int, int],
    dtype: torch.dtype,
    masked: bool,
) -> None:
    case = Case(*shape, dtype, masked)
    with emulator.using(schedule):
        case.check(step(launchers, case, case.mask))


def test_bf16_rounds_by_the_same_hash_as_the_reference(launchers: Launchers) -> None:
    case = Case(17, 264, torch.bfloat16)
    with ops.using("reference"):
        right = case.step()[0]
    assert (step(launchers, case, case.mask)[0] != right).double().mean() < 1e-3


@pytest.mark.parametrize("dtypes", CONVERSIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masked_weight(launchers: Launchers, shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    weight, kept = torch.randn(shape).to(dtypes[0]), torch.rand(shape) < 0.5
    assert torch.equal(masked_weight(launchers, weight, kept, dtypes[1]), torch.where(kept, weight, 0).to(dtypes[1]))


@pytest.mark.parametrize("dtypes", [(1, 0), (1, 2), (2, 0), (2, 1)], ids=str)
def test_other_conversions_are_refused(emulator: Emulator, dtypes: tuple[int, int]) -> None:
    with pytest.raises(RuntimeError, match="invalid argument"):
        emulator.cuda.masked_weight(*dtypes, 1, 1, 0, 0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", TILED_SHAPES, ids=str)
def test_transposable_masks_are_the_references(
    launchers: Launchers, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    check_transposable(launchers, shape, dtype)


@pytest.mark.parametrize("columns", [8, 12])
def test_scores_that_are_nan_are_counted(launchers: Launchers, columns: int) -> None:
    """Infinities of both signs, whose sums are NaN, are none."""
    scores = torch.rand(8, columns)
    scores[0, :2] = torch.tensor([torch.inf, -torch.inf])
    scores[5, -1] = scores[6, 1] = scores[6, 2] = torch.nan
    assert transposable_prune(launchers, scores, None)[1] == [0, 3]


def test_reading_past_an_end_is_noticed(launchers: Launchers) -> None:
    case = Case(8, 256, torch.float32)
    mask = case.mask
    assert mask is not None
    with pytest.raises(RuntimeError, match="out of bounds access"):
        step(launchers, case, mask[:-1])
    case.tensors[1] = case.tensors[1][:-1]
    with pytest.raises(RuntimeError, match="out of bounds access"):
        step(launchers, case, mask)


def test_nothing_before_the_start_is_touched(emulator: Emulator, launchers: Launchers) -> None:
    emulator.at_end = False
    case = Case(3, 13, torch.bfloat16)
    case.check(step(launchers, case, case.mask))


def test_unknown_dtypes_are_refused(emulator: Emulator) -> None:
    options = adamw_options(OPTIONS["lr"], *OPTIONS["betas"], *(OPTIONS[name] for name in NUMBERS))
    with pytest.raises(RuntimeError, match="invalid argument"):
        emulator.cuda.nm_adamw(2, 1, 1, options, 0, 0, 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="invalid argument"):
        emulator.cuda.transposable_prune(7, 4, 4, 0, 0, 0, 0, 0, 0)
