"""Wanda (arXiv 2306.11695): weights times the norm of what they read, no weight is updated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune.blockwise import Block, InputNorm
from pyprune.methods import option
from pyprune.methods.oneshot import OneShot
from pyprune.reference.selection import keep_highest


@dataclass
class Wanda(OneShot):
    """Scores |W_ij| ||x_j||_2, compared within each output row."""

    pattern: str = option("row", "row, layer, balanced (unstructured, counted so) or N:M, N of every M stay")
    variant: bool = option(False, "remove in every row what makes up the same share of the row's sum of scores")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant and self.pattern != "row":
            raise ValueError(f"variant chooses its own count for each row; it takes no pattern {self.pattern!r}")

    def solve(self, block: Block) -> None:
        """Zeroes the weights of lowest score, those of all linears from the statistics of one pass."""
        norms = block.statistics(InputNorm)
        for name, linear in block.linears.items():
            scores = wanda_scores(linear.matrix, norms[name].norm)
            if self.variant:
                block.keep(name, keep_highest(shares_of_rows(scores).view(1, -1), block.drop[name]).view_as(scores))
            else:
                block.keep(name, block.mask(name, scores))


def wanda_scores(weight: Tensor, norm: Tensor) -> Tensor:
    """S_ij = |W_ij| ||x_j||_2 [out, in] in the dtype of `norm` [in]."""
    return weight.abs().to(norm.dtype) * norm


def shares_of_rows(scores: Tensor) -> Tensor:
    """[out, in]: for each score what it and all lower ones of its row make up of the row's sum. One threshold on these
    is the variant's: the largest set of lowest scores in each row whose sum is at most alpha of the row's."""
    ordered, order = scores.double().sort(dim=1, stable=True)
    sums = ordered.cumsum(1)
    shares = sums / sums[:, -1:].clamp(min=torch.finfo(sums.dtype).tiny)
    return torch.empty_like(shares).scatter_(1, order, shares)
