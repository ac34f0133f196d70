"""Weights masked by their rank in the row, at a rate that is learnt (BESA, arXiv 2402.16880).

Notation: a row has `in` weights, and rank 0 is the one that goes first. The candidate rates are d / steps, with d from
0 to steps.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyprune._ops.dispatch import define, expect_float, expect_like, expect_shape, run

MAX_COLUMNS = 65536
"""Ranks are uint16."""
MAX_STEPS = 255
"""A rank's bucket fits a byte."""

# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _check(op: str, weight: Tensor, rank: Tensor) -> None:
    expect_float(op, "weight", weight)
    if weight.dim() != 2 or not 1 <= weight.shape[1] <= MAX_COLUMNS:
        raise ValueError(
            f"{op}: weight has shape {list(weight.shape)}, expected two dimensions with 1 to {MAX_COLUMNS} columns"
        )
    expect_like(op, weight, torch.uint16, rank=rank)
    expect_shape(op, "rank", rank, *weight.shape)


def _check_rank_mask(weight: Tensor, rank: Tensor, threshold: Tensor) -> None:
    _check("rank_mask", weight, rank)
    expect_like("rank_mask", weight, torch.int32, threshold=threshold)
    expect_shape("rank_mask", "threshold", threshold, weight.shape[0])


def _check_rank_bucket_grad(grad: Tensor, weight: Tensor, rank: Tensor, steps: int) -> None:
    _check("rank_bucket_grad", weight, rank)
    expect_like("rank_bucket_grad", weight, weight.dtype, grad=grad)
    expect_shape("rank_bucket_grad", "grad", grad, *weight.shape)
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"rank_bucket_grad: steps is {steps}, expected 1 to {MAX_STEPS}")


# ---------------------------------------------------------------------------------------------------------------------
# The ops and their fake kernels


def _rank_mask(weight: Tensor, rank: Tensor, threshold: Tensor) -> Tensor:
    _check_rank_mask(weight, rank, threshold)
    return cast(Tensor, run("rank_mask", weight, (weight, rank, threshold)))


def _rank_mask_fake(weight: Tensor, rank: Tensor, threshold: Tensor) -> Tensor:
    _check_rank_mask(weight, rank, threshold)
    return weight.new_empty(weight.shape)


def _rank_bucket_grad(grad: Tensor, weight: Tensor, rank: Tensor, steps: int) -> Tensor:
    _check_rank_bucket_grad(grad, weight, rank, steps)
    return cast(Tensor, run("rank_bucket_grad", weight, (grad, weight, rank), steps))


def _rank_bucket_grad_fake(grad: Tensor, weight: Tensor, rank: Tensor, steps: int) -> Tensor:
    _check_rank_bucket_grad(grad, weight, rank, steps)
    return weight.new_empty(weight.shape[0], steps + 1, dtype=torch.promote_types(weight.dtype, torch.float32))


define("rank_mask(Tensor weight, Tensor rank, Tensor threshold) -> Tensor", _rank_mask, _rank_mask_fake)
define(
    "rank_bucket_grad(Tensor grad, Tensor weight, Tensor rank, int steps) -> Tensor",
    _rank_bucket_grad,
    _rank_bucket_grad_fake,
)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


class _RankAllocate(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, rank: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        columns, steps = weight.shape[1], beta.shape[1] - 1
        rates = torch.arange(steps + 1, dtype=beta.dtype, device=beta.device) / steps
        threshold = ((beta @ rates) * columns).floor().clamp(0, columns).to(torch.int32)
        return torch.ops.pyprune.rank_mask(weight, rank, threshold), threshold

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        weight, rank, beta = inputs
        _, threshold = output
        ctx.mark_non_differentiable(threshold)
        ctx.save_for_backward(weight, rank, threshold)
        ctx.steps = beta.shape[1] - 1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_threshold: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        weight, rank, threshold = ctx.saved_tensors
        wants_weight, _, wants_beta = ctx.needs_input_grad
        grad_weight = torch.ops.pyprune.rank_mask(grad, rank, threshold) if wants_weight else None
        grad_beta = torch.ops.pyprune.rank_bucket_grad(grad, weight, rank, ctx.steps) if wants_beta else None
        return grad_weight, None, grad_beta


# ---------------------------------------------------------------------------------------------------------------------
# The functional API


def rank_mask(weight: Tensor, rank: Tensor, threshold: Tensor) -> Tensor:
    """weight where its rank is at least its row's threshold, 0 elsewhere; no gradient.

    Args:
        weight: [out, in] in bf16, fp16, fp32 or fp64, with in <= 65536.
        rank: uint16 [out, in], each below in, which is not looked at: others make their own row wrong.
        threshold: int32 [out], 0 (all stay) to in (all go).

    Raises:
        TypeError, ValueError: an argument's dtype, device or shape is not the above.
    """
    return torch.ops.pyprune.rank_mask(weight, rank, threshold)


def rank_bucket_grad(grad: Tensor, weight: Tensor, rank: Tensor, steps: int) -> Tensor:
    """dL/dbeta of `rank_allocate` from grad = dL/dout: - sum of grad * weight over the ranks below
    floor(in d / steps), for d = 0 ... steps.

    Args:
        grad, weight: [out, in] of one dtype.
        rank: uint16 [out, in], each below in, which is not looked at: others make their own row wrong.
        steps: 1 to 255.

    Returns:
        [out, steps + 1] in fp32 (fp64 for fp64).
    """
    return torch.ops.pyprune.rank_bucket_grad(grad, weight, rank, steps)


def rank_allocate(weight: Tensor, rank: Tensor, beta: Tensor) -> Tensor:
    """weight without the floor(alpha_r in) lowest ranks of each row, alpha_r = sum_d beta_rd d / steps.

    The gradient for beta is that of the keep probability P(q) = 1 - sum of the beta_d whose floor(in d / steps) exceeds
    the rank q, passed straight through the mask (arXiv 2402.16880, equations 4 to 6); the gradient for weight passes
    through the mask itself.

    Args:
        weight: [out, in]. rank: uint16 [out, in], each below in.
        beta: [out, steps + 1] in fp32 (fp64 for fp64), each row a probability over the candidate rates d / steps.

    Returns:
        [out, in] in weight's dtype.
    """
    expect_like("rank_allocate", weight, torch.promote_types(weight.dtype, torch.float32), beta=beta)
    if beta.dim() != 2 or len(beta) != len(weight) or not 2 <= beta.shape[1] <= MAX_STEPS + 1:
        raise ValueError(
            f"rank_allocate: beta has shape {list(beta.shape)}, expected [{len(weight)}, 2 to {MAX_STEPS + 1}]"
        )
    return _RankAllocate.apply(weight, rank, beta)[0]
