"""The emulated twins of csrc/ptx.cuh against the PTX ISA."""

from __future__ import annotations

import pytest
import torch
from emulator import SCHEDULES, Emulator, Schedule
from primitives import MMA_ATOL, copies, fragments, matrices


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_cp_async_copies_and_fills_with_zeros(
    emulator: Emulator, schedule: Schedule, generator: torch.Generator
) -> None:
    data, size, expected = copies(generator)
    out = emulator.empty(64, 16, dtype=torch.uint8)
    with emulator.using(schedule):
        emulator.call("run_copy", emulator.copy(data), emulator.copy(size), out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_ldmatrix(emulator: Emulator, schedule: Schedule, transposed: bool, generator: torch.Generator) -> None:
    data, expected = matrices(transposed, generator)
    out = emulator.empty(32, 4, 2, dtype=torch.int16)
    with emulator.using(schedule):
        emulator.call("run_ldmatrix", emulator.copy(data), out, transposed)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_mma(emulator: Emulator, schedule: Schedule, dtype: torch.dtype, generator: torch.Generator) -> None:
    a, b, c, expected = fragments(dtype, generator)
    out = emulator.empty(32, 4, dtype=torch.float32)
    with emulator.using(schedule):
        emulator.call("run_mma", *map(emulator.copy, (a, b, c)), out, dtype == torch.bfloat16)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=MMA_ATOL)
