"""SparseGPT's solve on the launcher of csrc/sparsegpt.h: inputs, calls, tolerances. On the emulator and on a device."""

from __future__ import annotations

from typing import Any

import torch
from hsm_checks import Launchers
from sparse_checks import addresses, poisoned
from torch import Tensor

from pyprune import ops

# One row, a block of rows and one more, slabs of every number of parts, the last one cut short.
SHAPES = [(1, 8, 8), (9, 72, 40), (17, 264, 128), (3, 200, 200)]
PATTERNS: dict[str, dict[str, Any]] = {
    "layer": {},
    "row": {"per_row": True},
    "2:4": {"n": 2, "m": 4},
    "5:40": {"n": 5, "m": 40},
}
CASES = [
    (shape, pattern)
    for shape in SHAPES
    for pattern, options in PATTERNS.items()
    if shape[1] % options.get("m", 1) == 0 and shape[2] % options.get("m", 1) == 0
]

Solved = tuple[Tensor, Tensor, Tensor]


def make_factor(columns: int, device: str = "cpu") -> Tensor:
    x = torch.randn(3 * columns, columns, dtype=torch.float64, device=device)
    x *= torch.rand(columns, dtype=torch.float64, device=device) + 0.1
    hessian = x.T @ x / columns
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True).float()
    return factor.masked_fill(torch.ones_like(factor, dtype=torch.bool).tril(-1), float("nan"))  # not to be read


def solve(weight: Tensor, factor: Tensor, block: int, grid: bool, **pattern: Any) -> Solved:
    rows, columns = weight.shape
    drop = int(0.6 * columns) * rows if pattern.get("per_row") else int(0.6 * weight.numel())
    if grid:
        scale = torch.linspace(0.2, 1.2, rows * columns // 8).view(rows, -1).to(weight)
        pattern |= {"scale": scale, "zero": torch.full_like(scale, 7), "levels": 15}
    return ops.sparsegpt_solve(weight, factor, drop, block=block, **pattern)


def check(weight: Tensor, factor: Tensor, result: Solved, arguments: dict[str, Any]) -> None:
    """As in tests/ops/test_sparsegpt_solve.py: masks agree, weights are as exact as plain fp32; with rounding, the
    loss."""
    solved, bits, loss = result
    with ops.using("reference"):
        exact, exact_bits, exact_loss = solve(weight.double(), factor.double(), **arguments)
        plain, _, _ = solve(weight, factor, **arguments)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-3 if arguments["grid"] else 1e-5, atol=0)
    if not arguments["grid"]:
        assert torch.equal(bits, exact_bits)
        allowed = 2 * (plain - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert (solved - exact).abs().max() <= allowed


def make_slab(rows: int, columns: int) -> dict[str, Tensor]:
    scale = torch.rand(rows, columns // 8) + 0.2
    return {
        "work": torch.randn(rows, columns),
        "upper": make_factor(columns),
        "keep": (torch.rand(rows, columns) < 0.5).to(torch.uint8),
        "scale": scale,
        "zero": torch.full_like(scale, 7),
    }


def slab(launchers: Launchers, tensors: dict[str, Tensor], rows: int, columns: int, n: int, m: int) -> list[Tensor]:
    """The launcher itself, the whole matrix one slab: the weight, the mask and the errors."""
    copies = {name: launchers.copy(tensor) for name, tensor in tensors.items()}
    errors = poisoned(launchers, rows, columns, dtype=torch.float32)
    work, upper, keep, scale, zero = addresses(*(copies[name] for name in ("work", "upper", "keep", "scale", "zero")))
    shape, outputs = (rows, columns, 0, columns, n, m), (15.0, errors.data_ptr(), launchers.stream())
    launchers.cuda.sparsegpt_slab(*shape, work, upper, keep, columns // 8, scale, zero, *outputs)
    return [tensor.cpu().clone() for tensor in (copies["work"], copies["keep"], errors)]
