"""csrc/sparsegpt.cu on the emulator: right numbers in every schedule, the barrier noticed, nothing read past."""

from __future__ import annotations

import pytest
import torch
from emulator import EAGER_GREEDY, LAZY, ROOT, SCHEDULES, Emulator, Schedule, line_of
from sparsegpt_checks import CASES, PATTERNS, Launchers, check, make_factor, make_slab, slab, solve

from pyprune import ops
from pyprune._cuda import CudaKernels

SOURCE = ROOT / "csrc/sparsegpt.cu"


@pytest.mark.parametrize("grid", [False, True], ids=["", "rounded"])
@pytest.mark.parametrize(("shape", "pattern"), CASES, ids=str)
@pytest.mark.parametrize("schedule", [LAZY, EAGER_GREEDY], ids=str)
def test_agrees_with_fp64(
    emulator: Emulator, schedule: Schedule, shape: tuple[int, int, int], pattern: str, grid: bool
) -> None:
    rows, columns, block = shape
    weight, factor = torch.randn(rows, columns), make_factor(columns)
    arguments = {"block": block, "grid": grid, **PATTERNS[pattern]}
    with emulator.using(schedule), ops.using(CudaKernels(emulator.cuda, stream=lambda device: 0)):
        result = solve(weight, factor, **arguments)
    check(weight, factor, result, arguments)


@pytest.mark.parametrize(("n", "m"), [(0, 0), (2, 4)])
def test_bitwise_the_same_in_every_schedule(emulator: Emulator, launchers: Launchers, n: int, m: int) -> None:
    tensors = make_slab(9, 104)
    first = slab(launchers, tensors, 9, 104, n, m)
    for schedule in SCHEDULES:
        with emulator.using(schedule):
            again = slab(launchers, tensors, 9, 104, n, m)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), schedule


def test_the_missing_barrier_is_noticed(emulator: Emulator, launchers: Launchers) -> None:
    tensors = make_slab(9, 104)
    right = slab(launchers, tensors, 9, 104, 0, 0)
    noticed = []
    for schedule in SCHEDULES:
        with emulator.using(schedule), emulator.without(line_of(SOURCE, "__syncthreads();")):
            wrong = slab(launchers, tensors, 9, 104, 0, 0)
        noticed.append(any(not torch.equal(a, b) for a, b in zip(right, wrong, strict=True)))
    assert any(noticed)


@pytest.mark.parametrize("which", ["work", "upper", "keep", "scale", "zero"])
def test_reading_past_the_end_of_any_input_is_noticed(launchers: Launchers, which: str) -> None:
    tensors = make_slab(9, 104)
    tensors[which] = tensors[which][:-1]
    with pytest.raises(RuntimeError, match=r"out of bounds access: a buffer of \d+ bytes.*block .*thread"):
        slab(launchers, tensors, 9, 104, 0, 0)


def test_nothing_before_the_start_is_touched(emulator: Emulator, launchers: Launchers) -> None:
    tensors = make_slab(9, 104)
    first = slab(launchers, tensors, 9, 104, 2, 4)
    emulator.at_end = False
    again = slab(launchers, tensors, 9, 104, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_slab_that_is_too_wide_is_refused(emulator: Emulator) -> None:
    with pytest.raises(ValueError, match="width must be 1 to 128"):
        emulator.cuda.sparsegpt_slab(1, 256, 0, 129, 0, 0, 0, 0, 0, 1, 0, 0, 0.0, 0, 0)
