"""LoRAPrune: prune heads and MLP channels while LoRA-tuning, by LoRA's own gradients (arXiv 2305.18403).

Groups are scored at every optimiser step (`criteria.lora_scores`, or by their activations), a moving average decides,
and a cubic schedule masks more and more of them until the model has its target shape, exactly. What is masked is cut
out of the model, so that the steps behind become cheaper. docs/structured.md has the formulas, and says where this
departs from the authors' code.
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
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pyprune import criteria, plan, removal, surgery
from pyprune.architectures import Decoder, describe, unwrap, weight_of
from pyprune.methods import option
from pyprune.methods.lora import LoRA
from pyprune.schedules import Schedule
from pyprune.training import carry_moments, check_arguments, check_moments, resume_state, save_state

STRUCTURE = "loraprune.safetensors"  # what `prepare(resume=...)` needs before the trained tensors can be loaded
CRITERIA = ("lora", "activation")  # those that a training step has all figures of
SENTINEL = 2.0**-40  # a gradient that clipping scales like all others, and that adds nothing to their norm


@dataclass
class Structured(LoRA):
    """What all methods that prune heads and MLP channels share."""

    target: str = option("params=0.75", "the model that is left: params= or bytes= (a share or a number), or a shape")
    axes: str = option("heads,channels", "what may shrink, separated by commas")
    round_to: int = option(64, "channels that are left are a multiple of this, which hardware likes")
    uniform: bool = option(True, "the same widths in every block, as stock code wants")

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = plan.Target.parse(self.target)
        if wanted.kind == "latency" or not set(wanted.shape) | set(self.axes.split(",")) <= {"heads", "channels"}:
            raise ValueError(
                f"target is {self.target!r} and axes {self.axes!r}; expected heads and channels, and params, bytes or "
                "a shape (`pyprune plan` finds the shape for a latency)"
            )
        self.rules(2)

    def rules(self, blocks: int) -> plan.Rules:
        """The rules of the plan. With uneven widths, the first tenth of the blocks and the last one stay whole."""
        skip = () if self.uniform else plan.default_skip(blocks)
        return plan.Rules(tuple(self.axes.split(",")), self.uniform, self.round_to, skip)

    def widths(self, model: nn.Module) -> plan.Widths:
        """The shape that meets the target. Raises ValueError when there is none."""
        decoder, wanted = describe(model), plan.Target.parse(self.target)
        return plan.widths_for(decoder, wanted, self.rules(len(decoder.blocks)))

    def check(self, model: nn.Module) -> None:
        """Raises ValueError when the model cannot meet the target; `model` may be on the meta device."""
        self.widths(model)


@dataclass
class LoRAPrune(Structured):
    """Pruning guided by low-rank gradients; satisfies `Method`.

    model = loraprune.prepare(model)
    Trainer(model, ..., callbacks=[loraprune.callback()]).train()
    loraprune.finalize(model).save_pretrained("small")

    From Python `criterion` may also be a function (`criteria.Criterion`): at every scored step, behind its backward
    passes and without gradients, it gets the model and a list of the token ids [B, T] that the last forward pass read,
    and returns a score for every group that is left.
    """

    criterion: str | criteria.Criterion = option(
        "lora", "how important a group is: lora (the paper's) or activation (Minitron's, of the training's own passes)",
        choices=list(CRITERIA),
    )  # fmt: skip
    warmup_share: float = option(0.1, "share of the steps before the first group is masked")
    cooldown_share: float = option(0.1, "share of the steps at the end, in the final shape")
    mask_every: int = option(10, "steps between choices of what is masked")
    decay: float = option(0.9, "of the moving average of scores")
    milestones: int = option(
        3, "how often masked groups are cut out while the ratio rises; 0: only when all is trained"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dora:
            raise ValueError("dora is True; LoRAPrune's criterion is that of LoRA's gradients, so leave it off")
        criteria.check_known(self.criterion, CRITERIA)
        for name in ("warmup_share", "cooldown_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share of the steps, 0 up to 1")
        if self.warmup_share + self.cooldown_share >= 1:
            raise ValueError("warmup_share and cooldown_share leave no step to prune in; together they must be below 1")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}; expected 0 up to, not including, 1")
        for name, least in (("mask_every", 1), ("milestones", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {least}")
        self._tuning: _Tuning | None = None

    def check_steps(self, steps: int) -> None:
        """Raises ValueError when a training of so many steps has none to prune in."""
        schedule(self, steps)

    def prepare(
        self, model: nn.Module, calibration: Sequence[Tensor] | None = None, resume: str | Path | None = None
    ) -> nn.Module:
        """Adds LoRA to every linear of the blocks, and hooks that mask heads and channels.

        Args:
            model: a causal language model of a known family, without adapters; it is changed in place.
            calibration: not needed.
            resume: a checkpoint folder of a run with this method, from which the Trainer will go on
                (`resume_from_checkpoint`, or `training.tune`): this makes the shapes right, and its callback loads
                what it trained.

        Raises:
            ValueError: the target cannot be met, or `resume` is of another model or target; nothing was changed.
        """
        self.refuse_adapters(model)
        groups = describe(model).groups()
        widths, dense = self.widths(model), {g.name: g.count for g in groups}
        if self.milestones and any(surgery.quantised(g.writer.linear) for g in groups):
            raise ValueError(
                f"milestones is {self.milestones}, but the model's weights are quantised, which cannot be cut in "
                "training; use milestones=0: they are dequantised and cut when all is trained"
            )
        final = {g.name: getattr(widths, g.axis)[g.block] for g in groups}
        resume = Path(resume) if resume else None
        present = _resumed(resume, dense, final) if resume else {name: torch.arange(n) for name, n in dense.items()}
        removal.remove_groups(model, {name: index for name, index in present.items() if len(index) < dense[name]})
        model = self.adapt(model)
        self._tuning = _Tuning(self, model, dense, final, present)
        self._tuning.resume = resume
        return model

    def callback(self) -> TrainerCallback:
        """The callback for the Trainer that trains what `prepare` returned."""
        return _Callback(self._prepared("callback"))

    def callbacks(self) -> list[TrainerCallback]:
        """`callback`, in a list."""
        return [self.callback()]

    def finalize(self, model: nn.Module) -> nn.Module:
        """Cuts what is masked and folds the adapters: a stock model (with uniform widths) of the target's shape.

        Raises:
            RuntimeError: training ended before the target was reached.
        """
        final = self._prepared("finalize").finish(model)
        self._tuning = None  # it holds the model
        return final

    def _prepared(self, what: str) -> _Tuning:
        if self._tuning is None:
            raise RuntimeError(f"LoRAPrune.{what}: call prepare(model) first")
        return self._tuning


def _resumed(checkpoint: Path, dense: dict[str, int], final: dict[str, int]) -> dict[str, Tensor]:
    """What a checkpoint's model still has of each group. Raises ValueError when it is of another model or target."""
    try:
        saved = load_file(checkpoint / STRUCTURE)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{checkpoint} is not a checkpoint of LoRAPrune: {error}") from error
    for what, counts in (("model", dense), ("target", final)):
        before = {name.partition("/")[2]: int(n) for name, n in saved.items() if name.startswith(f"{what}/")}
        if before != counts:
            name = min(name for name in before.keys() | counts.keys() if before.get(name) != counts.get(name))
            raise ValueError(
                f"{checkpoint} is of a run with another {what}: {name} had {before.get(name)} groups, now it has "
                f"{counts.get(name)}; resume with the same model and target, or start a new run"
            )
    return {name: saved[f"present/{name}"] for name in dense}


class _Tuning:
    """LoRAPrune on one model: masks, scores, and what happens to them along the schedule."""

    def __init__(
        self,
        options: LoRAPrune,
        model: nn.Module,
        dense: dict[str, int],
        final: dict[str, int],
        present: dict[str, Tensor],
    ) -> None:
        self.options, self.model, self.dense, self.final, self.present = options, model, dense, final, present
        decoder = describe(model)
        device = weight_of(decoder.embedding).device
        self.parts = nn.Module()  # in the model, so that they move and are saved with it
        for name, count in dense.items():
            self.parts.register_buffer(f"average_{name}", torch.zeros(count, device=device))
            self.parts.register_buffer(f"alive_{name}", torch.ones(count, device=device))
        self.parts.register_buffer("skipped_steps", torch.zeros((), dtype=torch.long, device=device))
        self.sentinel = self.parts.sentinel = nn.Parameter(torch.zeros(1, device=device))
        unwrap(model).add_module("loraprune", self.parts)
        _ignore_in_ddp(model, "loraprune.sentinel")
        self.masks: dict[str, Tensor | None] = dict.fromkeys(dense)
        self.left = dict(dense)  # groups that count
        self.resume: Path | None = None
        self.squares: dict[str, Tensor] = {}  # of this step's activations
        self.ids: list[Tensor] = []  # what the last forward pass read, for a criterion that is a function
        self.watching = False
        self.hooks = [g.writer.linear.register_forward_pre_hook(self._hook(g.name)) for g in decoder.groups()]
        if callable(options.criterion):
            self.hooks.append(decoder.embedding.register_forward_pre_hook(self._keep_ids))

    def _hook(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if self.watching and module.training:  # recomputed passes count twice, which changes no order
                self.squares[name] = self.squares.get(name, 0) + criteria.activation_squares(args[0])
            mask = self.masks[name]
            return None if mask is None else (args[0] * mask.to(args[0].dtype), *args[1:])

        return hook

    def _keep_ids(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module.training:
            self.ids = [args[0]]

    def alive(self, name: str) -> Tensor:
        """1 for groups that count, 0 for masked ones [dense count]."""
        return self.parts.get_buffer(f"alive_{name}")

    def average(self, name: str) -> Tensor:
        """The moving average of scores [dense count]."""
        return self.parts.get_buffer(f"average_{name}")

    @property
    def decoder(self) -> Decoder:
        """The model as it is now."""
        return describe(self.model)

    def begin(self) -> None:
        """Before the first step, when the model is where it will be trained and a resumed run has loaded `alive`."""
        self.present = {name: index.to(self.sentinel.device) for name, index in self.present.items()}
        self.count()
        self.renew_masks()

    def count(self) -> None:
        """Reads from the device, once for all, how many groups count; `mask` keeps the numbers from then on."""
        counts = torch.stack([self.alive(name).sum() for name in self.dense]).tolist()
        self.left = dict(zip(self.dense, map(int, counts), strict=True))

    def renew_masks(self) -> None:
        """Makes the masks in the forward pass those of `alive`; None where nothing that is there is masked."""
        for groups in self.decoder.groups():
            present = self.present[groups.name]
            if self.left[groups.name] == len(present):
                self.masks[groups.name] = None
            else:
                self.masks[groups.name] = self.alive(groups.name)[present].repeat_interleave(groups.writer.width)

    def begin_step(self, scored: bool) -> None:
        """Before a step's first pass: watches its activations, if they count, and sends a gradient of known size, which
        clipping will scale."""
        self.squares = {}
        self.watching = scored and self.options.criterion == "activation"
        self.sentinel.grad = torch.full_like(self.sentinel, SENTINEL)

    def take_clip_factor(self) -> float:
        """What clipping has multiplied this step's gradients with. The optimizer then leaves the sentinel alone."""
        gradient, self.sentinel.grad = self.sentinel.grad, None
        return 1.0 if gradient is None else float(gradient) / SENTINEL

    @torch.no_grad()
    def score(self) -> None:
        """Moves the averages by the scores of this step's gradients or activations, the mean over all processes. A step
        whose scores are not finite is left out and counted, both on the device: nothing waits for it."""
        clipped = self.take_clip_factor()
        groups = self.decoder.groups()
        alive = {g.name: self.alive(g.name)[self.present[g.name]] for g in groups}
        if callable(self.options.criterion):
            found = criteria.score(self.model, self.ids, self.options.criterion)
            if missing := [g.name for g in groups if g.name not in found]:
                raise ValueError(f"the criterion's scores lack {', '.join(missing)}; score every group that is left")
            scores = {g.name: found[g.name].to(self.sentinel.device) for g in groups}
        elif self.options.criterion == "activation":
            scores = criteria.activation_scores(groups, self.squares)
        else:
            scores = criteria.lora_scores(groups, clipped, alive)
        flat = _mean_over_processes(torch.cat(list(scores.values())))
        finite = torch.isfinite(flat).all()
        self.parts.get_buffer("skipped_steps").add_(~finite)
        for g, values in zip(groups, flat.split([g.count for g in groups]), strict=True):
            average, there = self.average(g.name), self.present[g.name]
            moved = self.options.decay * average[there] + (1 - self.options.decay) * values.to(average)
            average[there] = torch.where(finite, moved, average[there])

    @torch.no_grad()
    def mask(self, share: float) -> None:
        """Masks the groups of lowest average until `share` of all that is to go has gone. None comes back."""
        rankings = torch.cat([self.average(name).masked_fill(self.alive(name) == 0, -math.inf) for name in self.dense])
        split = rankings.cpu().split(list(self.dense.values()))
        for (name, count), ranking in zip(self.dense.items(), split, strict=True):
            left = count - math.floor(share * (count - self.final[name]) + 0.5)
            self.left[name] = min(left, self.left[name])
            self.alive(name).zero_()[plan.best(ranking, self.left[name])] = 1
        self.renew_masks()

    @torch.no_grad()
    def cut(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Removes masked groups from the model, and their share of the optimizer's moments."""
        left = {name: self.alive(name)[index].cpu() for name, index in self.present.items()}
        kept = {name: flags.nonzero().flatten() for name, flags in left.items() if not flags.all()}
        changes = removal.remove_groups(self.model, kept)
        self.present |= {name: self.present[name][index] for name, index in kept.items()}
        carry_moments(optimizer, changes)
        self.renew_masks()

    @property
    def done(self) -> bool:
        """Whether the model's masked shape is the target's."""
        return self.left == self.final

    def share_left(self) -> float:
        """Groups that count, over all that there were."""
        return sum(self.left.values()) / sum(self.dense.values())

    def figures(self) -> dict[str, float]:
        """For the log."""
        return {"groups_left": self.share_left(), "scores_skipped": int(self.parts.get_buffer("skipped_steps"))}

    def save(self, folder: Path) -> None:
        """Writes what `prepare(resume=folder)` needs."""
        counts = {"model": self.dense, "target": self.final}
        tensors = {f"{what}/{name}": torch.tensor(n) for what, each in counts.items() for name, n in each.items()}
        save_file(tensors | {f"present/{name}": index for name, index in self.present.items()}, folder / STRUCTURE)

    def finish(self, model: nn.Module) -> nn.Module:
        self.count()  # a resumed run that had nothing left to train has loaded `alive` since
        if not self.done:
            raise RuntimeError(
                f"LoRAPrune.finalize: training has masked {1 - self.share_left():.0%} of the groups and not reached "
                "the target yet; train to the end of the schedule"
            )
        for hook in self.hooks:
            hook.remove()
        del unwrap(model).loraprune
        stock = surgery.fold_adapters(model)
        left = {name: self.alive(name)[index].cpu().nonzero().flatten() for name, index in self.present.items()}
        removal.remove_groups(stock, left)
        return surgery.settle_config(stock)


def _mean_over_processes(values: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
        values = values / torch.distributed.get_world_size()
    return values


class _Callback(TrainerCallback):
    """Drives the masks through the steps of a Trainer. Steps are counted from 1."""

    def __init__(self, tuning: _Tuning) -> None:
        self.tuning = tuning

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        options = self.tuning.options
        check_arguments(args, "milestones=0" if options.milestones else None)
        self.schedule, self.events, self.cuts = schedule(options, state.max_steps)
        resume_state(self.tuning.model, state.global_step, self.tuning.resume)
        self.tuning.begin()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tuning.begin_step(state.global_step < self.schedule.milestone)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step + 1
        if step > self.schedule.milestone:
            self.tuning.sentinel.grad = None  # there for the norm of gradients only, whose sum has its order by it
            return
        self.tuning.score()
        if step in self.events:
            self.tuning.mask(self.schedule(step))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step in self.cuts | ({1} if self.cuts else set()):
            check_moments(kwargs["optimizer"], "milestones=0")
        if state.global_step in self.cuts:
            self.tuning.cut(kwargs["optimizer"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs")
        if logs is not None and "loss" in logs:
            figures = self.tuning.figures()
            logs |= figures  # for the callbacks behind this one
            state.log_history[-1] |= figures

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"  # type: ignore[arg-type]
        self.tuning.save(folder)
        save_state(self.tuning.model, folder)


def schedule(options: LoRAPrune, steps: int) -> tuple[Schedule, set[int], set[int]]:
    """The share of what goes that has gone at a step, the steps that choose masks, and those behind which masked groups
    are cut out. The last choice is at the end of the ramp, where the share is exactly one.

    Raises:
        ValueError: too few steps for a ramp.
    """
    begin, end = math.ceil(options.warmup_share * steps), steps - math.ceil(options.cooldown_share * steps)
    if begin >= end:
        raise ValueError(f"{steps} steps leave none to prune in behind {begin} of warm-up; train more steps")
    events = {step for step in range(begin + 1, end) if step % options.mask_every == 0} | {end}
    ideal = [begin + (end - begin) * (i + 1) / options.milestones for i in range(options.milestones)]
    return (
        Schedule(0.0, 1.0, end, begin),
        events,
        {min(event for event in events if event >= least - 1e-9) for least in ideal},
    )


def _ignore_in_ddp(model: nn.Module, suffix: str) -> None:
    """Tells DistributedDataParallel that a parameter never takes part in a forward pass."""
    names = [name for name, _ in model.named_parameters() if name.endswith(suffix)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
