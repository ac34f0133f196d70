"""SparseGPT's solve: slabs on the kernel of csrc/sparsegpt_cpu.h, the products behind them by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune._cpu.common import Kernels, address
from pyprune.reference.sparsegpt import Problem, select, solve_in_slabs

WIDEST = 128
"""kMaxSlab of csrc/sparsegpt.h."""


class SparseGpt(Kernels):
    """The family's ops."""

    def sparsegpt_solve(
        self,
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
        problem = Problem.start(weight, hinv_upper, scale, zero, n, m, levels)
        return solve_in_slabs(problem, drop, per_row, block, WIDEST, self._solve_slab, self._select)

    def _select(self, problem: Problem, begin: int, end: int, drop: int) -> None:
        if end - begin > WIDEST:
            return select(problem, begin, end, drop)
        self.kernels.sparsegpt_select(
            *problem.work.shape,
            begin,
            end - begin,
            problem.work.data_ptr(),
            problem.upper.data_ptr(),
            problem.keep.data_ptr(),
            drop,
            torch.get_num_threads(),
        )

    def _solve_slab(self, problem: Problem, begin: int, end: int) -> Tensor:
        errors = problem.work.new_empty(len(problem.work), end - begin)
        self.kernels.sparsegpt_slab(
            *problem.work.shape,
            begin,
            end - begin,
            problem.n,
            problem.m,
            problem.work.data_ptr(),
            problem.upper.data_ptr(),
            problem.keep.data_ptr(),
            1 if problem.scale is None else problem.scale.shape[1],
            address(problem.scale),
            address(problem.zero),
            problem.levels,
            errors.data_ptr(),
            torch.get_num_threads(),
        )
        return errors
