"""`sparsegpt_solve` on the CPU kernels against the reference in fp64, which tests/methods/test_sparsegpt.py holds
against elimination with inverted Hessians."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pyprune import _native, ops
from pyprune.reference.bits import unpack_bits

ISAS = _native.cpu.isas() if _native.cpu else ()
needs_kernels = pytest.mark.skipif(_native.cpu is None, reason=f"no compiled module: {_native.why_missing}")
# Fewer rows than lanes, a row over, slabs cut short, slabs wider than a kernel takes.
SHAPES = [(1, 8, 8), (17, 96, 40), (33, 264, 128), (5, 304, 304)]
PATTERNS: dict[str, dict[str, Any]] = {
    "layer": {},
    "row": {"per_row": True},
    "2:4": {"n": 2, "m": 4},
    "5:8": {"n": 5, "m": 8},
}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set this machine runs."""
    before = _native.cpu.isa()
    _native.cpu.set_isa(request.param)
    yield request.param
    _native.cpu.set_isa(before)


def make_factor(columns: int) -> Tensor:
    """U of correlated inputs of unequal size, rounded to fp32."""
    x = torch.randn(3 * columns, columns, dtype=torch.float64) * (torch.rand(columns, dtype=torch.float64) + 0.1)
    x[:, 1:] += 0.5 * x[:, :-1]
    hessian = x.T @ x / columns
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    factor = factor.float()
    factor[torch.ones_like(factor, dtype=torch.bool).tril(-1)] = float("nan")  # not to be read
    return factor


def solve(weight: Tensor, factor: Tensor, block: int, grid: bool, **pattern: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = weight.shape
    drop = int(0.6 * columns) * rows if pattern.get("per_row") else int(0.6 * weight.numel())
    if grid:
        generator = torch.Generator().manual_seed(1)
        scale = torch.rand(rows, columns // 8, generator=generator).to(weight.dtype) + 0.2
        pattern |= {"scale": scale, "zero": torch.full_like(scale, 7), "levels": 15}
    return ops.sparsegpt_solve(weight, factor, drop, block=block, **pattern)


@needs_kernels
@pytest.mark.parametrize("grid", [False, True], ids=["", "rounded"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_fp64(shape: tuple[int, int, int], pattern: str, grid: bool, isa: str) -> None:
    """Masks agree; solved weights are as exact as the reference in fp32, within a factor of two and a few roundings.

    A weight that is rounded to the grid may fall on the other side of a code: then, and in what follows it in its row,
    fp32 is another solution, so with a grid the loss is compared, and the kept weights must be on the grid."""
    rows, columns, block = shape
    weight, factor = torch.randn(rows, columns), make_factor(columns)
    arguments = {"block": block, "grid": grid, **PATTERNS[pattern]}
    solved, bits, loss = solve(weight, factor, **arguments)
    exact, exact_bits, exact_loss = solve(weight.double(), factor.double(), **arguments)
    with ops.using("reference"):
        plain, _, _ = solve(weight, factor, **arguments)
    assert (solved[~unpack_bits(bits, columns)] == 0).all()
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-3 if grid else 1e-5, atol=0)
    if grid:
        assert (unpack_bits(bits, columns).sum(1) == unpack_bits(exact_bits, columns).sum(1)).float().mean() > 0.5
        return
    assert torch.equal(bits, exact_bits)
    allowed = 2 * (plain - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (solved - exact).abs().max() <= allowed


@needs_kernels
@pytest.mark.parametrize("pattern", PATTERNS)
def test_bitwise_the_same_for_any_number_of_threads(pattern: str) -> None:
    weight, factor = torch.randn(50, 96), make_factor(96)
    first = solve(weight, factor, block=32, grid=True, **PATTERNS[pattern])
    try:
        torch.set_num_threads(3)
        again = solve(weight, factor, block=32, grid=True, **PATTERNS[pattern])
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@needs_kernels
def test_ties_go_by_index() -> None:
    """Equal scores: N:M keeps the lower index, a slab drops the first ones row by row."""
    weight, factor = torch.ones(3, 8), torch.eye(8)
    _, bits, _ = ops.sparsegpt_solve(weight, factor, 0, n=2, m=4)
    assert unpack_bits(bits, 8).int().tolist() == [[1, 1, 0, 0] * 2] * 3
    _, bits, _ = ops.sparsegpt_solve(weight, factor, 12)
    assert unpack_bits(bits, 8).int().tolist() == [[0] * 8, [0] * 4 + [1] * 4, [1] * 8]


@needs_kernels
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("drop", [0, 1, 300, 511, 512])
def test_selection_is_exact(drop: int, threads: int, isa: str) -> None:
    """Of scores with many ties, an infinity and zeros: those that a stable sort puts first, row by row."""
    weight = torch.randint(-3, 4, (16, 32)).float() / 3
    weight[2, 3], weight[5, :4] = float("inf"), torch.tensor([1e-30, -1e-30, 1e30, -0.0])
    order = weight.square().flatten().argsort(stable=True)
    expected = torch.ones(512, dtype=torch.bool).index_fill_(0, order[:drop], False).view(16, 32)
    keep, factor = torch.zeros(16, 32, dtype=torch.bool), torch.eye(32)
    addresses = (weight.data_ptr(), factor.data_ptr(), keep.data_ptr())
    _native.cpu.sparsegpt_select(16, 32, 0, 32, *addresses, drop, threads)
    assert torch.equal(keep, expected)


@pytest.mark.parametrize("implementation", ["chosen", "reference"])
def test_opcheck(implementation: str) -> None:
    weight, factor, scale = torch.randn(4, 16), make_factor(16), torch.ones(4, 2)
    chosen, _ = ops.choose("sparsegpt_solve", weight.device, weight.dtype)
    with ops.using(chosen if implementation == "chosen" else "reference"):
        for arguments in ((None, None, 20, 0, 0, False, 8, 0), (scale, scale, 0, 2, 4, False, 8, 15)):
            torch.library.opcheck(torch.ops.pyprune.sparsegpt_solve.default, (weight, factor, *arguments))


WEIGHT, FACTOR, GRID = torch.ones(4, 8), torch.eye(8), torch.ones(4, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.sparsegpt_solve(WEIGHT.half(), FACTOR, 4), "weight is torch.float16, expected torch.float32"),
        (lambda: ops.sparsegpt_solve(WEIGHT, FACTOR.double(), 4), "hinv_upper is torch.float64"),
        (lambda: ops.sparsegpt_solve(WEIGHT, FACTOR[:4], 4), r"hinv_upper has shape \[4, 8\], expected \[8, 8\]"),
        (lambda: ops.sparsegpt_solve(WEIGHT, FACTOR, 33), "drop is 33, expected 0 to 32"),
        (lambda: ops.sparsegpt_solve(WEIGHT, FACTOR, 6, per_row=True), "expected a multiple of the 4 rows"),
        (lambda: ops.sparsegpt_solve(WEIGHT, FACTOR, 0, n=2, m=3), "n is 2 and m 3"),
        (lambda: ops.sparsegpt_solve(WEIGHT, FACTOR, 4, scale=GRID), "scale and zero go together"),
        (lambda: ops.sparsegpt_solve(WEIGHT, FACTOR, 4, scale=GRID, zero=GRID[:2], levels=3), "zero has shape"),
        (lambda: ops.sparsegpt_solve(WEIGHT, FACTOR, 4, scale=GRID, zero=GRID), "levels is 0"),
        (lambda: ops.sparsegpt_solve(WEIGHT, FACTOR, 4, block=0), "block is 0"),
    ],
)
def test_errors_name_the_argument(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()
