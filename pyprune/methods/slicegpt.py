"""SliceGPT: rotate the residual stream to its principal axes, cut the last ones, then LoRA (Ashkboos et al., arXiv
2401.15024). A baseline of the PAT paper.

One global rotation (`pyprune.basis`) instead of one a block: the residual stream needs no matrices in between then, and
the result is a checkpoint of a stock architecture. A tied head stays tied unless `untie` asks for the paper's way: then
it becomes a matrix of its own, whose parameters count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from pyprune import plan
from pyprune.architectures import describe
from pyprune.methods import option
from pyprune.methods.prune_then_tune import HiddenCut


@dataclass
class SliceGPT(HiddenCut):
    """Cut before training; satisfies `Method`."""

    target: str = option("params=0.75", "the model that is left: params= or bytes= (a share or a number), or hidden=")
    round_to: int | None = option(
        None,
        "the kept hidden size is a multiple of this (default: 64, or as much as leaves eight sizes to choose from)",
    )
    untie: bool = option(
        False,
        "give a tied head a matrix of its own, as in the paper; else the basis mixes only channels whose gains in the "
        "final norm are nearly equal",
    )

    basis = "pca"
    reads_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = plan.Target.parse(self.target)
        if wanted.kind == "latency" or not set(wanted.shape) <= {"hidden"}:
            raise ValueError(
                f"target is {self.target!r}; SliceGPT cuts the hidden size: expected params, bytes or hidden="
            )
        if self.round_to is not None:
            plan.Rules(("hidden",), round_to=self.round_to)

    def hidden_size(self, model: nn.Module) -> int:
        """The one that meets the target. Raises ValueError when there is none."""
        decoder, wanted = describe(model), plan.Target.parse(self.target)
        rules = plan.Rules(("hidden",), round_to=decoder.rounding if self.round_to is None else self.round_to)
        return plan.widths_for(decoder, wanted, rules, untied=self.untie).hidden
