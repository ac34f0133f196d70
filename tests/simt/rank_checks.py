"""The launchers of csrc/rank.h on tensors: inputs, calls, tolerance. Used on the emulator and on a device."""

from __future__ import annotations

import torch
from hsm_checks import DTYPE_CODES, DTYPES, Launchers
from sparse_checks import addresses, poisoned
from torch import Tensor

from pyprune import ops

__all__ = ["DTYPES", "SHAPES", "Launchers"]

# One weight, rows shorter than a piece, several blocks of rows and pieces, aligned and not, rows longer than a warp.
SHAPES = [(1, 1), (3, 7), (33, 264), (5, 300), (9, 1040)]


def make_inputs(rows: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    return {
        "grad": torch.randn(rows, columns, device=device).to(dtype),
        "weight": torch.randn(rows, columns, device=device).to(dtype),
        "rank": torch.rand(rows, columns, device=device).argsort(1).to(torch.uint16),
        "threshold": torch.randint(0, columns + 1, (rows,), dtype=torch.int32, device=device),
    }


def rank_mask(launchers: Launchers, inputs: dict[str, Tensor], shape: torch.Size | None = None) -> Tensor:
    """`shape`: what the launcher is told, when an input is cut short."""
    tensors = [launchers.copy(inputs[name]) for name in ("weight", "rank", "threshold")]
    shape = shape or inputs["weight"].shape
    out = poisoned(launchers, *shape, dtype=tensors[0].dtype)
    launchers.cuda.rank_mask(DTYPE_CODES[out.dtype], *shape, *addresses(*tensors, out), launchers.stream())
    return out.cpu().clone()


def rank_bucket_grad(
    launchers: Launchers, inputs: dict[str, Tensor], steps: int, shape: torch.Size | None = None
) -> Tensor:
    tensors = [launchers.copy(inputs[name]) for name in ("grad", "weight", "rank")]
    shape = shape or inputs["weight"].shape
    out = poisoned(launchers, shape[0], steps + 1, dtype=torch.float32)
    code = DTYPE_CODES[tensors[0].dtype]
    launchers.cuda.rank_bucket_grad(code, *shape, steps, *addresses(*tensors, out), launchers.stream())
    return out.cpu().clone()


def check_mask(inputs: dict[str, Tensor], result: Tensor) -> None:
    with ops.using("reference"):
        right = ops.rank_mask(inputs["weight"], inputs["rank"], inputs["threshold"])
    assert torch.equal(result, right)


def check_gradient(inputs: dict[str, Tensor], steps: int, result: Tensor) -> None:
    """Against fp64; the allowance is one rounding of each partial sum."""
    grad, weight = inputs["grad"].double(), inputs["weight"].double()
    exact = ops.rank_bucket_grad(grad, weight, inputs["rank"], steps)
    assert ((result - exact).abs() <= 2**-23 * (grad * weight).abs().sum(1, keepdim=True)).all()
