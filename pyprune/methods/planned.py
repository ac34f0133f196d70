"""What the methods share that cut heads and MLP channels before training, by a plan that every checkpoint holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pyprune import plan
from pyprune.architectures import describe
from pyprune.methods.loraprune import Structured

PLAN = "plan.json"


@dataclass
class PlannedCut(Structured):
    """A method fills in `planned`. A resumed run makes the cut that its checkpoint names, whatever the calibration and
    this machine's roundings would have chosen."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._plan: plan.Plan | None = None

    def planned(self, model: nn.Module, calibration: Sequence[Tensor] | None, known: plan.Plan | None) -> plan.Plan:
        """What stays; weights may change, shapes may not. `known`: the plan of a run that is resumed, to be returned.

        Raises:
            ValueError: the target cannot be met, no calibration or one that does not fit; nothing was changed.
        """
        raise NotImplementedError

    def cut(self, model: nn.Module, calibration: Sequence[Tensor] | None, known: plan.Plan | None = None) -> nn.Module:
        """Plans and cuts, without training: what is left is a stock model, if the widths are uniform. Raises what
        `planned` raises."""
        self._plan = self.planned(model, calibration, known)
        return self._plan.apply(model)

    def prepare(
        self, model: nn.Module, calibration: Sequence[Tensor] | None = None, resume: str | Path | None = None
    ) -> nn.Module:
        """The cut model with LoRA.

        Raises:
            ValueError: what `cut` raises, adapters, or `resume` is of another model or target.
        """
        self.refuse_adapters(model)
        return self.adapt(self.cut(model, calibration, None if resume is None else self._resumed(model, Path(resume))))

    def _resumed(self, model: nn.Module, checkpoint: Path) -> plan.Plan:
        known = plan.Plan.load(checkpoint / PLAN)
        if (known.dense, known.pruned) != (plan.Widths.of(describe(model)), self.widths(model)):
            raise ValueError(
                f"{checkpoint} is of a run with another target, {known.target}, or another model; resume with the "
                "same, or start a new run"
            )
        return known

    def callbacks(self) -> list[TrainerCallback]:
        """One, which writes the plan into every checkpoint."""
        return [] if self._plan is None else [_SavePlan(self._plan)]


class _SavePlan(TrainerCallback):
    def __init__(self, chosen: plan.Plan) -> None:
        self.chosen = chosen

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.chosen.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / PLAN)  # type: ignore[arg-type]
