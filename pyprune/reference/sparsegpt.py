"""SparseGPT's column-by-column solve in plain torch (arXiv 2301.00774)."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune.reference.bits import pack_bits, unpack_bits
from pyprune.reference.nm import nm_prune
from pyprune.reference.selection import keep_highest


def sparsegpt_solve(
    weight: Tensor,
    hinv_upper: Tensor,
    drop: int,
    n: int = 0,
    m: int = 0,
    per_row: bool = False,
    block: int = 128,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    levels: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Drops weights column by column and lets the columns behind make up for them.

    With U the upper Cholesky factor of the inverse Hessian, in slabs of `block` columns:
        keep = mask of scores w^2 / U_jj^2;   q = keep * w;   e = (w - q) / U_jj;   w_k -= e U_jk for k >= j

    Args:
        weight: [out, in], fp32 (or fp64).
        hinv_upper: U [in, in], same dtype; what is below the diagonal is not read.
        drop: weights to drop, exactly. The slab [i1, i2) drops drop * i2 // in - drop * i1 // in of them, its lowest
            scores when it is reached; among equal ones the first goes (row by row). With `per_row`, a multiple of out:
            every row drops drop / out weights, counted out over the slabs in the same way. Not read with N:M.
        n, m: n > 0 keeps n of every m neighbours, chosen when their first column is reached; among equal scores the
            lower index stays. m divides in and block.
        scale, zero: [out, groups], dtype of weight: kept weights are rounded to scale * (code - zero), code an integer
            from 0 to `levels`, with in / groups consecutive columns to a group. None: no rounding.

    Returns:
        The solved weight [out, in]; the mask as bits uint8 [out, ceil(in / 8)], 1 = kept; and the loss, the sum of
        e^2 / 2, as a scalar of weight's dtype.
    """
    rows, columns = weight.shape
    work, diagonal = weight.clone(), hinv_upper.diagonal()
    keep = torch.ones_like(weight, dtype=torch.bool)
    loss = weight.new_zeros(())
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        errors = weight.new_empty(rows, end - begin)
        if not n:
            scores = (work[:, begin:end] / diagonal[begin:end]).square()
            keep[:, begin:end] = _keep_in_slab(scores, drop, begin, end, columns, per_row)
        for j in range(begin, end):
            if n and j % m == 0:
                group = slice(j, j + m)
                bits, *_ = nm_prune((work[:, group] / diagonal[group]).square(), n, m, None)
                keep[:, group] = unpack_bits(bits, m)
            solved = _rounded(work[:, j], j, columns, scale, zero, levels) * keep[:, j]
            error = (work[:, j] - solved) / diagonal[j]
            work[:, j + 1 : end] -= error[:, None] * hinv_upper[j, j + 1 : end]
            work[:, j] = solved
            errors[:, j - begin] = error
        loss += errors.square().sum() / 2
        work[:, end:] -= errors @ hinv_upper[begin:end, end:]
    return work, pack_bits(keep), loss


def _keep_in_slab(scores: Tensor, drop: int, begin: int, end: int, columns: int, per_row: bool) -> Tensor:
    if per_row:
        drop //= len(scores)
    here = drop * end // columns - drop * begin // columns
    return keep_highest(scores if per_row else scores.reshape(1, -1), here).view_as(scores)


def _rounded(column: Tensor, j: int, columns: int, scale: Tensor | None, zero: Tensor | None, levels: int) -> Tensor:
    if scale is None or zero is None:
        return column
    group = j * scale.shape[1] // columns
    code = (column / scale[:, group]).round() + zero[:, group]
    return scale[:, group] * (code.clamp(0, levels) - zero[:, group])
