"""csrc/sparsegpt.cu on the emulator: right numbers in every schedule, the barrier noticed, nothing read past."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulator import EAGER_GREEDY, LAZY, ROOT, SCHEDULES, Emulator, Schedule, line_of
from torch import Tensor

from pyprune import ops
from pyprune._cuda import CudaKernels

SOURCE = ROOT / "csrc/sparsegpt.cu"
# One row, a block of rows and one more, slabs of every number of parts, the last one cut short.
SHAPES = [(1, 8, 8), (9, 72, 40), (17, 264, 128), (3, 200, 200)]
PATTERNS: dict[str, dict[str, Any]] = {
    "layer": {},
    "row": {"per_row": True},
    "2:4": {"n": 2, "m": 4},
    "5:40": {"n": 5, "m": 40},
}


def make_factor(columns: int) -> Tensor:
    x = torch.randn(3 * columns, columns, dtype=torch.float64) * (torch.rand(columns, dtype=torch.float64) + 0.1)
    hessian = x.T @ x / columns
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True).float()
    return factor.masked_fill(torch.ones_like(factor, dtype=torch.bool).tril(-1), float("nan"))  # not to be read


def solve(weight: Tensor, factor: Tensor, block: int, grid: bool, **pattern: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = weight.shape
    drop = int(0.6 * columns) * rows if pattern.get("per_row") else int(0.6 * weight.numel())
    if grid:
        scale = torch.linspace(0.2, 1.2, rows * columns // 8).view(rows, -1).to(weight.dtype)
        pattern |= {"scale": scale, "zero": torch.full_like(scale, 7), "levels": 15}
    return ops.sparsegpt_solve(weight, factor, drop, block=block, **pattern)


def fits(shape: tuple[int, int, int], pattern: str) -> bool:
    m = PATTERNS[pattern].get("m", 1)
    return shape[1] % m == 0 and shape[2] % m == 0


@pytest.mark.parametrize("grid", [False, True], ids=["", "rounded"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("schedule", [LAZY, EAGER_GREEDY], ids=str)
def test_agrees_with_fp64(
    emulator: Emulator, schedule: Schedule, shape: tuple[int, int, int], pattern: str, grid: bool
) -> None:
    """As in tests/ops/test_sparsegpt.py: masks agree, weights are as exact as plain fp32; with rounding, the loss."""
    if not fits(shape, pattern):
        pytest.skip("groups do not divide this shape")
    rows, columns, block = shape
    weight, factor = torch.randn(rows, columns), make_factor(columns)
    arguments = {"block": block, "grid": grid, **PATTERNS[pattern]}
    with emulator.using(schedule), ops.using(CudaKernels(emulator.cuda, stream=lambda device: 0)):
        solved, bits, loss = solve(weight, factor, **arguments)
    with ops.using("reference"):
        exact, exact_bits, exact_loss = solve(weight.double(), factor.double(), **arguments)
        plain, _, _ = solve(weight, factor, **arguments)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-3 if grid else 1e-5, atol=0)
    if not grid:
        assert torch.equal(bits, exact_bits)
        allowed = 2 * (plain - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert (solved - exact).abs().max() <= allowed


def slab(emulator: Emulator, tensors: dict[str, Tensor], rows: int, columns: int, n: int, m: int) -> list[Tensor]:
    """The launcher itself on guarded memory, the whole matrix one slab."""
    copies = {name: emulator.copy(tensor) for name, tensor in tensors.items()}
    errors = emulator.empty(rows, columns, dtype=torch.float32)
    work, upper, keep, scale, zero = (copies[name].data_ptr() for name in ("work", "upper", "keep", "scale", "zero"))
    shape = (rows, columns, 0, columns, n, m)
    emulator.cuda.sparsegpt_slab(*shape, work, upper, keep, columns // 8, scale, zero, 15.0, errors.data_ptr(), 0)
    return [copies["work"].clone(), copies["keep"].clone(), errors.clone()]


def make_slab(rows: int, columns: int) -> dict[str, Tensor]:
    scale = torch.rand(rows, columns // 8) + 0.2
    return {
        "work": torch.randn(rows, columns),
        "upper": make_factor(columns),
        "keep": (torch.rand(rows, columns) < 0.5).to(torch.uint8),
        "scale": scale,
        "zero": torch.full_like(scale, 7),
    }


@pytest.mark.parametrize(("n", "m"), [(0, 0), (2, 4)])
def test_bitwise_the_same_in_every_schedule(emulator: Emulator, n: int, m: int) -> None:
    tensors = make_slab(9, 104)
    first = slab(emulator, tensors, 9, 104, n, m)
    for schedule in SCHEDULES:
        with emulator.using(schedule):
            again = slab(emulator, tensors, 9, 104, n, m)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), schedule


def test_the_missing_barrier_is_noticed(emulator: Emulator) -> None:
    tensors = make_slab(9, 104)
    right = slab(emulator, tensors, 9, 104, 0, 0)
    noticed = []
    for schedule in SCHEDULES:
        with emulator.using(schedule), emulator.without(line_of(SOURCE, "__syncthreads();")):
            wrong = slab(emulator, tensors, 9, 104, 0, 0)
        noticed.append(any(not torch.equal(a, b) for a, b in zip(right, wrong, strict=True)))
    assert any(noticed)


@pytest.mark.parametrize("which", ["work", "upper", "keep", "scale", "zero"])
def test_reading_past_the_end_of_any_input_is_noticed(emulator: Emulator, which: str) -> None:
    tensors = make_slab(9, 104)
    tensors[which] = tensors[which][:-1]
    with pytest.raises(RuntimeError, match=r"out of bounds access: a buffer of \d+ bytes.*block .*thread"):
        slab(emulator, tensors, 9, 104, 0, 0)


def test_nothing_before_the_start_is_touched(emulator: Emulator) -> None:
    tensors = make_slab(9, 104)
    first = slab(emulator, tensors, 9, 104, 2, 4)
    emulator.at_end = False
    again = slab(emulator, tensors, 9, 104, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_slab_that_is_too_wide_is_refused(emulator: Emulator) -> None:
    with pytest.raises(ValueError, match="width must be 1 to 128"):
        emulator.cuda.sparsegpt_slab(1, 256, 0, 129, 0, 0, 0, 0, 0, 1, 0, 0, 0.0, 0, 0)
