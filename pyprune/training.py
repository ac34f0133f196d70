"""The training loop: a stock `transformers.Trainer`, and what must hold around it.

A run that is stopped at any moment, by Ctrl-C, SIGTERM, SIGKILL or a full disk, continues from its newest complete
checkpoint to the same weights, bit for bit on one machine, as a run that was never stopped.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pyprune.console import console, is_tenth, progress_bar
from pyprune.data import TokenWindows
from pyprune.head_loss import HeadLoss, applies

log = logging.getLogger("pyprune")

# ------------------------------------------------------------------------------------------------------- checkpoints

MARKER = "complete.json"
STATE = "trained.safetensors"


def write_atomically(path: Path, text: str) -> None:
    """`path` holds either its old content or all of `text`, also after a crash of the machine."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes, each tensor once: trained parameters and persistent buffers (frozen weights are the
    base model's)."""
    persistent = model.state_dict().keys()
    state: dict[str, torch.Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return state | {name: buffer for name, buffer in model.named_buffers() if name in persistent}


def save_state(model: nn.Module, folder: Path) -> None:
    """Writes every trained parameter and persistent buffer, whatever library it comes from, to `folder`."""
    save_file({name: tensor.detach().contiguous() for name, tensor in _state(model).items()}, folder / STATE)


@torch.no_grad()
def load_state(model: nn.Module, folder: Path) -> None:
    """Copies what `save_state` wrote into the tensors of the same names. Raises ValueError, before anything is changed,
    when names or shapes are not the same."""
    saved, own = load_file(folder / STATE), _state(model)
    if odd := sorted(own.keys() ^ saved.keys()):
        raise ValueError(
            f"{folder} and the model differ in {len(odd)} trained tensors, the first is {odd[0]}; "
            f"{_RESUME_WITH_THE_SAME}"
        )
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(
                f"{folder}: {name} is {list(saved[name].shape)}, the model's {list(tensor.shape)}; "
                f"{_RESUME_WITH_THE_SAME}"
            )
    for name, tensor in own.items():
        tensor.copy_(saved[name])


_RESUME_WITH_THE_SAME = "resume with the model and options that the run began with, or train anew in another folder"


def resume_state(model: nn.Module, step: int, resume: Path | None) -> None:
    """For the beginning of a training at `step`: loads what a Trainer's `resume_from_checkpoint` leaves out, which
    knows the adapters alone. `resume` is the checkpoint that `prepare` was told of.

    Raises:
        ValueError: the training goes on from a checkpoint, and `prepare` was told of none, or of another one.
    """
    if step == 0:
        return
    if resume is None or step_of(resume) != step:
        told = "without resume" if resume is None else f"with resume={str(resume)!r}"
        raise ValueError(
            f"the Trainer goes on from step {step}, but prepare was called {told}; prepare a fresh model with "
            f"resume=Path(...) of checkpoint-{step}, and give the Trainer the same resume_from_checkpoint"
        )
    load_state(model, resume)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first. One is complete when its marker, written last, names files
    that are all there with the sizes that they had."""
    complete = (path for path in _numbered(folder) if _marker(path) is not None and _damage(path) is None)
    return sorted(complete, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimiser steps behind a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def _numbered(folder: Path) -> list[Path]:
    """Folders with the names that a Trainer gives its checkpoints."""
    return [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name[len("checkpoint-") :].isdigit()]


def _marker(checkpoint: Path) -> dict[str, Any] | None:
    """The `files` of a checkpoint with their sizes, and the `recipe` of its training. None: a save did not end."""
    try:
        marker = json.loads((checkpoint / MARKER).read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:  # it is written atomically, so no kill did that
        raise ValueError(f"{checkpoint / MARKER} is not what was written; move {checkpoint} away") from error
    if marker is None or "files" in marker:
        return marker
    return {"files": marker, "recipe": {}}  # before recipes were kept, it was the files alone


def _damage(checkpoint: Path) -> str | None:
    """What has happened to a checkpoint since it was complete: the first file that is not as it was. None: nothing."""
    sizes, marker = _sizes(checkpoint), _marker(checkpoint)
    for name, size in marker["files"].items() if marker else ():
        if sizes.get(name) != size:
            return f"{name} has {sizes[name]} bytes, not {size}" if name in sizes else f"{name} is missing"
    return None


def _is_own(checkpoint: Path) -> bool:
    """Whether `tune` began it; a kill may have come before the marker."""
    return (checkpoint / MARKER).exists() or not any(path.suffix != ".partial" for path in checkpoint.iterdir())


def _sizes(checkpoint: Path) -> dict[str, int]:
    files = (path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARKER)
    return {str(path.relative_to(checkpoint)): path.stat().st_size for path in sorted(files)}


def remove_partial(folder: Path) -> None:
    """Removes what a kill in the middle of a save left in `folder`; what others put there stays, and so does a
    checkpoint that was complete and has lost a file since."""
    for path in _numbered(folder):
        if _is_own(path) and _marker(path) is None:
            shutil.rmtree(path)


def _refuse_checkpoints_of_others(folder: Path) -> None:
    """They would be written over."""
    if foreign := sorted(path for path in _numbered(folder) if not _is_own(path)):
        raise FileExistsError(
            f"{foreign[0]} was not written by pyprune and cannot be resumed from; choose another output_dir, or move "
            "it away"
        )


def _warn_of_damage(folder: Path) -> None:
    """Says which checkpoints, newer than the one that training goes on from, have lost a file. Raises ValueError when
    there is none to go on from: what is left of them may be all that there is of hours."""
    good = latest_checkpoint(folder)
    for path in sorted(_numbered(folder), key=step_of):
        if (damage := _damage(path)) is None or (good and step_of(path) < step_of(good)):
            continue
        if good is None:
            raise ValueError(
                f"{path} was complete, but {damage}, and {folder} has no other checkpoint to go on from; put the file "
                "back, or move the folder away to begin anew"
            )
        log.warning("%s was complete, but %s: training goes on from %s and writes it anew", path, damage, good.name)


def _resumable(folder: Path, recipe: dict[str, Any], steps: int) -> Path | None:
    """The checkpoint that a training of this recipe goes on from, None for a fresh start. Removes half a checkpoint.

    Raises:
        ValueError: a training of another recipe or of more steps is in the folder, or damaged checkpoints alone.
        FileExistsError: a checkpoint of something else is.
    """
    _refuse_checkpoints_of_others(folder)
    remove_partial(folder)
    _warn_of_damage(folder)
    resume = latest_checkpoint(folder)
    if resume is None:
        return None
    known = _marker(resume)["recipe"]  # type: ignore[index]
    for key, value in recipe.items():
        if (before := known.get(key, value)) != value:
            raise ValueError(
                f"{key} is {value}, but {resume} was trained with {before}; go on with the same, or choose another "
                "output_dir"
            )
    if step_of(resume) > steps:
        raise ValueError(
            f"steps is {steps}, but training has come to {resume} already; give at least {step_of(resume)} steps, or "
            "choose another output_dir"
        )
    return resume


class _CompleteCheckpoint(TrainerCallback):
    """Marks a checkpoint as begun, adds the trained tensors and, last of all, a list of it; then removes older ones."""

    def __init__(self, keep: int, recipe: dict[str, Any]) -> None:
        self.keep, self.recipe = keep, recipe

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save:  # this callback is the last one that could ask for it
            checkpoint = _checkpoint(args, state)
            checkpoint.mkdir(parents=True, exist_ok=True)
            write_atomically(checkpoint / MARKER, "null")
            (checkpoint / STATE).unlink(missing_ok=True)  # of a damaged checkpoint of this step, else it would stay

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = _checkpoint(args, state)
        if not (checkpoint / STATE).exists():  # a method's own callback may have written it
            save_state(kwargs["model"], checkpoint)
        write_atomically(checkpoint / MARKER, json.dumps({"files": _sizes(checkpoint), "recipe": self.recipe}))
        for old in checkpoints(checkpoint.parent)[: -self.keep]:
            write_atomically(old / MARKER, "null")  # a kill inside the removal must not leave one that looks complete
            shutil.rmtree(old)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir, f"checkpoint-{state.global_step}")  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------- optimiser's state


class Change(Protocol):
    """How a parameter was cut or rotated: the same for its `exp_avg`, and `squared` for its `exp_avg_sq`."""

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor: ...

    def squared(self, tensor: torch.Tensor) -> torch.Tensor: ...


def carry_moments(optimizer: torch.optim.Optimizer | None, changes: Mapping[nn.Parameter, Change]) -> None:
    """Changes Adam's moments, or SGD's momentum, as their parameters were changed. Without an optimizer, nothing.
    `check_moments` says, earlier, whether an optimizer is of that kind."""
    for parameter, change in changes.items() if optimizer else ():
        state = optimizer.state.get(parameter, {})  # type: ignore[union-attr]
        for name, value in state.items():
            if _has_shape(value):
                state[name] = change.squared(value) if name == "exp_avg_sq" else change(value)


def check_moments(optimizer: torch.optim.Optimizer, otherwise: str) -> None:
    """Raises ValueError when the optimizer keeps what `carry_moments` cannot change: to be called after its first step,
    while the model is whole. `otherwise` are the options that leave the shapes alone."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if _has_shape(value) and name not in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                raise ValueError(
                    f"the Trainer's optimizer keeps {name!r}, which cannot follow the model into smaller shapes; use "
                    f"AdamW (optim='adamw_torch'), or {otherwise}"
                )


def _has_shape(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def check_arguments(args: TrainingArguments, otherwise: str | None) -> None:
    """Raises ValueError for a training in which a method that prunes under way would go wrong. `otherwise` is the
    option that leaves the shapes alone, None when they are."""
    if args.fp16:
        raise ValueError("fp16 training scales its gradients, which the method reads; use bf16=True, or fp32")
    if args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end would put the adapters of one step beside the masks and shapes of another; leave "
            "it off, or train fewer steps"
        )
    if args.deepspeed or args.fsdp:
        raise ValueError(
            f"{'deepspeed' if args.deepspeed else 'fsdp'} shards or steps parameters out of reach of the method's "
            "callback; train in one process, or by DistributedDataParallel"
        )
    if args.n_gpu > 1:
        raise ValueError(f"{args.n_gpu} GPUs are visible to one process, which {ONE_GPU}")
    if args.world_size > 1 and otherwise:
        raise ValueError(
            f"{args.world_size} processes train one model; DistributedDataParallel gathers gradients in buffers that "
            f"cannot follow it into smaller shapes, so use {otherwise}"
        )


ONE_GPU = "Trainer would copy the model to (DataParallel), without its hooks; set CUDA_VISIBLE_DEVICES to one of them"


# ------------------------------------------------------------------------------------------------ callbacks of the loop


class DivergedError(ArithmeticError):
    """The loss or the gradient became NaN or infinite; the last good checkpoint is kept."""


class InterruptedTraining(Exception):
    """Training was asked to stop and has written a checkpoint."""


class DivergenceGuard(TrainerCallback):
    """Stops at the first step whose loss or gradient norm is not finite, before a checkpoint of it can be written.
    Needs `logging_steps=1` and `logging_nan_inf_filter=False`, else the Trainer hides such losses."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs.get("logs") or {}
        for key in ("loss", "grad_norm"):
            value = logs.get(key, 0.0)
            if not math.isfinite(value):
                good = checkpoints(Path(args.output_dir))  # type: ignore[arg-type]
                kept = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
                raise DivergedError(
                    f"{key} is {value} at step {state.global_step} of {state.max_steps}; training stopped, {kept}; "
                    "try a smaller learning rate"
                )


class Metrics(TrainerCallback):
    """One line of JSON for every step in a file that a resumed run continues, and a progress bar.

    A line holds step, loss, grad_norm, learning_rate, tokens, seconds (both since the first step, over all
    interruptions) and whatever the callback of a method, called earlier, has put into the Trainer's `logs`.
    """

    def __init__(
        self, path: Path | None, stage: str, tokens_read: Callable[[int], int], first_step: int, progress: bool
    ) -> None:
        self.path, self.stage, self.tokens_read, self.first_step = path, stage, tokens_read, first_step
        self.seconds_before = _cut_metrics(path, stage, first_step) if path else 0.0
        self.start = time.monotonic()
        self.bar = (
            progress_bar("loss {task.fields[loss]:.3f}", "{task.fields[speed]:.0f} tokens/s") if progress else None
        )

    @property
    def seconds(self) -> float:
        """Time spent on the stage, over all interruptions."""
        return self.seconds_before + time.monotonic() - self.start

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start = time.monotonic()
        if self.bar:
            self.task = self.bar.add_task(
                self.stage, total=state.max_steps, completed=state.global_step, loss=math.nan, speed=0.0
            )
            self.bar.start()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, Any] = kwargs.get("logs") or {}
        if "loss" not in logs:  # the Trainer's summary at the end
            return
        line = {
            "stage": self.stage,
            "step": state.global_step,
            **{key: value for key, value in logs.items() if key != "epoch"},
            "tokens": self.tokens_read(state.global_step),
            "seconds": round(self.seconds, 3),
        }
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if self.bar:
            tokens = self.tokens_read(state.global_step) - self.tokens_read(self.first_step)
            speed = tokens / (time.monotonic() - self.start)
            self.bar.update(self.task, completed=state.global_step, loss=logs["loss"], speed=speed)
            if not console.is_terminal and is_tenth(state.global_step, state.max_steps):
                step, total, loss = state.global_step, state.max_steps, logs["loss"]
                log.info("%s: step %d of %d, loss %.3f, %.0f tokens/s", self.stage, step, total, loss, speed)

    def close(self) -> None:
        """Ends the progress bar."""
        if self.bar:
            self.bar.stop()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # a complete line ends in a newline
    return [json.loads(line) for line in lines]


def _cut_metrics(path: Path, stage: str, step: int) -> float:
    """Removes the stage's lines behind `step`, which will be written again; returns the seconds spent up to there."""
    lines = read_metrics(path)
    kept = [line for line in lines if line["stage"] != stage or line["step"] <= step]
    if path.exists():
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
    return max((line["seconds"] for line in kept if line["stage"] == stage), default=0.0)


class _StopOnSignal(TrainerCallback):
    """On SIGINT or SIGTERM finishes the step, writes a checkpoint and stops. A second signal acts at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
            yield
            return
        self.previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        try:
            yield
        finally:
            self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.received is not None:
            control.should_save = control.should_training_stop = True


# ------------------------------------------------------------------------------------------------------------- the loop


CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


@dataclass(frozen=True)
class Tuned:
    """What `tune` did: optimiser steps, tokens read (padding does not occur) and seconds, over all interruptions."""

    steps: int
    tokens: int
    seconds: float


def tune(
    model: nn.Module,
    dataset: TokenWindows,
    output_dir: str | Path,
    *,
    steps: int,
    batch_size: int = 4,
    learning_rate: float = 1e-3,
    callbacks: Sequence[TrainerCallback] = (),
    optimizer: Callable[[TrainingArguments], tuple[type[torch.optim.Optimizer], dict[str, Any]]] | None = None,
    gradient_checkpointing: bool = False,
    seed: int = 0,
    save_every: int | None = None,
    metrics: Path | None = None,
    stage: str = "tune",
    progress: bool = False,
    **arguments: Any,
) -> Tuned:
    """Trains what requires a gradient in `model` for `steps` optimiser steps and leaves the result in `model`.

    Checkpoints go to `output_dir`/checkpoint-STEP, after every `save_every` steps (default: a tenth of them) and at
    the end (0: only when a signal stops the training); the newest two are kept. If `output_dir` holds a complete one,
    training continues behind it: `model` must then be prepared as it was at that step
    (`methods.Method.prepare(resume=...)`).

    Args:
        dataset: windows of equal length; a batch takes `batch_size` of them, in an order that follows from `seed`.
        callbacks: those of a method; they may add figures to `logs` in `on_log`, which then stand in `metrics`.
        optimizer: the class of a method's own optimiser and its arguments, from those of the training (default: AdamW).
        metrics: the file for one JSON line a step, each with the name `stage`.
        arguments: further fields of `transformers.TrainingArguments`.

    Raises:
        ValueError: the dataset is smaller than a batch, `output_dir` holds checkpoints of another model, of other
            options or of more steps, or damaged ones alone, or several processes or GPUs would train; a Trainer with
            the method's callbacks is for these.
        FileExistsError: a checkpoint of something else is in `output_dir`.
        DivergedError: loss or gradient not finite.
        InterruptedTraining: SIGINT or SIGTERM came; a checkpoint of the last step was written.
        torch.OutOfMemoryError: in the words of this library: what to lower.
    """
    output_dir = Path(output_dir)
    if len(dataset) < batch_size:
        raise ValueError(f"the data gives {len(dataset)} windows, fewer than batch_size={batch_size}; give more text")
    training_arguments = TrainingArguments(
        **{
            "output_dir": str(output_dir),
            "max_steps": steps,
            "per_device_train_batch_size": batch_size,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "cosine",
            "seed": seed,
            "save_strategy": "no" if save_every == 0 else "steps",
            "save_steps": save_every or max(1, steps // 10),
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "dataloader_drop_last": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "remove_unused_columns": False,
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": _mixes(model),
            "use_cpu": not torch.cuda.is_available(),
            **(CHECKPOINTING if gradient_checkpointing else {}),
            **arguments,
        }
    )
    if training_arguments.world_size > 1:
        raise ValueError(
            f"{training_arguments.world_size} processes were started, and tune works in one; use a Trainer with the "
            "method's callbacks"
        )
    if training_arguments.n_gpu > 1:
        raise ValueError(f"{training_arguments.n_gpu} GPUs are visible, which {ONE_GPU}")
    recipe = _recipe(training_arguments, dataset)
    resume = _resumable(output_dir, recipe, steps)
    if resume is not None:
        load_state(model, resume)
    done = step_of(resume) if resume else 0
    tokens_read = _tokens_read(training_arguments, dataset)
    logger = Metrics(metrics, stage, tokens_read, done, progress)
    stop = _StopOnSignal()
    trainer = Trainer(
        model=model,
        args=training_arguments,
        train_dataset=dataset,
        optimizer_cls_and_kwargs=optimizer(training_arguments) if optimizer else None,
        callbacks=[*callbacks, DivergenceGuard(), logger, stop, _CompleteCheckpoint(2, recipe)],
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for results
    if done < steps:
        try:
            with (
                stop.listening(),
                contextlib.closing(logger),
                _clear_disk_full(output_dir),
                _clear_out_of_memory(),
                _head_loss(model),
            ):
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        finally:
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # takes the autocast off it
            remove_partial(output_dir)
        done = trainer.state.global_step
    if done < steps:
        raise InterruptedTraining(f"stopped at step {done} of {steps}; the checkpoint of this step is in {output_dir}")
    model.zero_grad(set_to_none=True)
    return Tuned(steps, tokens_read(steps), logger.seconds)


def _recipe(args: TrainingArguments, dataset: TokenWindows) -> dict[str, Any]:
    """What a resumed training must have in common with its beginning: which batches it reads, in which order, and the
    learning rate, which the Trainer restores, so that another one would be ignored."""
    return {
        "batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "windows": list(dataset.ids.shape),
    }


def _tokens_read(args: TrainingArguments, dataset: TokenWindows) -> Callable[[int], int]:
    """How many tokens so many steps read. No step of the Trainer reaches across epochs: the last one of each takes the
    batches that are left."""
    windows, length = dataset.ids.shape
    if args.dataloader_drop_last:
        windows -= windows % args.per_device_train_batch_size
    whole = args.per_device_train_batch_size * args.gradient_accumulation_steps
    an_epoch = math.ceil(windows / whole)
    return lambda steps: (steps // an_epoch * windows + steps % an_epoch * whole) * length


def _mixes(model: nn.Module) -> bool:
    """Whether fp32 adapters lie on bf16 weights. PEFT leaves their products in fp32, on a copy of every activation;
    autocast makes them bf16, as the products that they are added to."""
    dtypes = {trained: {p.dtype for p in model.parameters() if p.requires_grad is trained} for trained in (True, False)}
    return torch.float32 in dtypes[True] and torch.bfloat16 in dtypes[False]


@contextlib.contextmanager
def _head_loss(model: nn.Module) -> Iterator[None]:
    """The model's loss from its hidden states, where it is the same: nobody reads the logits of all tokens here."""
    loss = HeadLoss(model) if applies(model) else None
    try:
        yield
    finally:
        if loss:
            loss.remove()


@contextlib.contextmanager
def _clear_disk_full(folder: Path) -> Iterator[None]:
    """Turns what a full disk makes torch, safetensors and the system raise, each with words of its own ("unexpected
    pos", "iostream error"), into one OSError that says what is kept."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reported = getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)
        if not reported and shutil.disk_usage(folder).free > 1 << 20:
            raise
        remove_partial(folder)
        good = checkpoints(folder)
        kept = f"{good[-1]} is complete, free space and resume" if good else "free space and start again"
        raise OSError(errno.ENOSPC, f"the disk filled while a checkpoint was written to {folder}; {kept}") from error


@contextlib.contextmanager
def _clear_out_of_memory() -> Iterator[None]:
    """Adds to the allocator's words what a training can do about it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"out of memory in training ({str(error).splitlines()[0]}); begin anew with a smaller batch size and as "
            "much more accumulation, which is the same step, with gradient checkpointing, or with a shorter window"
        ) from error


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint in `folder`, for `Method.prepare(resume=...)`."""
    found = checkpoints(Path(folder))
    return found[-1] if found else None
