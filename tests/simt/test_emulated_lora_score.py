"""csrc/lora_score.cu on the emulator: right numbers in every schedule, every barrier needed, nothing read past."""

from __future__ import annotations

import re

import pytest
import torch
from emulator import EAGER_GREEDY, LAZY, ROOT, SCHEDULES, Emulator
from lora_checks import DTYPES, SHAPES, Launchers, check, launch, make, run
from ops.test_lora_score import by_hand

SOURCE = ROOT / "csrc/lora_score.cu"


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_fp64(
    emulator: Emulator, launchers: Launchers, shape: tuple[int, int, int], dtype: torch.dtype, dim: int
) -> None:
    factors = make(*shape, dtype)
    results = []
    for schedule in (LAZY, EAGER_GREEDY):
        with emulator.using(schedule):
            results.append(run(launchers, factors, dim))
    check(factors, dim, results[0])
    assert torch.equal(*results)


def test_nothing_before_the_start(emulator: Emulator, launchers: Launchers) -> None:
    """Buffers start at protected memory."""
    emulator.at_end = False
    factors = make(19, 37, 3, torch.bfloat16)
    check(factors, 1, run(launchers, factors, 1))


def test_the_split_is_needed() -> None:
    """Factors rounded to bf16 alone would fail the check above."""
    factors = make(128, 64, 8, torch.float32)
    rounded = (factors[0], *(tensor.bfloat16().float() for tensor in factors[1:]))
    with pytest.raises(AssertionError):
        check(factors, 0, by_hand(rounded, 0)[0])  # type: ignore[arg-type]


def barriers() -> list[int]:
    return [i for i, line in enumerate(SOURCE.read_text().splitlines(), 1) if re.search(r"__syncthreads\(\)", line)]


@pytest.mark.parametrize("line", barriers())
def test_every_barrier_is_needed(emulator: Emulator, launchers: Launchers, line: int) -> None:
    """Left out, some schedule gives wrong numbers or is caught, in one kernel or the other."""
    few, many = make(33, 136, 12, torch.bfloat16), make(33, 137, 12, torch.bfloat16)

    def right() -> bool:
        try:
            for factors in (few, many):
                for dim in (0, 1):
                    check(factors, dim, run(launchers, factors, dim))
        except (AssertionError, RuntimeError):
            return False
        return True

    caught = False
    for schedule in SCHEDULES:
        with emulator.using(schedule), emulator.without(line):
            caught = caught or not right()
    assert caught


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("dim", [0, 1])
def test_reading_past_an_end_is_noticed(launchers: Launchers, dim: int, which: int) -> None:
    factors = list(make(33, 136, 8, torch.bfloat16))
    whole, copies = factors[which], launchers.copy
    launchers.copy = lambda tensor: copies(tensor.flatten()[:-8] if tensor is whole else tensor)
    with pytest.raises(RuntimeError, match="out of bounds access"):
        launch(launchers, tuple(factors), dim)  # type: ignore[arg-type]


def test_bad_codes(emulator: Emulator) -> None:
    for dtype, dim in ((7, 0), (0, 2)):
        with pytest.raises(RuntimeError, match="CUDA error 1"):
            emulator.cuda.lora_group_score(dtype, 1, 1, 1, 1.0, dim, 0, 0, 0, 0, 0, 0, 0, 0)
