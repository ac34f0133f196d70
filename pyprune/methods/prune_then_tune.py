"""Prune, then tune: the same basis cut at once, then LoRA. What PAT has to beat.

In the pca basis this is SliceGPT (arXiv 2401.15024) with one global rotation, so that the result is a stock checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pyprune import basis, surgery
from pyprune.architectures import describe
from pyprune.methods import option
from pyprune.methods.lora import LoRA
from pyprune.methods.pat import Pruning, kept_channels

AXES = "axes.safetensors"


class HiddenCut(LoRA):
    """What the methods share that cut the hidden size before training; one says how much is kept and in which basis.
    Every checkpoint holds the axes, so that a resumed run makes the same cut, whatever this machine's roundings."""

    basis: str
    untie: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        self._axes: Tensor | None = None

    def hidden_size(self, model: nn.Module) -> int:
        """The one that is kept. Raises ValueError when it cannot be; `model` may be on the meta device."""
        raise NotImplementedError

    def check(self, model: nn.Module) -> None:
        """Raises ValueError when the model cannot be cut so; `model` may be on the meta device."""
        surgery.check_keep(describe(model), range(self.hidden_size(model)))

    def cut(self, model: nn.Module, calibration: Sequence[Tensor] | None, axes: Tensor | None = None) -> nn.Module:
        """Rotates and cuts, without training: a stock model of the smaller hidden size.

        Args:
            axes: those of an earlier cut of the same model, instead of `calibration`: [d, d] by falling variance, or
                int64 [d], the channels in that order (basis identity).

        Raises:
            ValueError: neither calibration nor axes, or the hidden size cannot be cut so.
        """
        self.check(model)
        kept = self.hidden_size(model)
        if self.basis == "identity":
            self._axes = by_variance(model, calibration) if axes is None else axes
            return surgery.slice_hidden(model, self._axes[:kept].sort().values)
        self._axes = basis.to_principal_axes(model, calibration, self.untie, axes)
        return surgery.slice_hidden(model, range(kept))

    def prepare(
        self, model: nn.Module, calibration: Sequence[Tensor] | None = None, resume: str | Path | None = None
    ) -> nn.Module:
        """The cut model with LoRA.

        Raises:
            ValueError: what `cut` raises, adapters, or `resume` is of another method or model.
        """
        self.refuse_adapters(model)
        axes = None if resume is None else self._resumed(model, Path(resume))
        return self.adapt(self.cut(model, calibration, axes))

    def _resumed(self, model: nn.Module, checkpoint: Path) -> Tensor:
        try:
            axes = load_file(checkpoint / AXES)["axes"]
        except (OSError, KeyError, SafetensorError) as error:
            raise ValueError(
                f"{checkpoint} does not say which channels were cut ({error}); resume with the method and the version "
                "that began the run, or start a new one"
            ) from error
        size = describe(model).hidden_size
        expected = [size] if self.basis == "identity" else [size, size]
        if list(axes.shape) != expected:
            raise ValueError(
                f"{checkpoint} is of a run in another basis or of another model: its axes are {list(axes.shape)}, "
                f"expected {expected}; resume with the same, or start a new run"
            )
        return axes

    def callbacks(self) -> list[TrainerCallback]:
        """One, which writes the axes into every checkpoint."""
        return [] if self._axes is None else [_SaveAxes(self._axes)]


class _SaveAxes(TrainerCallback):
    def __init__(self, axes: Tensor) -> None:
        self.axes = axes.cpu().contiguous()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"  # type: ignore[arg-type]
            save_file({"axes": self.axes}, folder / AXES)


def by_variance(model: nn.Module, calibration: Sequence[Tensor] | None) -> Tensor:
    """The channels of the residual stream by falling variance, int64 [d]. Raises ValueError without calibration."""
    if not calibration:
        raise ValueError("calibration: pass token ids, each [batch, tokens], to find the channels of variance")
    return basis.covariance(model, calibration).diagonal().argsort(descending=True, stable=True)


@dataclass
class PruneThenTune(HiddenCut, Pruning):
    """Cut the hidden size before training; satisfies `Method`."""

    basis: str = option(
        "pca",
        "identity: the channels of most variance stay; pca: those of the principal axes (so too for learned)",
        choices=["identity", "pca", "learned"],
    )

    def hidden_size(self, model: nn.Module) -> int:
        """What `ratio` leaves, rounded."""
        return kept_channels(describe(model), self.ratio, self.round_to)
