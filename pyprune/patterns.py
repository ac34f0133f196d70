"""Which weights may stay: patterns of sparsity, and the masks that keep the highest scores under them.

A mask is bool [out, in], True where the weight stays. Counts are exact: a mask drops as many weights as it was asked
to. Ties: among equal scores an unstructured pattern drops the lower index first (row by row, as Wanda's stable sort
does), and an N:M pattern keeps the lower index.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune import ops
from pyprune.reference.bits import unpack_bits
from pyprune.reference.selection import keep_highest

NAMES = "layer, row, balanced or N:M (as 2:4)"
MAX_M = 256  # an index inside a group is a byte in kernels and in packed weights


@dataclass(frozen=True)
class Pattern:
    """One of

    layer     unstructured, the lowest scores of a whole linear go;
    row       unstructured, each output row loses the same share: its lowest scores go, and where the count leaves a
              remainder, one more each in the rows where that costs the lowest score;
    balanced  the same number of weights in every row, exactly;
    N:M       `n` of every `m` neighbours along the input stay.
    """

    name: str
    n: int = 0
    m: int = 0

    @property
    def grouped(self) -> bool:
        """Whether this is an N:M pattern, which fixes the sparsity."""
        return self.m > 0

    @property
    def sparsity(self) -> float | None:
        """What an N:M pattern makes it."""
        return 1 - self.n / self.m if self.grouped else None

    def check(self, name: str, rows: int, columns: int) -> None:
        """Raises ValueError when the pattern does not fit a linear of this shape."""
        if self.grouped and columns % self.m:
            raise ValueError(
                f"pattern {self.name}: {name} has {columns} inputs, which groups of {self.m} do not divide; "
                f"choose an M that divides {columns}, or the pattern row"
            )

    def count(self, wanted: int, rows: int, columns: int) -> int:
        """The number of weights to drop that the pattern allows, nearest to `wanted`."""
        if self.grouped:
            return rows * columns // self.m * (self.m - self.n)
        return round(wanted / rows) * rows if self.name == "balanced" else wanted

    def mask(self, scores: Tensor, drop: int) -> Tensor:
        """The mask that keeps the highest of `scores` [out, in] and drops `drop` of them, a number that `count` gave.

        Raises ValueError for scores that are not finite.
        """
        if not bool(torch.isfinite(scores).all()):
            raise ValueError("scores are not finite (NaN or infinite)")
        if self.grouped:
            bits, _ = ops.nm_prune(scores, self.n, self.m)
            return unpack_bits(bits, scores.shape[1])
        if self.name == "layer":
            return keep_highest(scores.reshape(1, -1), drop).view_as(scores)
        return _keep_in_rows(scores, drop)


def parse(text: str) -> Pattern:
    """The pattern of that name. Raises ValueError for an unknown one, and for N:M unless 0 < N < M <= 256."""
    if text in ("layer", "row", "balanced"):
        return Pattern(text)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        raise ValueError(f"pattern is {text!r}; expected {NAMES}")
    n, m = int(match[1]), int(match[2])
    if not 0 < n < m <= MAX_M:
        raise ValueError(f"pattern is {text!r}; expected N:M with 0 < N < M <= {MAX_M}, N weights of every M stay")
    return Pattern(text, n, m)


def _keep_in_rows(scores: Tensor, drop: int) -> Tensor:
    each, more = divmod(drop, len(scores))
    keep = keep_highest(scores, each)
    if more:
        lowest_kept = scores.masked_fill(~keep, torch.inf).argmin(1)  # the first of equal ones
        costs = scores.gather(1, lowest_kept[:, None]).T
        chosen = ~keep_highest(costs, more)[0]
        keep[chosen, lowest_kept[chosen]] = False
    return keep
