"""Pruning by the alternating direction method of multipliers: weights W close to the dense W0 on the calibration text,
min |(W - W0) X|^2, and their sparse copy Z, pulled together by a penalty rho and a scaled dual variable D.

Both methods work on W diag(||x_j||), whose entries are Wanda's scores and whose Gram matrix G has a unit diagonal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune.blockwise import Block
from pyprune.methods import option
from pyprune.methods.oneshot import OneShot

Select = Callable[[Tensor, float], Tensor]
"""(matrix, share) -> the mask that drops this share of what has to go in the end."""


@dataclass
class Splitting(OneShot, ABC):
    """What ADMM and ALPS share."""

    true_sequential: bool = option(True, "linears read what the pruned ones before them in the block give")
    refine: int = option(10, "steps of conjugate gradients on the weights that stay")
    damping: float = option(0.1, "added to the Gram matrix's diagonal, as a share of its mean")
    iterations: int = option(20, "iterations of the solver at most")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.damping > 0 and self.refine >= 0 and self.iterations > 0):
            raise ValueError(
                f"damping is {self.damping}, refine {self.refine}, iterations {self.iterations}; expected a positive "
                "number, 0 or more, and 1 or more"
            )

    def solve(self, block: Block) -> None:
        """Solves one linear after the other."""
        for names, gram in block.grams(self.true_sequential):
            norm = gram.diagonal().sqrt()
            scale = torch.where(norm > 0, norm, 1)
            gram = gram / scale / scale[:, None]
            gram.diagonal().add_(self.damping * gram.diagonal().mean())
            for name in names:
                weight = (
                    block.linears[name].matrix.to(gram.dtype) * norm
                )  # columns of dead inputs become zero, go first
                mask, solved = self.split(weight, gram, _selection(block, name))
                solved = conjugate_gradients(solved, weight, gram, mask, self.refine)
                block.write(name, solved / scale)
                block.keep(name, mask)

    @abstractmethod
    def split(self, weight: Tensor, gram: Tensor, select: Select) -> tuple[Tensor, Tensor]:
        """The mask and Z [out, in] for the scaled W0 [out, in] and the damped, scaled Gram matrix [in, in]."""


@dataclass
class ADMM(Splitting):
    """Boza (arXiv 2401.02938): rho = 1, so one inverse serves all iterations, and a mask that closes gradually."""

    closing: int = option(15, "iterations over which the mask closes, by a cubic schedule; then it stays")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.closing <= self.iterations:  # or the last mask would drop too few
            raise ValueError(f"closing is {self.closing}; expected 1 to {self.iterations}, the number of iterations")

    def split(self, weight: Tensor, gram: Tensor, select: Select) -> tuple[Tensor, Tensor]:
        """Z = mask (W + D);  D += W - Z;  W = (W0 G + rho (Z - D)) (G + rho I)^-1."""
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + torch.eye(len(gram)).to(gram)))
        wanted = weight @ gram
        solved, dual = weight, torch.zeros_like(weight)
        for i in range(self.iterations):
            moved = solved + dual
            if i < self.closing:
                mask = select(moved, 1 - (1 - (i + 1) / self.closing) ** 3)
            sparse = mask * moved
            dual = moved - sparse
            solved = (wanted + sparse - dual) @ inverse
        return mask, mask * (solved + dual)


@dataclass
class ALPS(Splitting):
    """ALPS (arXiv 2406.07831): projected on the sparsity from the start; rho grows until the mask is settled."""

    damping: float = option(0.01, "added to the Gram matrix's diagonal, as a share of its mean")
    iterations: int = option(300, "iterations of the solver at most")
    rho: float = option(0.1, "the penalty at first")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rho > 0:
            raise ValueError(f"rho is {self.rho}; expected a positive number")

    def split(self, weight: Tensor, gram: Tensor, select: Select) -> tuple[Tensor, Tensor]:
        """W = (W0 G + rho (Z - D)) (G + rho I)^-1;  Z = select(W + D);  D += W - Z. Every third iteration rho grows by
        1.3, 1.2 or 1.1 as more than 10 %, 0.5 % or any of the mask changed since; by none, and it is done."""
        values, vectors = torch.linalg.eigh(gram)
        wanted = (weight @ gram) @ vectors
        rho, dual = self.rho, torch.zeros_like(weight)
        mask = select(weight, 1)
        sparse, settled = mask * weight, mask
        for i in range(1, self.iterations + 1):
            solved = (wanted + rho * (sparse - dual) @ vectors) / (values + rho) @ vectors.T
            moved = solved + dual
            mask = select(moved, 1)
            sparse = mask * moved
            dual = moved - sparse
            if i % 3 == 0:
                changed = int((mask != settled).sum()) / int(mask.sum())
                if changed == 0:
                    break
                growth = 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
                rho, dual, settled = rho * growth, dual / growth, mask
        return mask, sparse


def _selection(block: Block, name: str) -> Select:
    pattern, drop = block.pattern, block.drop[name]

    def select(matrix: Tensor, share: float) -> Tensor:
        return pattern.mask(matrix.abs(), pattern.count(round(share * drop), *matrix.shape))

    return select


def conjugate_gradients(solved: Tensor, dense: Tensor, gram: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Lowers |(W - W0) X|^2 over the entries of W that `mask` keeps, from `solved` on, for all rows at once.

    solved, dense (W0), mask: [out, in]; gram: X X^T [in, in].
    """
    tiny = torch.finfo(solved.dtype).tiny
    residual = mask * ((dense - solved) @ gram)
    direction, size = residual, residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        image = mask * (direction @ gram)
        step = size / (direction * image).sum(1, keepdim=True).clamp(min=tiny)
        solved = solved + step * direction
        residual = residual - step * image
        before, size = size, residual.square().sum(1, keepdim=True)
        direction = residual + size / before.clamp(min=tiny) * direction
    return solved
