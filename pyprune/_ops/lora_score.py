"""LoRAPrune's criterion: the importance of a linear's rows or columns from LoRA's gradients alone.

LoRAPrune, arXiv 2305.18403: with W [out, in], A [r, in], B [out, r], scale s and the gradients gA, gB of A and B,

    Ghat = gB (A - gA) + B gA,    S = |Ghat * (W + s B A)|

Ghat stands in for the gradient of W. It has rank 2r at most, so nothing of W's size is ever stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune._ops.dispatch import define, expect_float, expect_like, expect_shape, run


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of LoRA's matrices, of their gradients and of the scores beside a weight of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(weight: Tensor, a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, dim: int) -> None:
    op = "lora_group_score"
    expect_float(op, "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}, expected [out, in]")
    if a.dim() != 2:
        raise ValueError(f"{op}: a has shape {list(a.shape)}, expected [r, in]")
    expect_like(op, weight, _wide(weight.dtype), a=a, b=b, grad_a=grad_a, grad_b=grad_b)
    (outputs, inputs), rank = weight.shape, a.shape[0]
    for name, tensor, shape in (
        ("a", a, (rank, inputs)),
        ("b", b, (outputs, rank)),
        ("grad_a", grad_a, (rank, inputs)),
        ("grad_b", grad_b, (outputs, rank)),
    ):
        expect_shape(op, name, tensor, *shape)
    if dim not in (0, 1):
        raise ValueError(f"{op}: dim is {dim}; expected 0 for a score of each output, 1 for one of each input")


def _run(weight: Tensor, a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, scale: float, dim: int) -> Tensor:
    _check(weight, a, b, grad_a, grad_b, dim)
    return run("lora_group_score", weight, (weight, a, b, grad_a, grad_b), scale, dim)


def _fake(weight: Tensor, a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, scale: float, dim: int) -> Tensor:
    _check(weight, a, b, grad_a, grad_b, dim)
    return a.new_empty(weight.shape[dim])


define(
    "lora_group_score(Tensor weight, Tensor a, Tensor b, Tensor grad_a, Tensor grad_b, float scale, int dim) -> Tensor",
    _run,
    _fake,
)


def lora_group_score(
    weight: Tensor, a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, scale: float, dim: int
) -> Tensor:
    """LoRAPrune's score of every output (dim 0) or input (dim 1) of a linear: S summed over the other dimension.

    Reads `weight` once and stores nothing of its size. A sum over a block of entries, such as a head's, is left to the
    caller. Scores are not differentiable.

    Args:
        weight: W [out, in]; bf16, fp16, fp32, or fp64.
        a, grad_a: LoRA's A and its gradient [r, in]; fp32 (fp64 beside an fp64 weight).
        b, grad_b: LoRA's B and its gradient [out, r]; as A.
        scale: s, what LoRA multiplies B A with.
        dim: the dimension of W that is left.

    Returns:
        [out] or [in], fp32 (fp64 beside an fp64 weight). Not finite where an input is not.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    with torch.no_grad():
        return torch.ops.pyprune.lora_group_score(weight, a, b, grad_a, grad_b, scale, dim)
