"""csrc/rank.cu on the emulator: right numbers in every schedule, the barrier needed and noticed, nothing read past."""

from __future__ import annotations

import re

import pytest
import torch
from emulator import EAGER_GREEDY, LAZY, ROOT, SCHEDULES, Emulator, Schedule
from torch import Tensor

from pyprune import ops
from pyprune._cpu.common import DTYPE_CODES

SOURCE = ROOT / "csrc/rank.cu"
DTYPES = list(DTYPE_CODES)
# One weight, rows shorter than a piece, several blocks of rows and pieces, aligned and not, rows longer than a warp.
SHAPES = [(1, 1), (3, 7), (33, 264), (5, 300), (9, 1040)]


def make_inputs(rows: int, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    threshold = torch.randint(0, columns + 1, (rows,), dtype=torch.int32)
    return {
        "grad": torch.randn(rows, columns).to(dtype),
        "weight": torch.randn(rows, columns).to(dtype),
        "rank": torch.rand(rows, columns).argsort(1).to(torch.uint16),
        "threshold": threshold,
    }


def rank_mask(emulator: Emulator, inputs: dict[str, Tensor], shape: torch.Size | None = None) -> Tensor:
    """`shape`: what the launcher is told, when an input is cut short."""
    tensors = [emulator.copy(inputs[name]) for name in ("weight", "rank", "threshold")]
    shape = shape or inputs["weight"].shape
    out = emulator.empty(*shape, dtype=tensors[0].dtype)
    emulator.cuda.rank_mask(DTYPE_CODES[out.dtype], *shape, *(t.data_ptr() for t in (*tensors, out)), 0)
    return out.clone()


def rank_bucket_grad(
    emulator: Emulator, inputs: dict[str, Tensor], steps: int, shape: torch.Size | None = None
) -> Tensor:
    tensors = [emulator.copy(inputs[name]) for name in ("grad", "weight", "rank")]
    shape = shape or inputs["weight"].shape
    out = emulator.empty(shape[0], steps + 1, dtype=torch.float32)
    addresses = [tensor.data_ptr() for tensor in (*tensors, out)]
    emulator.cuda.rank_bucket_grad(DTYPE_CODES[tensors[0].dtype], *shape, steps, *addresses, 0)
    return out.clone()


def check_gradient(inputs: dict[str, Tensor], steps: int, result: Tensor) -> None:
    """Against fp64; the allowance is one rounding of each partial sum."""
    grad, weight = inputs["grad"].double(), inputs["weight"].double()
    exact = ops.rank_bucket_grad(grad, weight, inputs["rank"], steps)
    assert ((result - exact).abs() <= 2**-23 * (grad * weight).abs().sum(1, keepdim=True)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("schedule", [LAZY, EAGER_GREEDY], ids=str)
def test_agrees_with_fp64(emulator: Emulator, schedule: Schedule, shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = make_inputs(*shape, dtype)
    with emulator.using(schedule):
        masked = rank_mask(emulator, inputs)
        gradients = {steps: rank_bucket_grad(emulator, inputs, steps) for steps in (1, 100)}
    with ops.using("reference"):
        assert torch.equal(masked, ops.rank_mask(inputs["weight"], inputs["rank"], inputs["threshold"]))
    for steps, result in gradients.items():
        check_gradient(inputs, steps, result)


def test_the_most_steps_and_nothing_before_the_start(emulator: Emulator) -> None:
    """At 255 steps a block has one row; buffers start at a protected page."""
    emulator.at_end = False
    inputs = make_inputs(3, 520, torch.bfloat16)
    check_gradient(inputs, 255, rank_bucket_grad(emulator, inputs, 255))
    with ops.using("reference"):
        assert torch.equal(
            rank_mask(emulator, inputs), ops.rank_mask(inputs["weight"], inputs["rank"], inputs["threshold"])
        )


def test_no_rows(emulator: Emulator) -> None:
    inputs = make_inputs(0, 8, torch.float16)
    assert rank_mask(emulator, inputs).shape == (0, 8)
    assert rank_bucket_grad(emulator, inputs, 100).shape == (0, 101)


def test_bitwise_the_same_in_every_schedule(emulator: Emulator) -> None:
    inputs = make_inputs(9, 520, torch.bfloat16)
    first = rank_bucket_grad(emulator, inputs, 100)
    for schedule in SCHEDULES:
        with emulator.using(schedule):
            assert torch.equal(rank_bucket_grad(emulator, inputs, 100), first), schedule


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


def test_every_missing_barrier_is_noticed(emulator: Emulator) -> None:
    inputs = make_inputs(5, 520, torch.bfloat16)
    right = rank_bucket_grad(emulator, inputs, 100)
    assert synchronisations()
    for line in synchronisations():
        noticed = []
        for schedule in SCHEDULES:
            with emulator.using(schedule), emulator.without(line):
                noticed.append(not torch.equal(rank_bucket_grad(emulator, inputs, 100), right))
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
def test_reading_past_the_end_of_any_input_is_noticed(emulator: Emulator, which: str, function: str) -> None:
    inputs = make_inputs(5, 520, torch.bfloat16)
    short = {**inputs, which: inputs[which][:-1]}
    with pytest.raises(RuntimeError, match=r"out of bounds access: a buffer of \d+ bytes.*block .*thread"):
        if function == "grad":
            rank_bucket_grad(emulator, short, 100, inputs["weight"].shape)
        else:
            rank_mask(emulator, short, inputs["weight"].shape)
