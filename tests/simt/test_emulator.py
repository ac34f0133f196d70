"""What the emulator must report: each kind of mistake, made on purpose in a small kernel (faults.cu)."""

from __future__ import annotations

import ctypes

import pytest
import torch
from emulator import EAGER_GREEDY, HERE, LAZY, SCHEDULES, Emulator, Schedule, line_of
from torch import Tensor

FAULTS = HERE / "faults.cu"
THREADS = 128


def reverse(emulator: Emulator) -> tuple[Tensor, Tensor]:
    """Runs `reverse`; what it wrote and what it should have written."""
    data = torch.arange(THREADS, dtype=torch.int32)
    out = emulator.empty(THREADS, dtype=torch.int32)
    emulator.call("run_reverse", emulator.copy(data), out)
    return out, data.flip(0)


def reverse_async(emulator: Emulator) -> tuple[Tensor, Tensor]:
    """The same for `reverse_async`."""
    data = torch.arange(4 * THREADS, dtype=torch.int32).view(THREADS, 4)
    out = emulator.empty(THREADS, 4, dtype=torch.int32)
    emulator.call("run_reverse_async", emulator.copy(data), out)
    return out, data.flip(0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_right_kernels_are_right_in_every_schedule(emulator: Emulator, schedule: Schedule) -> None:
    with emulator.using(schedule):
        assert torch.equal(*reverse(emulator))
        assert torch.equal(*reverse_async(emulator))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_missing_barrier_shows_in_every_schedule(emulator: Emulator, schedule: Schedule) -> None:
    with emulator.using(schedule), emulator.without(line_of(FAULTS, "// barrier of reverse")):
        assert not torch.equal(*reverse(emulator))


def test_a_missing_wait_shows_where_copies_land_late(emulator: Emulator) -> None:
    line = line_of(FAULTS, "// wait of reverse_async")
    with emulator.using(LAZY), emulator.without(line):
        out, expected = reverse_async(emulator)
        assert (out != expected).all()
    with emulator.using(EAGER_GREEDY), emulator.without(line):
        assert torch.equal(*reverse_async(emulator)), "copies that land early hide a missing wait"


def test_shared_memory_starts_as_nan(emulator: Emulator) -> None:
    with emulator.without(line_of(FAULTS, "// wait of reverse_async")):
        out, _ = reverse_async(emulator)
    assert out.view(torch.float32).isnan().all()
    assert out.view(torch.bfloat16).isnan().all() and out.view(torch.float16).isnan().all()


@pytest.mark.parametrize("at_end", [True, False])
def test_out_of_bounds_in_global_memory(emulator: Emulator, at_end: bool) -> None:
    emulator.at_end = at_end
    data, out = (emulator.empty(200, dtype=torch.int32) for _ in range(2))
    emulator.call("run_grid_copy", data, out, 200)
    if at_end:
        with pytest.raises(RuntimeError, match=r"bounds.*800 bytes, at offset 800: block \(1, 0, 0\), thread 72"):
            emulator.call("run_grid_copy", data, out, 201)
    else:
        before = ctypes.c_void_p(data.data_ptr() - 4)
        with pytest.raises(RuntimeError, match=r"out of bounds.*800 bytes, at offset -4: block \(0, 0, 0\), thread 0"):
            emulator.call("run_grid_copy", before, out, 200)


def test_out_of_bounds_in_shared_memory(emulator: Emulator) -> None:
    out = emulator.empty(THREADS, dtype=torch.int32)
    emulator.call("run_read_shared", out, 0)
    with pytest.raises(RuntimeError, match=r"out of bounds.* shared memory of 512 bytes, at offset 512: .*thread 127"):
        emulator.call("run_read_shared", out, 1)


@pytest.mark.parametrize("distance", [2**33, -(2**33)])
def test_far_out_of_bounds(emulator: Emulator, distance: int) -> None:
    """Where a garbage index leads, no memory of this process lies."""
    data, out = (emulator.empty(200, dtype=torch.int32) for _ in range(2))
    with pytest.raises(RuntimeError, match=rf"a buffer of 800 bytes, at offset {distance}: .*thread 0"):
        emulator.call("run_grid_copy", data, ctypes.c_void_p(out.data_ptr() + distance), 200)
    with pytest.raises(RuntimeError, match=rf"shared memory of 512 bytes, at offset {distance // 4}: .*thread 0"):
        emulator.call("run_read_shared", out, distance // 16)


def test_stack_overflow(emulator: Emulator) -> None:
    out = emulator.empty(THREADS, dtype=torch.int32)
    emulator.call("run_use_stack", out, 50)
    assert out.eq(50).all()
    with pytest.raises(RuntimeError, match=r"out of bounds.* thread's stack of 65536 bytes, at offset -.*thread 0"):
        emulator.call("run_use_stack", out, 100)


def test_divergent_barriers(emulator: Emulator) -> None:
    first, second = (line_of(FAULTS, f"// {which} of divergent_barriers") for which in ("first", "second"))
    with pytest.raises(RuntimeError, match=rf"divergent __syncthreads: .*line {first}; .*thread \d+ .*line {second}"):
        emulator.call("run_divergent_barriers")


def test_divergent_lanes(emulator: Emulator) -> None:
    line = line_of(FAULTS, "// odd lanes of divergent_lanes")
    with pytest.raises(RuntimeError, match=rf"divergence: __shfl_xor_sync .*block \(0, 0, 0\), thread 1, line {line}$"):
        emulator.call("run_divergent_lanes", emulator.empty(THREADS, dtype=torch.int32))


def test_a_lane_that_never_comes(emulator: Emulator) -> None:
    line = line_of(FAULTS, "// ballot of missing_lane")
    with pytest.raises(RuntimeError, match=rf"deadlock: .*waits in __ballot_sync, line {line}"):
        emulator.call("run_missing_lane", emulator.empty(THREADS, dtype=torch.int32))


def test_misaligned_asynchronous_copy(emulator: Emulator) -> None:
    with pytest.raises(RuntimeError, match=r"cp\.async source: misaligned address"):
        emulator.call("run_misaligned_copy", emulator.empty(64, dtype=torch.uint8))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_collectives_on_half_warps(emulator: Emulator, schedule: Schedule) -> None:
    out = emulator.empty(2, THREADS, dtype=torch.int32)
    with emulator.using(schedule):
        emulator.call("run_half_warps", out)
    lane = torch.arange(THREADS) % 32
    odd = torch.where(lane < 16, 0x0000AAAA, 0xAAAA0000)
    assert torch.equal(out[0].long() % 2**32, odd)
    assert torch.equal(out[1].long(), lane // 16 * 16 + (lane + 1) % 16)


def test_the_emulator_survives_an_error(emulator: Emulator) -> None:
    with pytest.raises(RuntimeError, match="divergent"):
        emulator.call("run_divergent_barriers")
    assert torch.equal(*reverse(emulator))
