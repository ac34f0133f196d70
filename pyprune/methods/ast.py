"""AST: retrain a dense model into an N:M-sparse one (Huang et al., AAAI 2025, arXiv 2407.20584).

Every linear of the blocks keeps the N largest of every M weights in its products, while the gradient goes to all of
them. The masks are chosen again every few steps, a decay that grows pushes masked weights towards zero, and the dense
model is the teacher. docs/ast.md has the formulas, where this departs from the paper, and what was measured.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pyprune.architectures import Linear, describe_blocks
from pyprune.calibration import InputNorm, check_calibration
from pyprune.distillation import Distillation, Weights, check_heads
from pyprune.masked import MaskedLinear, MaskRule, is_sharded
from pyprune.methods import option
from pyprune.models import open_model, open_skeleton
from pyprune.optim import MaskedAdamW
from pyprune.packing import sparsify
from pyprune.reference.bits import count_flips, pack_bits, unpack_bits
from pyprune.schedules import Schedule
from pyprune.training import STATE


@dataclass
class AST:
    """Adaptive sparse training; satisfies `Method`.

    In a script that has a `transformers.Trainer`:

        ast = pyprune.AST(pattern="2:4")
        model = ast.prepare(model)
        Trainer(model, args, ..., callbacks=ast.callbacks(), optimizer_cls_and_kwargs=ast.optimizer(args)).train()
        ast.finalize(model).save_pretrained("sparse")
    """

    pattern: str = option("2:4", "N:M, N weights of every M along the input stay")
    mask: str = option(
        "adaptive",
        "adaptive: chosen again every REFRESH steps, any weight can come back; fixed: as at the start; gradual: from "
        "M:M down to N:M until the milestone, and what is pruned stays so",
        choices=["adaptive", "fixed", "gradual"],
    )
    criterion: str = option(
        "magnitude",
        "what stays: the largest |w| (magnitude), or |w| times the norm of its input before training (wanda)",
        choices=["magnitude", "wanda"],
    )
    transposable: bool = option(False, "masks that are 2:4 along the output too, exact")
    refresh: int = option(10, "optimiser steps between two choices of the mask")
    decay: float = option(6e-5, "final decay lambda of the masked weights (mask adaptive)")
    decay_shape: str = option(
        "annealed",
        "annealed: the decay grows linearly until the milestone; static: SR-STE",
        choices=["annealed", "static"],
    )
    milestone: float = option(0.25, "share of the steps after which the decay, or a gradual mask, is final")
    kl_weight: float = option(0.67, "weight of the distillation from the teacher; 0: no teacher")
    ce_weight: float = option(0.33, "weight of the cross entropy (1 without a teacher)")
    temperature: float = option(2.0, "temperature of the distillation")
    teacher: str | None = option(None, "checkpoint of the teacher (default: the model as it was at the start)")
    slorb: int | None = option(None, "inputs in a block of the low-rank part (SLoRB), 16 in the paper (default: none)")
    slorb_trained: bool = option(False, "train SLoRB's projection too, instead of summing blocks")
    beta2: float = option(0.95, "AdamW's decay of the second moment")

    def __post_init__(self) -> None:
        for name, known in (
            ("mask", ("adaptive", "fixed", "gradual")),
            ("criterion", ("magnitude", "wanda")),
            ("decay_shape", ("annealed", "static")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {', '.join(known)}")
        if self.refresh < 1:
            raise ValueError(f"refresh is {self.refresh}; expected at least 1 step")
        if not 0 <= self.milestone <= 1:
            raise ValueError(f"milestone is {self.milestone}; expected a share of the steps from 0 to 1")
        for name in ("decay", "kl_weight", "ce_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; expected a positive number")
        if self.slorb_trained and self.slorb is None:
            raise ValueError("slorb_trained is True, but there is no SLoRB to train; give slorb=16 too")
        if self.mask == "gradual" and (self.slorb or self.transposable):
            raise ValueError("mask is 'gradual', which goes with neither slorb nor transposable masks; use 'adaptive'")
        self.rule = MaskRule.parse(self.pattern, self.transposable)
        self._tuning: _Tuning | None = None

    sparse = True  # the result is worth packing
    learning_rate: ClassVar[float] = 1e-4  # all weights are trained

    def check(self, model: nn.Module) -> None:
        """Raises ValueError when the pattern or SLoRB's blocks do not divide a weight, when it is fp16, or when the
        teacher has another vocabulary; `model` may be on the meta device."""
        for name, linear in _linears(model).items():
            outputs, inputs = linear.matrix.shape
            if linear.matrix.dtype == torch.float16:
                raise ValueError(f"model: {name} is torch.float16, too coarse to be trained; load it in bfloat16")
            self.rule.check(name, outputs, inputs)
            if self.slorb is not None and (self.slorb < 1 or inputs % self.slorb):
                raise ValueError(f"slorb is {self.slorb}; expected a divisor of the {inputs} inputs of {name}")
            if self.slorb is not None and linear.transposed:
                raise ValueError(f"slorb: {name} is a Conv1D, beside which it is not supported; leave it out")
        if self.kl_weight > 0 and self.teacher is not None:
            check_heads(model, open_skeleton(self.teacher))

    def check_steps(self, steps: int) -> None:
        """Raises ValueError when a training of so many steps never chooses the final masks (mask gradual)."""
        if self.mask != "gradual":
            return
        last = (steps - 1) // self.refresh * self.refresh  # of steps counted from 0, the last that chooses masks
        _, kept = schedules(self, steps)
        if round(kept(last)) != self.rule.n:
            raise ValueError(
                f"mask is 'gradual' with refresh {self.refresh} and milestone {self.milestone:g}: in steps={steps} the "
                f"last masks are those of step {last}, {round(kept(last))} of every {self.rule.m}, not {self.rule}; "
                "train more steps, or lower refresh or milestone"
            )

    def prepare(
        self, model: nn.Module, calibration: Sequence[Tensor] | None = None, resume: str | Path | None = None
    ) -> nn.Module:
        """The same model with masked linears, all of it trained, and a teacher beside it.

        Args:
            model: a causal language model without adapters; it is changed in place.
            calibration: token ids, each [B, T]; needed for the criterion wanda.
            resume: a checkpoint folder of `training.tune`; its masks must be of this pattern. A `Trainer` restores
                masks and moments of its own checkpoints without it.

        Raises:
            ValueError: a pattern that does not fit, no calibration, a teacher of another vocabulary, a checkpoint with
                masks of another pattern.
        """
        self.check(model)
        if resume is not None:
            _check_masks(Path(resume), self.rule if self.mask != "gradual" else None)
        self._tuning = _Tuning(self, model, calibration)
        return model

    def callbacks(self) -> list[TrainerCallback]:
        """The one that refreshes the masks and sets the decay."""
        return [_Callback(self._prepared("callbacks"))]

    def optimizer(self, args: TrainingArguments) -> tuple[type[MaskedAdamW], dict[str, Any]]:
        """For `Trainer(optimizer_cls_and_kwargs=...)`. Learning rate, beta1, epsilon and weight decay are those of
        `args`."""
        options = {"lr": args.learning_rate, "betas": (args.adam_beta1, self.beta2), "eps": args.adam_epsilon}
        return MaskedAdamW, {"masked": self._prepared("optimizer").masked(), **options}

    def finalize(self, model: nn.Module) -> nn.Module:
        """The model with its own linears again, masked weights zero. With SLoRB, which a stock linear cannot hold, the
        linears are packed instead (`SparseLinear`); that model too is saved and loaded by transformers after
        `import pyprune`. Under FSDP2 every process has to call it; what else is sharded stays so.

        Raises:
            RuntimeError: training ended before a gradual mask was final; or, with SLoRB, weights sharded by FSDP2.
        """
        self._prepared("finalize").finish(model)
        self._tuning = None  # it holds the teacher
        return model

    def _prepared(self, what: str) -> _Tuning:
        if self._tuning is None:
            raise RuntimeError(f"AST.{what}: call prepare(model) first")
        return self._tuning


def _linears(model: nn.Module) -> dict[str, Linear]:
    """The linears of the blocks, by their names in the model."""
    return {
        f"{block.name}.{linear.name}": linear
        for block in describe_blocks(model).blocks
        for branch in block.branches
        for linear in (*branch.reads, branch.write)
    }


@torch.no_grad()
def _input_norms(
    model: nn.Module, linears: dict[str, Linear], calibration: Sequence[Tensor] | None
) -> dict[str, Tensor]:
    """||x_j|| [in] of what each linear reads on the calibration batches."""
    if not calibration:
        raise ValueError("calibration: the criterion wanda needs token ids to look at; pass calibration=[ids, ...]")
    check_calibration(model, calibration)
    found: dict[str, InputNorm] = {}

    def observe(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2)
            found.setdefault(name, InputNorm(x)).add(x)

        return hook

    hooks = [linear.module.register_forward_pre_hook(observe(name)) for name, linear in linears.items()]
    training = model.training
    try:
        model.eval()
        for ids in calibration:
            model(input_ids=ids.to(next(model.parameters()).device), use_cache=False, logits_to_keep=1)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {name: norm.norm.float() for name, norm in found.items()}


def _check_masks(checkpoint: Path, rule: MaskRule | None) -> None:
    """Raises ValueError when a checkpoint has no masks or, given a rule, not those of the rule."""
    if not (checkpoint / STATE).exists():
        raise ValueError(
            f"resume: {checkpoint} has no {STATE}, so training.tune did not write it; a Trainer restores masks and "
            "moments of its own checkpoints by resume_from_checkpoint alone, leave resume out"
        )
    with safe_open(checkpoint / STATE, "pt") as file:
        masks = [name for name in file.keys() if name.endswith(".mask")]  # noqa: SIM118 (it is no dictionary)
        if not masks:
            raise ValueError(f"{checkpoint} has no masks: it is of a run without AST; train anew")
        for name in masks if rule else ():
            inputs = file.get_slice(name.removesuffix("mask") + "weight").get_shape()[1]
            if not rule.fits(file.get_tensor(name), inputs):  # type: ignore[union-attr]
                raise ValueError(f"{checkpoint}: {name} is not {rule}; resume with the pattern that the run began with")


def schedules(options: AST, steps: int) -> tuple[Schedule, Schedule]:
    """The decay of masked weights, and how many of every M a gradual mask keeps, over a training of that many steps."""
    milestone = max(1, round(options.milestone * steps))
    shape: Literal["linear", "constant"] = "linear" if options.decay_shape == "annealed" else "constant"
    return Schedule(0.0, options.decay, milestone, shape=shape), Schedule(options.rule.m, options.rule.n, milestone)


class _Tuning:
    """AST on one model: the masked linears in the place of its own, its teacher, and their schedule."""

    def __init__(self, options: AST, model: Any, calibration: Sequence[Tensor] | None) -> None:
        self.options, self.rule = options, options.rule
        self.stock = _linears(model)
        wanda = options.criterion == "wanda"
        norms = _input_norms(model, self.stock, calibration) if wanda else {}
        self.distillation = self._distil(model) if options.kl_weight > 0 else None
        self.layers = {name: self._mask(linear, norms.get(name)) for name, linear in self.stock.items()}
        for name, layer in self.layers.items():
            model.set_submodule(name, layer)
            self.stock[name].module.register_parameter("weight", None)  # else it would be kept when it is sharded
        model.requires_grad_(True)
        self.figures: dict[str, Tensor | float] = {}

    def masked(self) -> list[MaskedLinear]:
        """The layers."""
        return list(self.layers.values())

    def _distil(self, model: Any) -> Distillation:
        o = self.options
        teacher: Any = (
            copy.deepcopy(model)
            if o.teacher is None
            else open_model(o.teacher, str(model.dtype).removeprefix("torch."))
        )
        weights = Weights(o.kl_weight, o.ce_weight, o.temperature)
        return Distillation(model, teacher, weights)

    def _mask(self, linear: Linear, norm: Tensor | None) -> MaskedLinear:
        weight = linear.module.get_parameter("weight")
        if linear.transposed:
            weight = nn.Parameter(linear.matrix.contiguous())
        bias = getattr(linear.module, "bias", None)
        layer = MaskedLinear(weight, bias, self.rule, norm, linear.transposed)
        if self.options.slorb is not None:
            layer.boost(self.options.slorb, self.options.slorb_trained)
        if self.options.mask == "gradual":
            layer.mask.copy_(pack_bits(torch.ones_like(weight, dtype=torch.bool)))
            layer.first_mask.copy_(layer.mask)
        return layer

    def plan(self, max_steps: int) -> None:
        """Fixes the schedules for a training of that many steps."""
        self.options.check_steps(max_steps)
        self.decay, self.kept = schedules(self.options, max_steps)

    def begin(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Before `step`, counted from 0: the masks and the decay that hold for all of its passes."""
        decay = self.decay(step) if self.options.mask == "adaptive" else 0.0
        for group in optimizer.param_groups:
            group["masked_decay"] = decay
        self.figures = {"masked_decay": decay}
        if self.options.mask != "fixed" and step > 0 and step % self.options.refresh == 0:
            self.refresh(step)
        if self.distillation:
            self.distillation.reset()

    @torch.no_grad()
    def refresh(self, step: int) -> None:
        """Chooses all masks again. Notes the share of bits that changed, and that differ from the first mask."""
        n = round(self.kept(step)) if self.options.mask == "gradual" else self.rule.n
        if n == self.rule.m:
            return
        rule = MaskRule(n, self.rule.m, self.rule.transposable)
        flipped, distance, total = torch.zeros(()), torch.zeros(()), 0
        for layer in self.layers.values():
            scores = layer.scores()
            if self.options.mask == "gradual":
                scores.masked_fill_(~unpack_bits(layer.mask, layer.in_features), -1)
            bits, changed = rule.mask(scores, layer.mask)
            layer.mask.copy_(bits)
            flipped, distance = changed + flipped, count_flips(bits, layer.first_mask) + distance
            total += layer.weight.numel()
        self.figures |= {"flip_rate": flipped / total, "mask_distance": distance / total}

    def log(self) -> dict[str, float]:
        """The figures of the step."""
        parts = {"ce": self.distillation.ce, "kl": self.distillation.kl} if self.distillation else {}
        return {name: float(value) for name, value in (self.figures | parts).items()}

    @torch.no_grad()
    def finish(self, model: Any) -> None:
        """Puts the model's own linears back, their masked weights zero, or packed ones beside SLoRB's part."""
        for name, layer in self.layers.items():
            if not self.rule.fits(layer.mask, layer.in_features):
                raise RuntimeError(
                    f"AST.finalize: the mask of {name} is not {self.rule} yet; train until the milestone of a "
                    "gradual mask, and REFRESH steps more"
                )
        if self.options.slorb is not None and any(map(is_sharded, model.parameters())):
            raise RuntimeError(
                "AST.finalize: with slorb the weights are packed, which needs them whole, and FSDP2 has sharded them; "
                "load the whole state dict into a model prepared in one process, and finalize that"
            )
        if self.distillation:
            self.distillation.remove()
        if self.options.slorb is not None:
            sparsify(model, measure=False)
            return
        for name, layer in self.layers.items():
            linear = self.stock[name]
            linear.module.weight = nn.Parameter(linear.stored(layer.masked_weight()).contiguous())
            linear.module.bias = layer.bias
            model.set_submodule(name, linear.module)


class _Callback(TrainerCallback):
    """Drives the masks through the steps of a Trainer."""

    def __init__(self, tuning: _Tuning) -> None:
        self.tuning = tuning

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs["optimizer"]
        if not isinstance(getattr(optimizer, "optimizer", optimizer), MaskedAdamW):
            raise ValueError(
                f"the Trainer's optimizer is {type(optimizer).__name__}, which knows no masks; build it with "
                "Trainer(..., optimizer_cls_and_kwargs=ast.optimizer(args))"
            )
        if args.fp16:
            raise ValueError("fp16 training scales its gradients, which the masked decay is added to; use bf16=True")
        self.tuning.plan(state.max_steps)
        if args.bf16 and self.tuning.distillation:
            self.tuning.distillation.teacher.to(
                torch.bfloat16
            )  # what its products would round it to, in half the bytes

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tuning.begin(state.global_step, kwargs["optimizer"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.tuning.distillation and not self.tuning.distillation.used:
            raise ValueError(
                f"kl_weight is {self.tuning.options.kl_weight}, but this Trainer did not take its loss from the model, "
                "so nothing was distilled: label_smoothing_factor, compute_loss_func and TRL's fused loss are others; "
                "leave them off, use transformers.Trainer, or train with kl_weight=0"
            )

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs")
        if logs is not None and "loss" in logs:
            figures = self.tuning.log()
            logs |= figures  # for the callbacks behind this one
            state.log_history[-1] |= figures
