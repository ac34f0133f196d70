"""LLM-Pruner: cut heads and MLP channels by full gradients, then LoRA (Ma et al., arXiv 2305.11627). A baseline of the
PAT and LoRAPrune papers. The gradients are streamed (`criteria.taylor`), so a model of any size fits that can be tuned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pyprune import criteria, plan
from pyprune.architectures import describe
from pyprune.calibration import check_calibration
from pyprune.methods import option
from pyprune.methods.planned import PlannedCut


@dataclass
class LLMPruner(PlannedCut):
    """Cut before training; satisfies `Method`. Any criterion of `pyprune.criteria` may choose, or a function like them,
    which gets the model and a list of batches, empty without calibration, and returns a score for every group."""

    criterion: str | criteria.Criterion = option(
        "taylor", "how important a group is; LLM-Pruner's are taylor, taylor-second and taylor-mixed",
        choices=list(criteria.CRITERIA),
    )  # fmt: skip
    samples: int = option(10, "calibration windows that the criterion reads")

    def __post_init__(self) -> None:
        super().__post_init__()
        criteria.check_known(self.criterion, criteria.CRITERIA)
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}; expected at least 1")

    @property
    def reads_text(self) -> bool:
        """Whether `planned` needs calibration."""
        return isinstance(self.criterion, str) and self.criterion not in criteria.WITHOUT_TEXT

    def planned(
        self, model: nn.Module, calibration: Sequence[torch.Tensor] | None, known: plan.Plan | None
    ) -> plan.Plan:
        """What the criterion rates highest stays."""
        if known is not None:
            return known
        widths = self.widths(model)
        check_calibration(model, calibration or [], joined=True)
        rows = torch.cat(list(calibration))[: self.samples] if calibration else None
        scores = criteria.score(model, None if rows is None else [rows], self.criterion)
        return plan.choose(describe(model), self.target, widths, scores)
