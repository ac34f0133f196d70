"""csrc/rank.cu on the emulator: right numbers in every schedule, the barrier needed and noticed, nothing read past."""

from __future__ import annotations

import re

import pytest
import torch
from emulator import EAGER_GREEDY, LAZY, ROOT, SCHEDULES, Emulator, Schedule
from rank_checks import DTYPES, SHAPES, Launchers, check_gradient, check_mask, make_inputs, rank_bucket_grad, rank_mask

SOURCE = ROOT / "csrc/rank.cu"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("schedule", [LAZY, EAGER_GREEDY], ids=str)
def test_agrees_with_fp64(
    emulator: Emulator, launchers: Launchers, schedule: Schedule, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    inputs = make_inputs(*shape, dtype)
    with emulator.using(schedule):
        masked = rank_mask(launchers, inputs)
        gradients = {steps: rank_bucket_grad(launchers, inputs, steps) for steps in (1, 100)}
    check_mask(inputs, masked)
    for steps, result in gradients.items():
        check_gradient(inputs, steps, result)


def test_the_most_steps_and_nothing_before_the_start(emulator: Emulator, launchers: Launchers) -> None:
    """At 255 steps a block has one row; buffers start at protected memory."""
    emulator.at_end = False
    inputs = make_inputs(3, 520, torch.bfloat16)
    check_gradient(inputs, 255, rank_bucket_grad(launchers, inputs, 255))
    check_mask(inputs, rank_mask(launchers, inputs))


def test_no_rows(launchers: Launchers) -> None:
    inputs = make_inputs(0, 8, torch.float16)
    assert rank_mask(launchers, inputs).shape == (0, 8)
    assert rank_bucket_grad(launchers, inputs, 100).shape == (0, 101)


def test_a_rank_that_no_row_has_stays_inside_the_histogram(launchers: Launchers) -> None:
    """Its row's sums are wrong, the other rows' are right, and nothing is written past."""
    inputs = make_inputs(4, 64, torch.float32)
    right = rank_bucket_grad(launchers, inputs, 100)
    inputs["rank"] = inputs["rank"].clone()
    inputs["rank"][3] = 65535
    found = rank_bucket_grad(launchers, inputs, 100)
    assert torch.equal(found[:3], right[:3]) and not torch.equal(found[3], right[3])


def test_bitwise_the_same_in_every_schedule(emulator: Emulator, launchers: Launchers) -> None:
    inputs = make_inputs(9, 520, torch.bfloat16)
    first = rank_bucket_grad(launchers, inputs, 100)
    for schedule in SCHEDULES:
        with emulator.using(schedule):
            assert torch.equal(rank_bucket_grad(launchers, inputs, 100), first), schedule


def test_invalid_arguments_are_refused(emulator: Emulator) -> None:
    inputs = make_inputs(2, 8, torch.float32)
    with pytest.raises(RuntimeError, match="invalid argument"):
        emulator.cuda.rank_bucket_grad(0, 2, 8, 256, 0, 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="invalid argument"):
        emulator.cuda.rank_mask(3, 2, 8, *(inputs["weight"].data_ptr() for _ in range(4)), 0)


def synchronisations() -> list[int]:
    """The source lines of every barrier."""
    lines = SOURCE.read_text().splitlines()
    return [i for i, line in enumerate(lines, 1) if re.search(r"__sync(warp|threads)\(\);", line)]


def test_every_missing_barrier_is_noticed(emulator: Emulator, launchers: Launchers) -> None:
    inputs = make_inputs(5, 520, torch.bfloat16)
    right = rank_bucket_grad(launchers, inputs, 100)
    assert synchronisations()
    for line in synchronisations():
        noticed = []
        for schedule in SCHEDULES:
            with emulator.using(schedule), emulator.without(line):
                noticed.append(not torch.equal(rank_bucket_grad(launchers, inputs, 100), right))
        assert any(noticed), f"{SOURCE.name}, line {line}: left out, and no schedule shows it"


@pytest.mark.parametrize(
    ("which", "function"),
    [
        ("grad", "grad"),
        ("weight", "grad"),
        ("rank", "grad"),
        ("weight", "mask"),
        ("rank", "mask"),
        ("threshold", "mask"),
    ],
)
def test_reading_past_the_end_of_any_input_is_noticed(launchers: Launchers, which: str, function: str) -> None:
    inputs = make_inputs(5, 520, torch.bfloat16)
    short = {**inputs, which: inputs[which][:-1]}
    with pytest.raises(RuntimeError, match=r"out of bounds access: a buffer of \d+ bytes.*block .*thread"):
        if function == "grad":
            rank_bucket_grad(launchers, short, 100, inputs["weight"].shape)
        else:
            rank_mask(launchers, short, inputs["weight"].shape)
