"""Choosing the entries to drop: exact counts, with a rule for ties."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_highest(scores: Tensor, drop: int) -> Tensor:
    """The mask that drops exactly the `drop` lowest of every row of `scores` [r, c]; among equal ones the lower index
    goes first."""
    if drop == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = _kth_lowest(scores, drop)
    below, equal = scores < threshold, scores == threshold
    room = drop - below.sum(1, keepdim=True)
    return ~(below | (equal & (equal.cumsum(1) <= room)))


def _kth_lowest(scores: Tensor, k: int) -> Tensor:
    """[r, 1]. Selecting is fastest on a CPU; a GPU selects with one block for each row, but sorts with all of them."""
    if scores.is_cuda:
        return scores.sort(dim=1).values[:, k - 1 : k]
    return scores.kthvalue(k, dim=1, keepdim=True).values
