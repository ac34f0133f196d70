"""csrc/lora_score.cu on the emulator: right numbers in every schedule, every barrier needed, nothing read past."""

from __future__ import annotations

import re

import pytest
import torch
from emulator import EAGER_GREEDY, LAZY, ROOT, SCHEDULES, Emulator
from ops.test_lora_score import SCALE, Factors, by_hand, make
from torch import Tensor

from pyprune._cpu.common import DTYPE_CODES

SOURCE = ROOT / "csrc/lora_score.cu"
DTYPES = list(DTYPE_CODES)
# (outputs, inputs, rank): one weight; nothing aligned; a second block of rows and of columns; a rank that takes several
# stages of the summed dimension (6 r + 3 r > 96); whole tiles.
SHAPES = [(1, 1, 1), (19, 37, 3), (130, 520, 2), (17, 72, 21), (128, 64, 8)]


def run(emulator: Emulator, factors: Factors, dim: int) -> Tensor:
    weight, a = factors[:2]
    copies = [emulator.copy(tensor) for tensor in factors]
    rows, scratch = emulator.cuda.lora_group_score_sizes(*weight.shape, a.shape[0], dim)
    partials = emulator.empty(rows, weight.shape[dim], dtype=torch.float32)
    workspace = torch.empty(scratch + 256, dtype=torch.uint8).fill_(0xFF)  # bf16 NaN
    start = -workspace.data_ptr() % 256
    addresses = [tensor.data_ptr() for tensor in (*copies, partials, workspace[start:])]
    emulator.cuda.lora_group_score(DTYPE_CODES[weight.dtype], *weight.shape, a.shape[0], SCALE, dim, *addresses, 0)
    assert all(torch.equal(before, after) for before, after in zip(factors, copies, strict=True))
    return partials.sum(0)


def check(factors: Factors, dim: int, result: Tensor) -> None:
    """Split factors are off by 2^-16 each in every term of both products; the sums by less."""
    exact, size = by_hand(factors, dim)
    assert ((result - exact).abs() <= 2**-14 * size).all()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_fp64(emulator: Emulator, shape: tuple[int, int, int], dtype: torch.dtype, dim: int) -> None:
    factors = make(*shape, dtype)
    results = []
    for schedule in (LAZY, EAGER_GREEDY):
        with emulator.using(schedule):
            results.append(run(emulator, factors, dim))
    check(factors, dim, results[0])
    assert torch.equal(*results)


def test_nothing_before_the_start(emulator: Emulator) -> None:
    """Buffers start at a protected page."""
    emulator.at_end = False
    factors = make(19, 37, 3, torch.bfloat16)
    check(factors, 1, run(emulator, factors, 1))


def test_the_split_is_needed() -> None:
    """Factors rounded to bf16 alone would fail the check above."""
    factors = make(128, 64, 8, torch.float32)
    rounded = (factors[0], *(tensor.bfloat16().float() for tensor in factors[1:]))
    with pytest.raises(AssertionError):
        check(factors, 0, by_hand(rounded, 0)[0])  # type: ignore[arg-type]


def barriers() -> list[int]:
    return [i for i, line in enumerate(SOURCE.read_text().splitlines(), 1) if re.search(r"__syncthreads\(\)", line)]


@pytest.mark.parametrize("line", barriers())
def test_every_barrier_is_needed(emulator: Emulator, line: int) -> None:
    """Left out, some schedule gives wrong numbers or is caught."""
    factors = make(33, 136, 12, torch.bfloat16)
    caught = False
    for schedule in SCHEDULES:
        with emulator.using(schedule), emulator.without(line):
            try:
                check(factors, 1, run(emulator, factors, 1))
            except (AssertionError, RuntimeError):
                caught = True
                break
    assert caught


def test_bad_codes(emulator: Emulator) -> None:
    for dtype, dim in ((7, 0), (0, 2)):
        with pytest.raises(RuntimeError, match="CUDA error 1"):
            emulator.cuda.lora_group_score(dtype, 1, 1, 1, 1.0, dim, 0, 0, 0, 0, 0, 0, 0, 0)
