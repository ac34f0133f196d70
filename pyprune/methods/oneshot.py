"""What the one-shot methods share: how much to remove, in which pattern, and how it is spread over the blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pyprune import patterns
from pyprune.methods import option


@dataclass
class OneShot:
    """The options of every one-shot method; a method adds its own, and `solve(block)` (`blockwise.BlockMethod`)."""

    sparsity: float = option(
        None, "share of the weights of the blocks' linears to remove (default: 0.5, or what the pattern N:M makes it)"
    )
    pattern: str = option("layer", "layer, row, balanced (unstructured, counted so) or N:M, N of every M stay")
    allocation: str = option("uniform", "how the sparsity is spread over the blocks", choices=["uniform", "owl"])
    owl_outlier: float = option(5.0, "owl: an outlier exceeds the mean score of its block this many times")
    owl_spread: float = option(0.08, "owl: the blocks' kept shares lie in twice this range")

    calibrated: ClassVar[bool] = True
    reference: ClassVar[Literal["none", "pruned", "dense"]] = "none"

    def __post_init__(self) -> None:
        if self.sparsity is None:
            self.sparsity = patterns.parse(self.pattern).sparsity or 0.5
