"""Magnitude pruning: the smallest weights go. The baseline that looks at no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyprune.blockwise import Block
from pyprune.methods.oneshot import OneShot


@dataclass
class Magnitude(OneShot):
    """Scores |W|, compared within a linear (or as `pattern` says)."""

    calibrated: ClassVar[bool] = False

    def solve(self, block: Block) -> None:
        """Zeroes the weights of lowest score."""
        for name, linear in block.linears.items():
            block.keep(name, block.mask(name, linear.matrix.abs()))
