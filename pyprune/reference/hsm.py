"""The `hsm` family in plain torch. Row statistics are fp32 (fp64 for fp64)."""

from __future__ import annotations

import torch
from torch import Tensor


def hsm(x: Tensor, l0: Tensor, v: Tensor, l1: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """y = mask * (x[:, :n] + (h * v) l1^T) with h = x l0^T; returns y [T,n], h [T,r]."""
    h = x @ l0.T
    z = (h * v.to(x.dtype)) @ l1.T
    return mask.to(x.dtype) * (x[:, : len(mask)] + z), h


def hsm_backward(
    grad_y: Tensor, x: Tensor, h: Tensor, l0: Tensor, v: Tensor, l1: Tensor, mask: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `hsm` for x, l0, v, l1, mask; empty tensors where `output_mask` is False."""
    wants_x, wants_l0, wants_v, wants_l1, wants_mask = output_mask
    none = x.new_empty(0)
    n = len(mask)
    masked = grad_y * mask.to(x.dtype)
    u = masked @ l1
    grad_p = u * v.to(x.dtype)
    hv = h * v.to(x.dtype)
    grad_x = none
    if wants_x:
        grad_x = grad_p @ l0
        grad_x[:, :n] += masked
    return (
        grad_x,
        grad_p.T @ x if wants_l0 else none,
        (u.to(v.dtype) * h.to(v.dtype)).sum(0) if wants_v else v.new_empty(0),
        masked.T @ hv if wants_l1 else none,
        (grad_y.to(v.dtype) * (x[:, :n] + hv @ l1.T).to(v.dtype)).sum(0) if wants_mask else mask.new_empty(0),
    )


def hsm_residual_rmsnorm(
    x: Tensor, l0: Tensor, v: Tensor, l1: Tensor, mask: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """residual_out = residual + hsm(x); normed = residual_out * rstd * weight. Returns both, h [T,r] and rstd [T]."""
    y, h = hsm(x, l0, v, l1, mask)
    residual_out = residual + y
    wide = residual_out.to(v.dtype)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    normed = (wide * rstd[:, None]).to(x.dtype) * weight
    return residual_out, normed, h, rstd


def hsm_residual_rmsnorm_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `hsm_residual_rmsnorm` for x, residual, l0, v, l1, mask, weight; empty where not wanted."""
    wants_x, wants_residual, wants_l0, wants_v, wants_l1, wants_mask, wants_weight = output_mask
    q = residual_out.to(v.dtype) * rstd[:, None]
    grad_q = grad_normed.to(v.dtype) * weight.to(v.dtype)
    through_norm = rstd[:, None] * (grad_q - q * (grad_q * q).mean(-1, keepdim=True))
    grad_residual = (grad_residual_out.to(v.dtype) + through_norm).to(x.dtype)
    grad_weight = (grad_normed.to(v.dtype) * q).sum(0).to(weight.dtype) if wants_weight else weight.new_empty(0)
    grad_x, grad_l0, grad_v, grad_l1, grad_mask = hsm_backward(
        grad_residual, x, h, l0, v, l1, mask, [wants_x, wants_l0, wants_v, wants_l1, wants_mask]
    )
    if not wants_residual:
        grad_residual = residual_out.new_empty(0)
    return grad_x, grad_residual, grad_l0, grad_v, grad_l1, grad_mask, grad_weight
