"""SparseGPT's column-by-column solve in plain torch (arXiv 2301.00774)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune.reference.bits import pack_bits, unpack_bits
from pyprune.reference.nm import nm_prune
from pyprune.reference.selection import keep_highest


@dataclass
class Problem:
    """A solve on its way through the columns.

    Attributes:
        work: [out, in], solved so far, in place. upper: U [in, in]. keep: bool [out, in], True where a weight stays.
        n, m: an N:M pattern, which a slab's solver chooses as it goes, or n = 0: `keep` is given.
        scale, zero, levels: of the rounding, or None.
    """

    work: Tensor
    upper: Tensor
    keep: Tensor
    n: int
    m: int
    scale: Tensor | None
    zero: Tensor | None
    levels: int

    @classmethod
    def start(
        cls, weight: Tensor, upper: Tensor, scale: Tensor | None, zero: Tensor | None, n: int, m: int, levels: int
    ) -> Problem:
        """Nothing solved yet."""
        return cls(weight.clone(), upper, torch.ones_like(weight, dtype=torch.bool), n, m, scale, zero, levels)


SlabSolver = Callable[[Problem, int, int], Tensor]
"""Solves columns [begin, end) of a problem in place, looking at no other; returns the errors e [out, end - begin]."""


Selector = Callable[[Problem, int, int, int], None]
"""Chooses what of columns [begin, end) goes: writes `keep`, so many of them dropped from all rows together."""


def sparsegpt_solve(
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
    """See `pyprune.ops.sparsegpt_solve`."""
    problem = Problem.start(weight, hinv_upper, scale, zero, n, m, levels)
    return solve_in_slabs(problem, drop, per_row, block, block, _solve_slab, select)


def solve_in_slabs(
    problem: Problem,
    drop: int,
    per_row: bool,
    block: int,
    widest: int,
    solve_slab: SlabSolver,
    select_slab: Selector,
) -> tuple[Tensor, Tensor, Tensor]:
    """What every implementation shares: what goes is chosen slab by slab (of `block` columns), and the errors of up to
    `widest` columns that `solve_slab` takes at once reach the columns behind them by one matrix product."""
    work, upper, columns = problem.work, problem.upper, problem.work.shape[1]
    step = min(block, widest)
    if problem.n:
        step = step // problem.m * problem.m
    loss = work.new_zeros((), dtype=torch.float64)
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        if per_row and not problem.n:
            each = drop // max(1, len(work))
            scores = _scores(problem, begin, end)
            problem.keep[:, begin:end] = keep_highest(scores, each * end // columns - each * begin // columns)
        elif not problem.n:
            select_slab(problem, begin, end, drop * end // columns - drop * begin // columns)
        for first in range(begin, end, step):
            last = min(first + step, end)
            errors = solve_slab(problem, first, last)
            loss += errors.square().sum() / 2
            work[:, last:].addmm_(errors, upper[first:last, last:], alpha=-1)
    return work, pack_bits(problem.keep), loss.to(work.dtype)


def select(problem: Problem, begin: int, end: int, drop: int) -> None:
    """A `Selector`."""
    scores = _scores(problem, begin, end)
    problem.keep[:, begin:end] = keep_highest(scores.reshape(1, -1), drop).view_as(scores)


def _scores(problem: Problem, begin: int, end: int) -> Tensor:
    return (problem.work[:, begin:end] / problem.upper.diagonal()[begin:end]).square()


def _solve_slab(problem: Problem, begin: int, end: int) -> Tensor:
    work, keep, upper, n, m = problem.work, problem.keep, problem.upper, problem.n, problem.m
    diagonal, errors = upper.diagonal(), work.new_empty(len(work), end - begin)
    for j in range(begin, end):
        if n and j % m == 0:
            group = slice(j, j + m)
            bits, *_ = nm_prune((work[:, group] / diagonal[group]).square(), n, m, None)
            keep[:, group] = unpack_bits(bits, m)
        solved = _rounded(problem, j) * keep[:, j]
        error = (work[:, j] - solved) / diagonal[j]
        work[:, j + 1 : end] -= error[:, None] * upper[j, j + 1 : end]
        work[:, j] = solved
        errors[:, j - begin] = error
    return errors


def _rounded(problem: Problem, j: int) -> Tensor:
    column, scale, zero = problem.work[:, j], problem.scale, problem.zero
    if scale is None or zero is None:
        return column
    group = j * scale.shape[1] // problem.work.shape[1]
    code = (column / scale[:, group]).round() + zero[:, group]
    return scale[:, group] * (code.clamp(0, problem.levels) - zero[:, group])
