"""SparseGPT's solve of one linear (arXiv 2301.00774): weights are dropped, and those behind them make up for it."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune._ops.dispatch import define, expect_like, expect_shape, run

MAX_GROUP = 128
"""The widest N:M group: a slab of the kernels."""


def _check(
    weight: Tensor,
    hinv_upper: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    drop: int,
    n: int,
    m: int,
    per_row: bool,
    block: int,
    levels: int,
) -> None:
    op = "sparsegpt_solve"
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: weight is {weight.dtype}, expected torch.float32 or torch.float64")
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}, expected two dimensions")
    rows, columns = weight.shape
    expect_like(op, weight, weight.dtype, hinv_upper=hinv_upper)
    expect_shape(op, "hinv_upper", hinv_upper, columns, columns)
    if block < 1:
        raise ValueError(f"{op}: block is {block}, expected at least 1")
    if n and not (0 < n < m <= MAX_GROUP and columns % m == 0 and block % m == 0):
        raise ValueError(
            f"{op}: n is {n} and m {m}; expected 0 < n < m <= {MAX_GROUP} with m a divisor of the {columns} columns "
            f"and of block, {block}"
        )
    if not n and not 0 <= drop <= weight.numel():
        raise ValueError(f"{op}: drop is {drop}, expected 0 to {weight.numel()}, the number of weights")
    if not n and per_row and drop % max(1, rows):
        raise ValueError(f"{op}: drop is {drop}, expected a multiple of the {rows} rows with per_row")
    if (scale is None) != (zero is None):
        raise ValueError(f"{op}: scale and zero go together; one of them is None")
    if scale is not None and zero is not None:
        expect_like(op, weight, weight.dtype, scale=scale, zero=zero)
        groups = scale.shape[-1]
        if groups == 0 or columns % groups:
            raise ValueError(f"{op}: scale has {groups} groups, which do not divide the {columns} columns")
        for name, tensor in {"scale": scale, "zero": zero}.items():
            expect_shape(op, name, tensor, rows, groups)
        if levels < 1:
            raise ValueError(f"{op}: levels is {levels}, expected at least 1")


def _solve(
    weight: Tensor,
    hinv_upper: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    drop: int,
    n: int,
    m: int,
    per_row: bool,
    block: int,
    levels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    options = (drop, n, m, per_row, block, levels)
    _check(weight, hinv_upper, scale, zero, *options)
    return run("sparsegpt_solve", weight, (weight, hinv_upper, scale, zero), *options)


def _solve_fake(
    weight: Tensor,
    hinv_upper: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    drop: int,
    n: int,
    m: int,
    per_row: bool,
    block: int,
    levels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(weight, hinv_upper, scale, zero, drop, n, m, per_row, block, levels)
    rows, columns = weight.shape
    bits = weight.new_empty(rows, (columns + 7) // 8, dtype=torch.uint8)
    return weight.new_empty(rows, columns), bits, weight.new_empty(())


define(
    "sparsegpt_solve(Tensor weight, Tensor hinv_upper, Tensor? scale, Tensor? zero, int drop, int n, int m,"
    " bool per_row, int block, int levels) -> (Tensor solved, Tensor bits, Tensor loss)",
    _solve,
    _solve_fake,
)


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
    """Drops weights column by column and lets the columns behind make up for them; no gradient.

    With U the upper Cholesky factor of the inverse Hessian, in slabs of `block` columns:

        keep = mask of scores w^2 / U_jj^2;   q = keep * w;   e = (w - q) / U_jj;   w_k -= e U_jk for k >= j

    Args:
        weight: [out, in], fp32 (or fp64).
        hinv_upper: U [in, in], same dtype; what is below the diagonal is not read.
        drop: weights to drop, exactly. The slab [i1, i2) drops drop * i2 // in - drop * i1 // in of them, its lowest
            scores when it is reached; among equal ones the first goes (row by row). With `per_row`, a multiple of out:
            every row drops drop / out weights, counted out over the slabs in the same way. Not read with N:M.
        n, m: n > 0 keeps n of every m <= 128 neighbours, chosen when their first column is reached; among equal scores
            the lower index stays. m divides in and block.
        scale, zero: [out, groups], dtype of weight: kept weights are rounded to scale * (code - zero), code an integer
            from 0 to `levels`, with in / groups consecutive columns to a group. None: no rounding.

    Returns:
        The solved weight [out, in]; the mask as bits uint8 [out, ceil(in / 8)], 1 = kept; and the loss, the sum of
        e^2 / 2, as a scalar of weight's dtype.

    Raises:
        TypeError, ValueError: an argument's dtype, device, shape or value is not the above.
    """
    return torch.ops.pyprune.sparsegpt_solve(weight, hinv_upper, scale, zero, drop, n, m, per_row, block, levels)
