"""LLM-Pruner: cut heads and MLP channels by full gradients, then LoRA (Ma et al., arXiv 2305.11627). A baseline of the
PAT and LoRAPrune papers. The gradients are streamed (`criteria.taylor`), so a model of any size fits that can be tuned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pyprune import criteria, plan
from pyprune.architectures import describe
from pyprune.calibration import check_calibration
from pyprune.methods import option
from pyprune.methods.loraprune import Structured

PLAN = "plan.json"  # in every checkpoint: a resumed run makes the same cut


@dataclass
class LLMPruner(Structured):
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
        self._plan: plan.Plan | None = None

    @property
    def reads_text(self) -> bool:
        """Whether `cut` needs calibration."""
        return isinstance(self.criterion, str) and self.criterion not in criteria.WITHOUT_TEXT

    def cut(self, model: nn.Module, calibration: Sequence[torch.Tensor] | None) -> nn.Module:
        """Plans and cuts, without training: what is left is a stock model, if the widths are uniform."""
        widths = self.widths(model)
        check_calibration(model, calibration or [], joined=True)
        rows = torch.cat(list(calibration))[: self.samples] if calibration else None
        scores = criteria.score(model, None if rows is None else [rows], self.criterion)
        self._plan = plan.choose(describe(model), self.target, widths, scores)
        return self._plan.apply(model)

    def prepare(
        self, model: nn.Module, calibration: Sequence[torch.Tensor] | None = None, resume: str | Path | None = None
    ) -> nn.Module:
        """The cut model with LoRA. A resumed run makes the cut that its checkpoint names.

        Raises:
            ValueError: the target cannot be met, no calibration or one that does not fit, or a checkpoint of another
                model.
        """
        if resume is None:
            return self.adapt(self.cut(model, calibration))
        self._plan = plan.Plan.load(Path(resume) / PLAN)
        if self._plan.pruned != self.widths(model):
            raise ValueError(
                f"{resume} is of a run with another target, {self._plan.target}, or another model; resume with the "
                "same, or start a new run"
            )
        return self.adapt(self._plan.apply(model))

    def callbacks(self) -> list[TrainerCallback]:
        """One, which writes the plan into every checkpoint."""
        return [] if self._plan is None else [_SavePlan(self._plan)]


class _SavePlan(TrainerCallback):
    def __init__(self, chosen: plan.Plan) -> None:
        self.chosen = chosen

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.chosen.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / PLAN)  # type: ignore[arg-type]
