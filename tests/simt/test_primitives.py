"""The emulated twins of csrc/ptx.cuh against the PTX ISA."""

from __future__ import annotations

import pytest
import torch
from emulator import SCHEDULES, Emulator, Schedule
from primitives import MMA_ATOL, bit_operations, copies, copies_8, fragments, matrices, sparse_fragments


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


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_cp_async_of_8_bytes(emulator: Emulator, schedule: Schedule, generator: torch.Generator) -> None:
    data, size, expected = copies_8(generator)
    out = emulator.empty(32, 8, dtype=torch.uint8)
    with emulator.using(schedule):
        emulator.call("run_copy_8", emulator.copy(data), emulator.copy(size), out)
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


@pytest.mark.parametrize("selector", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_mma_sp(
    emulator: Emulator, schedule: Schedule, dtype: torch.dtype, selector: bool, generator: torch.Generator
) -> None:
    a, b, metadata, c, expected = sparse_fragments(dtype, selector, generator)
    out = emulator.empty(32, 4, dtype=torch.float32)
    with emulator.using(schedule):
        emulator.call("run_mma_sp", *map(emulator.copy, (a, b, metadata, c)), out, dtype == torch.bfloat16, selector)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=MMA_ATOL)


def test_mma_sp_refuses_metadata_that_hardware_leaves_undefined(emulator: Emulator, generator: torch.Generator) -> None:
    a, b, metadata, c, _ = sparse_fragments(torch.bfloat16, False, generator)
    metadata[4 * 3 + 1] = 0x4444_4454  # places 1 and 1 in columns 20 to 23 of row 3
    out = emulator.empty(32, 4, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"mma\.sp: the places in the metadata do not ascend"):
        emulator.call("run_mma_sp", *map(emulator.copy, (a, b, metadata, c)), out, True, False)


def test_bit_operations(emulator: Emulator, generator: torch.Generator) -> None:
    *inputs, expected = bit_operations(generator)
    out = emulator.empty(32, 4, dtype=torch.int32)
    emulator.call("run_bits", *map(emulator.copy, inputs), out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_atomics(emulator: Emulator, schedule: Schedule) -> None:
    out = emulator.copy(torch.tensor([5, -1]))
    with emulator.using(schedule):
        emulator.call("run_atomics", emulator.copy(torch.arange(7, 39)), out)
    assert out.tolist() == [5 + sum(range(7, 39)), 7], "-1 is the largest of unsigned integers"
