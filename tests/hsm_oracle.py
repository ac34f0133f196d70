"""What the tests of the `hsm` ops measure against: the reference in fp64, and the reference in the dtype under test."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune import ops

# (T, d, r, n): single elements, sizes around 32, n < d, no token, more rank than outputs, several tiles of rows.
SHAPES = [
    (1, 1, 1, 1),
    (31, 33, 5, 33),
    (33, 31, 31, 7),
    (0, 16, 4, 16),
    (7, 64, 1, 64),
    (64, 128, 8, 96),
    (127, 257, 13, 129),
    (200, 96, 40, 8),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


@dataclass
class Case:
    """Inputs of both ops and the gradients that arrive, all leaves of one dtype (v and mask in fp32 or fp64)."""

    x: Tensor
    l0: Tensor
    v: Tensor
    l1: Tensor
    mask: Tensor
    residual: Tensor
    weight: Tensor
    grad_y: Tensor
    grad_normed: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype; statistics stay fp32 unless it is fp64."""
        statistics = torch.float64 if dtype == torch.float64 else torch.float32
        return Case(**{k: t.to(statistics if k in ("v", "mask") else dtype) for k, t in vars(self).items()})


def make_case(tokens: int, hidden: int, rank: int, outputs: int, dtype: torch.dtype, device: str = "cpu") -> Case:
    """Random inputs of unit scale: products of the mixing matrices are about as large as x."""

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) * scale).to(device)

    case = Case(
        x=normal(tokens, hidden),
        l0=normal(rank, hidden, scale=hidden**-0.5),
        v=normal(rank),
        l1=normal(outputs, rank, scale=rank**-0.5),
        mask=normal(outputs),
        residual=normal(tokens, outputs),
        weight=normal(outputs),
        grad_y=normal(tokens, outputs),
        grad_normed=normal(tokens, outputs),
    )
    return case.to(dtype)


def run_hsm(case: Case) -> dict[str, Tensor]:
    """Output of `hsm` and the gradients of its five inputs."""
    leaves = {name: getattr(case, name).clone().requires_grad_() for name in ("x", "l0", "v", "l1", "mask")}
    y = ops.hsm(**leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), case.grad_y)
    return {"y": y.detach(), **{f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def run_hsm_residual_rmsnorm(case: Case) -> dict[str, Tensor]:
    """Outputs of `hsm_residual_rmsnorm` and the gradients of its seven inputs."""
    names = ("x", "l0", "v", "l1", "mask", "residual", "weight")
    leaves = {name: getattr(case, name).clone().requires_grad_() for name in names}
    residual_out, normed = ops.hsm_residual_rmsnorm(**leaves, eps=EPS)
    gradients = torch.autograd.grad([residual_out, normed], list(leaves.values()), [case.grad_y, case.grad_normed])
    results = {"residual_out": residual_out.detach(), "normed": normed.detach()}
    return {**results, **{f"grad_{name}": g for name, g in zip(names, gradients, strict=True)}}


RUNS = {"hsm": run_hsm, "hsm_residual_rmsnorm": run_hsm_residual_rmsnorm}


def assert_as_exact_as_torch(op: str, case: Case) -> None:
    """Every result is at most twice as far from fp64 as the same maths in plain torch at the case's dtype.

    The allowance on top is in units of the last place of the largest result, or of 1 where that is smaller: 1 is the
    scale of the terms that are summed. It is one unit for 16-bit dtypes, because at a single element the plain version
    may be exact by luck, and four for fp32, because there the order of summation is the error: the kernels sum the
    gradients of mask and v over tokens first, through numbers that are sqrt(T) larger.
    """
    results = RUNS[op](case)
    with ops.using("reference"):
        plain = RUNS[op](case)
        exact = RUNS[op](case.to(torch.float64))
    for name, result in results.items():
        assert result.shape == exact[name].shape, name
        assert result.dtype == plain[name].dtype, name
        assert result.device == plain[name].device, name
        if result.numel() == 0:
            continue
        units = 4 if case.x.dtype == torch.float32 else 1
        allowance = units * torch.finfo(case.x.dtype).eps * max(1.0, exact[name].abs().max().item())
        error = (result.double() - exact[name]).abs().max().item()
        plain_error = (plain[name].double() - exact[name]).abs().max().item()
        assert error <= 2 * plain_error + allowance, f"{name}: {error:.3e}, plain torch {plain_error:.3e}"
