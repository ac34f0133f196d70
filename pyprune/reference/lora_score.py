"""The `lora_score` family in plain torch, a slab of rows at a time."""

from __future__ import annotations

from torch import Tensor

SLAB = 1 << 20
"""Entries of the weight whose products are in memory at one time."""


def lora_group_score(
    weight: Tensor, a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, scale: float, dim: int
) -> Tensor:
    """Sums of |Ghat * (W + scale B A)|, Ghat = gB (A - gA) + B gA, that leave dimension `dim` of W."""
    inputs = weight.shape[1]
    total = a.new_zeros(weight.shape[dim])
    rows = max(1, SLAB // max(1, inputs))
    for begin in range(0, weight.shape[0], rows):
        slab = slice(begin, begin + rows)
        gradient = grad_b[slab] @ (a - grad_a) + b[slab] @ grad_a
        score = (gradient * (weight[slab].to(a.dtype) + scale * (b[slab] @ a))).abs()
        if dim == 0:
            total[slab] = score.sum(1)
        else:
            total += score.sum(0)
    return total
