"""The `rank` family in plain torch (BESA, arXiv 2402.16880, sections 3.2 and 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_mask(weight: Tensor, rank: Tensor, threshold: Tensor) -> Tensor:
    """weight [out, in] where its rank is at least its row's threshold, 0 elsewhere."""
    return weight.masked_fill(rank.to(torch.int32) < threshold[:, None], 0)


def rank_bucket_grad(grad: Tensor, weight: Tensor, rank: Tensor, steps: int) -> Tensor:
    """- sum of grad * weight over the weights of a row whose rank is below floor(in * d / steps), for d = 0 ... steps:
    [out, steps + 1], in fp32 (fp64 for fp64)."""
    rows, columns = weight.shape
    wide = torch.promote_types(weight.dtype, torch.float32)
    bucket = (steps * (rank.to(torch.int64) + 1) + columns - 1) // columns  # the first d that the weight counts for
    sums = torch.zeros(rows, steps + 1, dtype=wide, device=weight.device)
    return -sums.scatter_add_(1, bucket, grad.to(wide) * weight.to(wide)).cumsum(1)
