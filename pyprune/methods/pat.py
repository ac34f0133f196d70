"""PAT: prune the hidden size while fine-tuning (Liu et al., AAAI 2025, arXiv 2408.14721), the paper's formulation.

An HSM stands after the embedding and after every linear that writes to the residual stream. All share one mask over
the hidden channels, which softly shrinks from one to zero on the channels that go until the milestone; there it becomes
binary. Afterwards the zeros are cut out and training goes on in the smaller shapes. docs/pat.md has the formulas, where
this departs from the paper, and what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pyprune import basis, surgery
from pyprune.architectures import Decoder, describe, unwrap, weight_of
from pyprune.methods import option
from pyprune.methods.lora import LoRA
from pyprune.modules import HSM, LearnedSubspace, UnifiedMask
from pyprune.training import carry_moments, check_arguments, check_moments, resume_state, save_state

STRUCTURE = "pat.safetensors"  # what `prepare(resume=...)` needs before the trained tensors can be loaded


def kept_channels(decoder: Decoder, ratio: float, round_to: int | None) -> int:
    """How many channels stay: (1 - ratio) d, rounded to the nearest multiple of `round_to` (`decoder.rounding` if None)
    that stock code accepts (Llama wants a multiple of the number of heads).

    Raises:
        ValueError: the ratio is not between 0 and 1, or it rounds to no channel or to all of them.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio is {ratio}; expected a number between 0 and 1, such as 0.25")
    round_to = decoder.rounding if round_to is None else round_to
    if round_to < 1:
        raise ValueError(f"round_to is {round_to}; expected at least 1")
    multiple = math.lcm(round_to, decoder.width_multiple)
    kept = round((1 - ratio) * decoder.hidden_size / multiple) * multiple
    if not 0 < kept < decoder.hidden_size:
        raise ValueError(
            f"ratio {ratio} of hidden size {decoder.hidden_size} rounds to {kept} kept channels, so nothing or "
            f"everything would go; they are a multiple of {multiple} (round_to={round_to}, and this model's config "
            f"wants a multiple of {decoder.width_multiple}): choose another ratio or a smaller round_to"
        )
    return kept


@dataclass
class Pruning(LoRA):
    """What all methods that prune the hidden size share."""

    ratio: float = option(0.25, "share of the hidden channels that goes")
    round_to: int | None = option(
        None,
        "the kept hidden size is a multiple of this (default: 64, or as much as leaves eight sizes to choose from)",
    )
    untie: bool = option(
        False,
        "in a rotated basis, give a tied head a matrix of its own; else the basis mixes only channels whose gains in "
        "the final norm are nearly equal",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is {self.ratio}; expected a number between 0 and 1, such as 0.25")

    def check(self, model: nn.Module) -> None:
        """Raises ValueError when the model cannot be pruned at this ratio; `model` may be on the meta device."""
        decoder = describe(model)
        surgery.check_keep(decoder, range(kept_channels(decoder, self.ratio, self.round_to)))


def _structure(checkpoint: Path) -> dict[str, Tensor]:
    """What PAT wrote to a checkpoint. Raises ValueError when it is none of PAT's."""
    try:
        return load_file(checkpoint / STRUCTURE)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{checkpoint} is not a checkpoint of PAT: {error}") from error


@dataclass
class PAT(Pruning):
    """Pruning-aware tuning; satisfies `Method`.

    Three lines in a script that has a `transformers.Trainer`:

        model = pat.prepare(model, calibration)
        Trainer(model, ..., callbacks=[pat.callback()]).train()
        pat.finalize(model).save_pretrained("small")
    """

    basis: str = option(
        "learned",
        "where channels are dropped: identity (the paper), pca (one rotation folded into the weights), learned (pca at "
        "first, then the dropped subspace is trained)",
        choices=["identity", "pca", "learned"],
    )
    rank: int | None = option(None, "rank of the HSMs (default: hidden size / 20, in eights)")
    milestone: float = option(1 / 3, "share of the steps after which the mask is binary and frozen")
    compact: bool = option(True, "cut the zeros out at the milestone and go on in the smaller shapes")
    mask_learning_rate: float = option(0.02, "step of the mask's proxies (basis identity, pca)")
    basis_learning_rate: float = option(2e-3, "step of the dropped subspace (basis learned), falling to 0")
    identity_weight: float = option(0.1, "weight of the identity loss, which keeps the HSMs' matrices orthonormal")
    embedding_hsm: bool = option(False, "an HSM after a tied embedding too, which unties it")
    hsm_seed: int = option(0, "seed of the HSMs' random orthonormal matrices")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.basis not in ("identity", "pca", "learned"):
            raise ValueError(f"basis is {self.basis!r}; expected identity, pca or learned")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank is {self.rank}; expected at least 1")
        if not 0 < self.milestone < 1:
            raise ValueError(f"milestone is {self.milestone}; expected a share of the steps between 0 and 1")
        if self.basis == "learned" and self.dora:
            raise ValueError(
                "basis is 'learned' and dora True: DoRA's magnitudes of single outputs cannot follow a rotation of the "
                "outputs; use basis='pca' with DoRA, or LoRA"
            )
        self._tuning: _Tuning | None = None

    def check(self, model: nn.Module) -> None:
        """As of all methods that prune; also, the HSMs' rank must fit."""
        super().check(model)
        hidden_size = describe(model).hidden_size
        if self.rank is not None and self.rank > hidden_size:
            raise ValueError(f"rank is {self.rank}; expected at most the hidden size, {hidden_size}")

    def check_steps(self, steps: int) -> int:
        """The step of the milestone in a training of `steps`. Raises ValueError when none is left behind it."""
        milestone = max(1, round(self.milestone * steps))
        if milestone >= steps:
            raise ValueError(
                f"milestone {self.milestone:g} of steps={steps} is step {milestone}, which leaves none behind it; "
                "train more steps or lower the milestone"
            )
        return milestone

    def prepare(
        self, model: nn.Module, calibration: Sequence[Tensor] | None = None, resume: str | Path | None = None
    ) -> nn.Module:
        """Folds the basis into the weights, adds LoRA, HSMs and the mask, all by hooks on the stock model.

        Args:
            model: a causal language model of a known family, without adapters; it is changed in place.
            calibration: token ids, each [B, T]; needed unless the basis is identity.
            resume: a checkpoint folder of a run with this method, from which the Trainer will go on
                (`resume_from_checkpoint`, or `training.tune`): this makes the shapes right, and its callback loads
                what it trained.

        Raises:
            ValueError: no calibration, a ratio or width that does not fit, a family that is not known.
        """
        self.refuse_adapters(model)
        self.check(model)
        if self.compact:
            surgery.refuse_what_cannot_be_cut(surgery.residual_layers(describe(model)), "PAT with compact")
        resume = Path(resume) if resume else None
        structure = _structure(resume) if resume else {}
        if self.basis != "identity":
            known = structure.get("basis")
            structure["basis"] = basis.to_principal_axes(model, calibration, self.untie, known)
        model = self.adapt(model)
        self._tuning = _Tuning(self, model, structure)
        self._tuning.resume = resume
        return model

    def callback(self) -> TrainerCallback:
        """The callback for the Trainer that trains what `prepare` returned."""
        return _Callback(self._prepared("callback"))

    def callbacks(self) -> list[TrainerCallback]:
        """`callback`, in a list."""
        return [self.callback()]

    def finalize(self, model: nn.Module) -> nn.Module:
        """Folds adapters and HSMs into the weights, cuts what is masked: a stock model of the smaller hidden size.

        Raises:
            RuntimeError: training ended before the milestone, so nothing has been chosen yet.
        """
        final = self._prepared("finalize").finish(model)
        self._tuning = None  # it holds the HSMs and the model
        return final

    def _prepared(self, what: str) -> _Tuning:
        if self._tuning is None:
            raise RuntimeError(f"PAT.{what}: call prepare(model) first")
        return self._tuning


class _Tuning:
    """PAT on one model: HSMs and mask, attached by hooks, and what happens to them at the milestone."""

    def __init__(self, options: PAT, model: nn.Module, structure: dict[str, Tensor]) -> None:
        self.options, self.model, self.structure = options, model, structure
        decoder = self.decoder = describe(model)
        self.hidden_size = decoder.hidden_size
        kept = kept_channels(decoder, options.ratio, options.round_to)
        device = weight_of(decoder.embedding).device
        selection: UnifiedMask | LearnedSubspace = (
            LearnedSubspace(self.hidden_size, kept, options.basis_learning_rate, basis.mixable(model))
            if options.basis == "learned"
            else UnifiedMask(self.hidden_size, kept, options.mask_learning_rate)
        )
        self.parts = nn.Module()  # in the model, so that they move, are saved and are trained with it
        self.parts.selection = self.selection = selection.to(device)
        generator = torch.Generator().manual_seed(options.hsm_seed)
        rank = options.rank or min(self.hidden_size, max(8, round(self.hidden_size / 160) * 8))  # whole 16-byte pieces
        self.hsms = {
            name: HSM(self.hidden_size, rank, generator=generator).to(device)
            for name in decoder.writers()
            if name != "embedding" or options.embedding_hsm or not decoder.tied
        }
        self.parts.hsms = nn.ModuleDict(self.hsms)
        unwrap(model).add_module("pat", self.parts)
        self.hooks = [
            writer.register_forward_hook(self._hook(self.hsms.get(name))) for name, writer in decoder.writers().items()
        ]
        self.frozen = self.begun = False
        self.resume: Path | None = None
        if "kept" in structure:
            self.freeze(None)

    def _hook(self, hsm: HSM | None) -> Callable[..., Tensor]:
        return lambda module, args, output: self.selection(output, hsm)

    @property
    def compacted(self) -> bool:
        """Whether the model's shapes are the small ones already."""
        return self.frozen and self.options.compact

    def identity_gradients(self) -> float:
        """Adds the gradient of the identity loss, the mean over all HSMs, to theirs; returns the loss.

        It is a function of the parameters alone, so it is added once an optimiser step, however many passes that has.
        """
        weight = self.options.identity_weight / max(1, len(self.hsms))
        losses = []
        for hsm in self.hsms.values():
            loss = weight * hsm.identity_loss()
            for parameter, gradient in zip((hsm.l0, hsm.l1), torch.autograd.grad(loss, (hsm.l0, hsm.l1)), strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            losses.append(loss.detach())
        return sum(torch.stack(losses).tolist()) if losses else 0.0  # a GPU is waited for once

    @torch.no_grad()
    def freeze(self, optimizer: torch.optim.Optimizer | None) -> None:
        """The milestone: the choice becomes binary, a learned basis is folded in, and the shapes become small."""
        if "kept" not in self.structure:
            rotation, kept = self.selection.freeze()
            self.structure["kept"] = kept
            if rotation is not None:
                self.structure["rotation"] = rotation
        rotation, kept = self.structure.get("rotation"), self.structure["kept"]
        if rotation is not None:
            rotated = basis.rotate_adapted(self.model, rotation)
            for hsm in self.hsms.values():
                own = {hsm.l0: basis.Rotation(1, rotation), hsm.l1: basis.Rotation(0, rotation)}
                for parameter, rotate in own.items():
                    parameter.data = rotate(parameter.data)
                rotated |= own
            carry_moments(optimizer, rotated)
        if self.options.compact:
            cut = surgery.compact(self.model, kept, wide=list(self.hsms))
            for hsm in self.hsms.values():
                order = hsm.keep(kept)
                cut |= {hsm.l0: surgery.Selection(1, order), hsm.l1: surgery.Selection(0, order)}
            carry_moments(optimizer, cut)
        self.selection = UnifiedMask.binary(self.hidden_size, kept, compact=self.options.compact).to(
            weight_of(self.decoder.embedding).device
        )
        self.parts.selection = self.selection
        self.frozen = True

    def save(self, folder: Path) -> None:
        """Writes what `prepare(resume=folder)` needs: also the basis, though it never changes, because a checkpoint is
        to be complete without its neighbours. In fp64: a rounded one would be rounded differently into the weights."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.structure.items()}
        save_file(tensors, folder / STRUCTURE)

    def finish(self, model: nn.Module) -> nn.Module:
        if not self.frozen:
            why = "has not reached the milestone" if self.begun else "had no callbacks=[pat.callback()]"
            raise RuntimeError(f"PAT.finalize: training {why}, so no channel was chosen yet")
        matrices = {name: hsm.transform() for name, hsm in self.hsms.items()}
        for hook in self.hooks:
            hook.remove()
        del unwrap(model).pat
        stock = surgery.fold_adapters(model)
        kept = self.structure["kept"]
        if self.options.compact:
            surgery.merge_hsm(describe(stock), {name: matrix[: len(kept)] for name, matrix in matrices.items()})
            return surgery.settle_config(stock)
        surgery.merge_hsm(describe(stock), matrices)
        return surgery.slice_hidden(stock, kept)


class _Callback(TrainerCallback):
    """Drives the mask through the steps of a Trainer."""

    def __init__(self, tuning: _Tuning) -> None:
        self.tuning = tuning
        self.figures: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_arguments(args, "compact=False" if self.tuning.options.compact else None)
        self.milestone = self.tuning.options.check_steps(state.max_steps)
        self.tuning.begun = True
        resume_state(self.tuning.model, state.global_step, self.tuning.resume)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.tuning.frozen:
            self.tuning.selection.begin(state.global_step, self.milestone)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.figures = {"identity_loss": self.tuning.identity_gradients()}
        if not self.tuning.frozen:
            self.figures |= self.tuning.selection.learn(state.global_step, self.milestone)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        changes = self.tuning.options.compact or self.tuning.options.basis == "learned"
        if changes and not self.tuning.frozen and state.global_step in (1, self.milestone):
            check_moments(kwargs["optimizer"], "compact=False with basis 'pca' or 'identity'")
        if state.global_step == self.milestone and not self.tuning.frozen:
            self.tuning.freeze(kwargs["optimizer"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs")
        if logs is not None and "loss" in logs:
            logs |= self.figures  # for the callbacks behind this one
            state.log_history[-1] |= self.figures

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"  # type: ignore[arg-type]
        self.tuning.save(folder)
        save_state(kwargs["model"], folder)
