"""PAT's hybrid sparsification module (HSM), alone and fused with residual addition and RMSNorm.

Notation: T tokens, d hidden size, r rank, n <= d outputs. The public functions take [..., d] and flatten it to [T, d].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyprune._ops.dispatch import define, expect_float, expect_like, expect_shape, only, run, wanted_like

# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of v, mask and rstd beside an x of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(op: str, x: Tensor, l0: Tensor, v: Tensor, l1: Tensor, mask: Tensor) -> None:
    """What holds for every op: dtypes, devices, and the shapes x [T,d], l0 [r,d], v [r], l1 [n,r], mask [n]."""
    expect_float(op, "x", x)
    expect_like(op, x, x.dtype, l0=l0, l1=l1)
    expect_like(op, x, _statistics_dtype(x.dtype), v=v, mask=mask)
    for name, tensor in {"x": x, "l0": l0, "l1": l1}.items():
        if tensor.dim() != 2 or (name != "x" and 0 in tensor.shape):
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected two dimensions, none of them 0")
    hidden, rank, outputs = x.shape[1], l0.shape[0], l1.shape[0]
    expect_shape(op, "l0", l0, rank, hidden)
    expect_shape(op, "v", v, rank)
    expect_shape(op, "l1", l1, outputs, rank)
    expect_shape(op, "mask", mask, outputs)
    if outputs > hidden:
        raise ValueError(f"{op}: l1 has {outputs} rows, more than the {hidden} columns of x")


def _check_hsm_backward(grad_y: Tensor, x: Tensor, h: Tensor, l0: Tensor, v: Tensor, l1: Tensor, mask: Tensor) -> None:
    op = "hsm_backward"
    _check(op, x, l0, v, l1, mask)
    expect_like(op, x, x.dtype, grad_y=grad_y, h=h)
    expect_shape(op, "grad_y", grad_y, x.shape[0], l1.shape[0])
    expect_shape(op, "h", h, x.shape[0], l0.shape[0])


def _check_hsm_residual_rmsnorm(
    x: Tensor, l0: Tensor, v: Tensor, l1: Tensor, mask: Tensor, residual: Tensor, weight: Tensor
) -> None:
    op = "hsm_residual_rmsnorm"
    _check(op, x, l0, v, l1, mask)
    expect_like(op, x, x.dtype, residual=residual, weight=weight)
    expect_shape(op, "residual", residual, x.shape[0], l1.shape[0])
    expect_shape(op, "weight", weight, l1.shape[0])


def _check_hsm_residual_rmsnorm_backward(
    grad_residual_out: Tensor,
    grad_normed: Tensor,
    x: Tensor,
    h: Tensor,
    residual_out: Tensor,
    rstd: Tensor,
    l0: Tensor,
    v: Tensor,
    l1: Tensor,
    mask: Tensor,
    weight: Tensor,
) -> None:
    op = "hsm_residual_rmsnorm_backward"
    _check(op, x, l0, v, l1, mask)
    rows = {"grad_residual_out": grad_residual_out, "grad_normed": grad_normed, "residual_out": residual_out}
    expect_like(op, x, x.dtype, **rows, h=h, weight=weight)
    expect_like(op, x, _statistics_dtype(x.dtype), rstd=rstd)
    for name, tensor in rows.items():
        expect_shape(op, name, tensor, x.shape[0], l1.shape[0])
    expect_shape(op, "h", h, x.shape[0], l0.shape[0])
    expect_shape(op, "rstd", rstd, x.shape[0])
    expect_shape(op, "weight", weight, l1.shape[0])


# ---------------------------------------------------------------------------------------------------------------------
# The ops and their fake kernels


def _hsm(x: Tensor, l0: Tensor, v: Tensor, l1: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    _check("hsm", x, l0, v, l1, mask)
    return run("hsm", x, (x, l0, v, l1, mask))


def _hsm_fake(x: Tensor, l0: Tensor, v: Tensor, l1: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    _check("hsm", x, l0, v, l1, mask)
    return x.new_empty(x.shape[0], l1.shape[0]), x.new_empty(x.shape[0], l0.shape[0])


def _hsm_backward(
    grad_y: Tensor,
    x: Tensor,
    h: Tensor,
    l0: Tensor,
    v: Tensor,
    l1: Tensor,
    mask: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    tensors = (grad_y, x, h, l0, v, l1, mask)
    _check_hsm_backward(*tensors)
    return run("hsm_backward", x, tensors, output_mask)


def _hsm_backward_fake(
    grad_y: Tensor,
    x: Tensor,
    h: Tensor,
    l0: Tensor,
    v: Tensor,
    l1: Tensor,
    mask: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    _check_hsm_backward(grad_y, x, h, l0, v, l1, mask)
    return wanted_like((x, l0, v, l1, mask), output_mask)


def _hsm_residual_rmsnorm(
    x: Tensor, l0: Tensor, v: Tensor, l1: Tensor, mask: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, ...]:
    tensors = (x, l0, v, l1, mask, residual, weight)
    _check_hsm_residual_rmsnorm(*tensors)
    return run("hsm_residual_rmsnorm", x, tensors, eps)


def _hsm_residual_rmsnorm_fake(
    x: Tensor, l0: Tensor, v: Tensor, l1: Tensor, mask: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, ...]:
    _check_hsm_residual_rmsnorm(x, l0, v, l1, mask, residual, weight)
    rows = (x.shape[0], l1.shape[0])
    return x.new_empty(rows), x.new_empty(rows), x.new_empty(x.shape[0], l0.shape[0]), v.new_empty(x.shape[0])


def _hsm_residual_rmsnorm_backward(
    grad_residual_out: Tensor,
    grad_normed: Tensor,
    x: Tensor,
    h: Tensor,
    residual_out: Tensor,
    rstd: Tensor,
    l0: Tensor,
    v: Tensor,
    l1: Tensor,
    mask: Tensor,
    weight: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    tensors = (grad_residual_out, grad_normed, x, h, residual_out, rstd, l0, v, l1, mask, weight)
    _check_hsm_residual_rmsnorm_backward(*tensors)
    return run("hsm_residual_rmsnorm_backward", x, tensors, output_mask)


def _hsm_residual_rmsnorm_backward_fake(
    grad_residual_out: Tensor,
    grad_normed: Tensor,
    x: Tensor,
    h: Tensor,
    residual_out: Tensor,
    rstd: Tensor,
    l0: Tensor,
    v: Tensor,
    l1: Tensor,
    mask: Tensor,
    weight: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    _check_hsm_residual_rmsnorm_backward(
        grad_residual_out, grad_normed, x, h, residual_out, rstd, l0, v, l1, mask, weight
    )
    return wanted_like((x, residual_out, l0, v, l1, mask, weight), output_mask)


define("hsm(Tensor x, Tensor l0, Tensor v, Tensor l1, Tensor mask) -> (Tensor y, Tensor h)", _hsm, _hsm_fake)
define(
    "hsm_backward(Tensor grad_y, Tensor x, Tensor h, Tensor l0, Tensor v, Tensor l1, Tensor mask, bool[5] output_mask)"
    " -> (Tensor grad_x, Tensor grad_l0, Tensor grad_v, Tensor grad_l1, Tensor grad_mask)",
    _hsm_backward,
    _hsm_backward_fake,
)
define(
    "hsm_residual_rmsnorm(Tensor x, Tensor l0, Tensor v, Tensor l1, Tensor mask, Tensor residual, Tensor weight,"
    " float eps) -> (Tensor residual_out, Tensor normed, Tensor h, Tensor rstd)",
    _hsm_residual_rmsnorm,
    _hsm_residual_rmsnorm_fake,
)
define(
    "hsm_residual_rmsnorm_backward(Tensor grad_residual_out, Tensor grad_normed, Tensor x, Tensor h,"
    " Tensor residual_out, Tensor rstd, Tensor l0, Tensor v, Tensor l1, Tensor mask, Tensor weight,"
    " bool[7] output_mask) -> (Tensor grad_x, Tensor grad_residual, Tensor grad_l0, Tensor grad_v, Tensor grad_l1,"
    " Tensor grad_mask, Tensor grad_weight)",
    _hsm_residual_rmsnorm_backward,
    _hsm_residual_rmsnorm_backward_fake,
)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients. `forward` fills its context itself: with a `setup_context` torch binds the arguments to the signature at
# every call, which takes longer than all else that a call does on the host.


class _Hsm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, l0: Tensor, v: Tensor, l1: Tensor, mask: Tensor) -> Tensor:
        y, h = torch.ops.pyprune.hsm(x, l0, v, l1, mask)
        ctx.save_for_backward(x, h, l0, v, l1, mask)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad)
        gradients = torch.ops.pyprune.hsm_backward(grad_y, *ctx.saved_tensors, wanted)
        return only(wanted, gradients)


class _HsmResidualRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        l0: Tensor,
        v: Tensor,
        l1: Tensor,
        mask: Tensor,
        weight: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        residual_out, normed, h, rstd = torch.ops.pyprune.hsm_residual_rmsnorm(
            x, l0, v, l1, mask, residual, weight, eps
        )
        ctx.save_for_backward(x, h, residual_out, rstd, l0, v, l1, mask, weight)
        return residual_out, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_residual_out: Tensor, grad_normed: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[:7])
        gradients = torch.ops.pyprune.hsm_residual_rmsnorm_backward(
            grad_residual_out, grad_normed, *ctx.saved_tensors, wanted
        )
        return *only(wanted, gradients), None


# ---------------------------------------------------------------------------------------------------------------------
# The functional API


def hsm(x: Tensor, l0: Tensor, v: Tensor, l1: Tensor, mask: Tensor) -> Tensor:
    """PAT's hybrid sparsification module: y = mask * (D x)[:n] with D = l1 diag(v) l0 + I (arXiv 2408.14721).

    Args:
        x: [..., d] in bf16, fp16, fp32 or fp64.
        l0: [r, d], l1: [n, r] with n <= d, both in x's dtype. For n < d the kept channels of x stand first.
        v: [r] and mask: [n], in fp32 (fp64 for an fp64 x).

    Returns:
        [..., n] in x's dtype.

    Raises:
        TypeError, ValueError: an argument's dtype, device or shape is not the above.
    """
    y = _Hsm.apply(x.reshape(-1, x.shape[-1]), l0, v, l1, mask)
    return y.view(*x.shape[:-1], l1.shape[0])


def hsm_residual_rmsnorm(
    x: Tensor, l0: Tensor, v: Tensor, l1: Tensor, mask: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`hsm`, the residual addition after it and the RMSNorm that reads the sum, in one op.

    residual_out = residual + hsm(x);   normed = residual_out * rsqrt(mean(residual_out^2) + eps) * weight

    Args:
        x, l0, v, l1, mask: as for `hsm`.
        residual: [..., n] and weight: [n], in x's dtype.
        eps: the norm's epsilon.

    Returns:
        residual_out and normed, [..., n] in x's dtype. The statistics are those of residual_out as rounded.

    Raises:
        TypeError, ValueError: an argument's dtype, device or shape is not the above.
    """
    shape = (*x.shape[:-1], l1.shape[0])
    if tuple(residual.shape) != shape:
        raise ValueError(f"hsm_residual_rmsnorm: residual has shape {list(residual.shape)}, expected {list(shape)}")
    residual_out, normed = _HsmResidualRmsNorm.apply(
        x.reshape(-1, x.shape[-1]), residual.reshape(-1, shape[-1]), l0, v, l1, mask, weight, eps
    )
    return residual_out.view(shape), normed.view(shape)
