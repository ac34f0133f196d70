"""One run, one folder: config.json, commands.jsonl, log.txt, metrics.jsonl, stages/, checkpoints/, summary.json and
model/ (a sparse result: dense/ and packed/). `pyprune report` reads it.

A run is a row of stages. A stage that is done has left one record, written atomically, and a resumed run skips it; a
stage that trains goes on from its newest checkpoint. So a run that was stopped ends as one that was not.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import gc
import hashlib
import json
import logging
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyprune import checkpoint, evaluation, surgery
from pyprune.architectures import describe, describe_blocks, size_of
from pyprune.data import Corpus, DataError, encode, held_out_stream
from pyprune.info import commit, processor, version_of
from pyprune.methods import LEARNING_RATE, Method, like, option
from pyprune.models import open_model, open_skeleton, open_tokenizer
from pyprune.plan import Widths
from pyprune.training import Tuned, latest_checkpoint, tune, write_atomically

log = logging.getLogger("pyprune")

BASELINES = ("lora", "prune-then-tune")


# --------------------------------------------------------------------------------------------------------- the folder


class RunError(ValueError):
    """A run folder that cannot be used; nothing in it was changed."""


class Run:
    """A run folder that this process holds; use `open_run`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics = folder / "metrics.jsonl"
        self.model = folder / "model"
        self.dense, self.packed = folder / "dense", folder / "packed"  # of a sparse result, in place of `model`

    def checkpoints(self, stage: str) -> Path:
        """Where a stage that trains keeps its checkpoints."""
        return self.folder / "checkpoints" / stage

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record of a stage: what `work` returned, and `seconds`. Done once, however often the run is resumed."""
        path = self.folder / "stages" / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        log.info("%s: begins", name)
        start = time.monotonic()
        record = {**work(), "seconds": round(time.monotonic() - start, 3)}
        write_json(path, record)
        log.info("%s: done in %.0f s: %s", name, record["seconds"], _brief(record))
        return record


@contextmanager
def open_run(
    folder: str | Path, config: dict[str, Any], resume: bool, command: Sequence[str] | None = None
) -> Iterator[Run]:
    """A run in `folder`, new or resumed. `config` is what defines the result; it is kept in config.json. Each time, a
    line of commands.jsonl says when, by which `command` (words; None: from Python), and with which versions.

    Raises RunError when the folder is not empty and `resume` was not asked for (what a run left that failed before its
    first result does not count), is no run folder, belongs to a run with another configuration (the first key that
    differs is named), or is in use by another process.
    """
    folder = Path(folder)
    check_folder(folder, config, resume)
    before = (folder / "config.json").exists()
    for sub in ("stages", "checkpoints"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    with _locked(folder / ".lock"):
        if not resume or not before:
            write_json(folder / "config.json", config)
        _note_command(folder / "commands.jsonl", command)
        handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        loggers = [log, logging.getLogger("py.warnings")]
        for logger in loggers:
            logger.addHandler(handler)
        if resume and not before:
            log.warning("--resume: there is no run in %s, so a new one begins", folder)
        try:
            yield Run(folder)
        except BaseException as error:
            log.error("stopped by %s", f"{type(error).__name__}: {error}".rstrip(": "))
            raise
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
            handler.close()


def check_folder(folder: Path, config: dict[str, Any], resume: bool) -> None:
    """Raises RunError when a run of this configuration cannot begin or go on in `folder`; changes nothing."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"--out {folder} is a file; name a folder")
    if not folder.is_dir() or not any(folder.iterdir()) or (not resume and _is_void(folder)):
        return
    if not resume:
        raise RunError(f"--out {folder} is not empty; continue it with --resume, or name another folder")
    path = folder / "config.json"
    if not path.exists():
        if {entry.name for entry in folder.iterdir()} - {"stages", "checkpoints", ".lock", ".config.json.partial"}:
            raise RunError(f"--out {folder} is not a run folder (no config.json), so it cannot be resumed")
        return  # killed before the configuration was written
    before, now = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(config))
    other = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if other:
        key = "method" if "method" in other else other[0]  # another method has other options too
        raise RunError(
            f"--resume: {key} was {before.get(key)!r} and is now {now.get(key)!r}; resume {folder} with the same "
            "options, or name another folder"
        )


def _is_void(folder: Path) -> bool:
    """Whether all that is in a folder is the beginning of a run without a result, which another may write over."""
    begun, empty = {"config.json", "commands.jsonl"}, {"log.txt", ".lock", ".config.json.partial"}
    subfolders = {"stages", "checkpoints"}
    if not begun <= {entry.name for entry in folder.iterdir()} <= begun | empty | subfolders:
        return False
    return not any(path.is_file() for name in subfolders for path in (folder / name).rglob("*"))


def _note_command(path: Path, command: Sequence[str] | None) -> None:
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    line = {"started": started, "command": None if command is None else list(command), **environment()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock that ends with the process, so that no two of them write one run."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{path.parent} is in use by another pyprune process") from error
        yield


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, atomically. A full disk leaves the old file and says so."""
    try:
        write_atomically(path, json.dumps(value, indent=2) + "\n")
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(errno.ENOSPC, f"the disk is full: {path} was not written; free space and resume") from error
        raise


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, so that a resumed run notices other data under the same name."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _brief(record: dict[str, Any]) -> str:
    numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
    numbers |= {"perplexity": record["perplexity"]["value"]} if "perplexity" in record else {}
    return ", ".join(
        f"{key} {value:,}" if type(value) is int else f"{key} {value:.6g}" for key, value in numbers.items()
    )


# --------------------------------------------------------------------------------------------------------- the recipe


@dataclasses.dataclass
class Recipe:
    """What is the same for the method and for the baselines it is compared with."""

    steps: int = option(200, "optimiser steps")
    batch_size: int = option(4, "windows in one forward pass")
    accumulate: int = option(1, "forward passes in one optimiser step")
    window: int = option(256, "tokens in a training window")
    learning_rate: float | None = option(
        None, "peak learning rate (default: the method's own, 1e-3 for LoRA, 1e-4 where all weights are trained)"
    )
    warmup: int = option(10, "steps over which the learning rate rises")
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, more time")
    dtype: str = option("auto", "dtype of the model's weights", choices=["auto", "float32", "bfloat16", "float16"])
    seed: int = option(0, "seed of everything that is random")
    save_every: int | None = option(None, "steps between checkpoints (default: a tenth of the steps; 0: none)")
    calibration_windows: int = option(32, "training windows that calibrate a method, read without gradients")
    eval_window: int = option(512, "tokens in a window that measures perplexity")
    eval_stride: int | None = option(None, "tokens between these windows (default: the window, no overlap)")
    eval_tokens: int | None = option(None, "held-out tokens to measure on (default: all)")
    prompt_tokens: int = option(512, "tokens of the prompt that measures speed")
    new_tokens: int = option(32, "tokens decoded to measure speed")
    repeats: int = option(5, "repeats of the measurement of speed (0: it is not measured)")

    def __post_init__(self) -> None:
        ones = dict.fromkeys(("steps", "batch_size", "accumulate", "calibration_windows"), 1)
        zeros = dict.fromkeys(("warmup", "seed", "save_every", "repeats"), 0)
        evaluation.check_recipe(self, window=2, **ones, **zeros)
        if self.eval_stride is not None and not 1 <= self.eval_stride <= self.eval_window:
            raise ValueError(
                f"eval_stride is {self.eval_stride}; expected 1 to the eval_window of {self.eval_window}, so that no "
                "token is skipped"
            )
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; expected a positive number")


class Experiment:
    """A method and its baselines on one dense model, corpus and recipe. Building one reads and checks everything that
    is cheap to check and writes nothing; calling it works through the stages of a run."""

    def __init__(
        self,
        dense: str | Path,
        corpus: Corpus,
        recipe: Recipe,
        name: str,
        method: Method,
        baselines: Sequence[str] = (),
        *,
        trust_remote_code: bool = False,
        progress: bool = False,
    ) -> None:
        self.dense, self.corpus, self.recipe = dense, corpus, recipe
        self.baselines = [baseline for baseline in baselines if baseline != name]
        for baseline in self.baselines:
            like(baseline, method)  # raises when they cannot be compared
        self.trust_remote_code, self.progress = trust_remote_code, progress
        self._choose(name, method)
        self._dense: dict[str, Any] | None = None
        self.tokenizer = open_tokenizer(dense, trust_remote_code)
        train = encode(corpus.train, self.tokenizer)
        self.train_tokens = len(train)
        self.windows = train.windows(recipe.window)
        if len(self.windows) < recipe.batch_size:
            raise DataError(f"{len(self.windows)} training windows are fewer than batch_size={recipe.batch_size}")
        self.calibration_windows = self.windows
        if corpus.calibration is not corpus.train:
            self.calibration_windows = encode(corpus.calibration, self.tokenizer).windows(recipe.window)
        self.calibration = self._calibration()
        self.held_out = held_out_stream(corpus.held_out, self.tokenizer, recipe.eval_window, recipe.eval_tokens)

    def another(self, name: str, method: Method, seed: int) -> Experiment:
        """The same model, text and recipe with another method, without baselines, and another seed; the text is not
        read again, nor the dense model measured."""
        other = copy.copy(self)
        other.baselines, other.recipe = [], dataclasses.replace(self.recipe, seed=seed)
        other._choose(name, method)
        other.calibration = other._calibration()
        return other

    def _choose(self, name: str, method: Method) -> None:
        check_steps = getattr(method, "check_steps", None)
        if check_steps is not None:
            check_steps(self.recipe.steps)
        self.name, self.method = name, method

    def _calibration(self) -> tuple[torch.Tensor, ...]:
        """A few windows drawn by the seed, in batches [B, window]."""
        ids = self.calibration_windows.ids
        chosen = torch.randperm(len(ids), generator=torch.Generator().manual_seed(self.recipe.seed))
        return ids[chosen[: self.recipe.calibration_windows]].split(self.recipe.batch_size)

    def __call__(self, run: Run) -> dict[str, Any]:
        """Does what is not done yet, writes summary.json and returns it."""
        self.run = run
        dense = run.stage("dense", self._measure_dense)
        baselines = {name: run.stage(name, partial(self._baseline, name)) for name in self.baselines}
        trained = run.stage(self.name, self._train)
        pruned = run.stage("reload", self._measure_pruned)
        speed = run.stage("speed", self._speed)
        summary = self._summary(dense, baselines, trained, pruned, speed)
        records = [dense, *baselines.values(), trained, pruned, speed]
        summary["seconds_total"] = round(sum(map(_seconds, records)), 1)
        write_json(run.folder / "summary.json", summary)
        return summary

    # ---- stages

    def _open(self, path: str | Path) -> nn.Module:
        gc.collect()
        return open_model(path, self.recipe.dtype, self.trust_remote_code)

    def _perplexity(self, model: nn.Module) -> dict[str, Any]:
        r, text = self.recipe, self.held_out
        found = evaluation.perplexity(
            model, text.ids, r.eval_window, r.eval_stride, labels=text.labels, bos=text.bos, progress=self.progress
        )
        return dataclasses.asdict(found)

    def _measure_dense(self) -> dict[str, Any]:
        if self._dense is None:
            model = self._open(self.dense)
            self._dense = {**shape_of(model), "perplexity": self._perplexity(model)}
        return self._dense

    def _baseline(self, name: str) -> dict[str, Any]:
        with evaluation.peak_memory(_device()) as peak:
            model, tuned = self._tuned(name, like(name, self.method))
        record = {**shape_of(model), "training": dataclasses.asdict(tuned), "peak_bytes": peak.bytes}
        return {**record, "perplexity": self._perplexity(model)}

    def _train(self) -> dict[str, Any]:
        with evaluation.peak_memory(_device()) as peak:
            model, tuned = self._tuned(self.name, self.method)
        shutil.rmtree(self.result, ignore_errors=True)  # a kill between the export and the record of this stage
        record = {**shape_of(model), "training": dataclasses.asdict(tuned), "peak_bytes": peak.bytes}
        if not self.sparse:
            record["widths"] = Widths.of(describe(model)).largest()
            surgery.export(model, self.tokenizer, self.result)
            return record
        report = checkpoint.save(model, self.tokenizer, self.result)
        log.info("%s", report)
        shutil.rmtree(self.run.dense, ignore_errors=True)
        checkpoint.save_dense(model, self.tokenizer, self.run.dense)
        zeros = {layer.name: round(layer.sparsity * math.prod(layer.shape)) for layer in report.layers}
        weights = sum(math.prod(layer.shape) for layer in report.layers)
        return record | {
            "sparsity": sum(zeros.values()) / weights,
            "zeros": zeros,
            "bytes_dense": report.dense_bytes,
            "bytes_packed": report.bytes,
        }

    @property
    def sparse(self) -> bool:
        """Whether the method's result has zeros instead of smaller shapes."""
        return getattr(self.method, "sparse", False)

    @property
    def result(self) -> Path:
        """Where the method's result is measured: packed if it is sparse."""
        return self.run.packed if self.sparse else self.run.model

    def _tuned(self, stage: str, method: Method) -> tuple[nn.Module, Tuned]:
        from transformers import set_seed

        r, folder = self.recipe, self.run.checkpoints(stage)
        model = self._open(self.dense)
        set_seed(r.seed)
        model = method.prepare(model, calibration=self.calibration, resume=latest_checkpoint(folder))
        tuned = tune(
            model,
            self.windows,
            folder,
            steps=r.steps,
            batch_size=r.batch_size,
            learning_rate=getattr(method, "learning_rate", LEARNING_RATE)
            if r.learning_rate is None
            else r.learning_rate,
            callbacks=method.callbacks(),
            optimizer=getattr(method, "optimizer", None),
            gradient_checkpointing=r.gradient_checkpointing,
            seed=r.seed,
            save_every=r.save_every,
            metrics=self.run.metrics,
            stage=stage,
            progress=self.progress,
            gradient_accumulation_steps=r.accumulate,
            warmup_steps=r.warmup,
        )
        return method.finalize(model), tuned

    def _measure_pruned(self) -> dict[str, Any]:
        model = self._open(self.result)
        return {**shape_of(model), "perplexity": self._perplexity(model)}

    def _speed(self) -> dict[str, Any]:
        r = self.recipe
        if r.repeats == 0:
            return {"speedup": dict.fromkeys(field.name for field in dataclasses.fields(evaluation.Speedup))}
        dense, pruned = self._open(self.dense), self._open(self.result)
        measured = evaluation.latency(
            {"dense": dense, "pruned": pruned}, r.prompt_tokens, r.new_tokens, r.repeats, progress=self.progress
        )
        return {
            "speedup": dataclasses.asdict(evaluation.speedup(dense, pruned, measured)),
            "latency": {side: dataclasses.asdict(value) for side, value in measured.items()},
        }

    # ---- summary

    def _summary(
        self,
        dense: dict[str, Any],
        baselines: dict[str, dict[str, Any]],
        trained: dict[str, Any],
        pruned: dict[str, Any],
        speed: dict[str, Any],
    ) -> dict[str, Any]:
        def baseline_perplexity(name: str) -> float | None:
            return baselines[name]["perplexity"]["value"] if name in baselines else None

        r, speedup = self.recipe, speed["speedup"]
        return {
            "method": self.name,
            "ratio_requested": getattr(self.method, "ratio", None),
            "ratio_achieved": 1 - pruned["hidden_size"] / dense["hidden_size"],
            **{key: trained[key] for key in ("sparsity", "bytes_dense", "bytes_packed") if key in trained},
            "params_dense": dense["params"],
            "params_pruned": pruned["params"],
            "block_params_dense": dense["block_params"],
            "block_params_pruned": pruned["block_params"],
            "target": getattr(self.method, "target", None),
            "params_removed": 1 - pruned["params"] / dense["params"],
            "widths_pruned": trained.get("widths"),
            "peak_bytes": trained["peak_bytes"],
            "hidden_size_dense": dense["hidden_size"],
            "hidden_size_pruned": pruned["hidden_size"],
            "tied": pruned["tied"],
            "basis": getattr(self.method, "basis", None),
            "ppl_dense": dense["perplexity"]["value"],
            "ppl_tuned_dense": baseline_perplexity("lora"),
            "ppl_prune_then_tune": baseline_perplexity("prune-then-tune"),
            "ppl_pruned": pruned["perplexity"]["value"],
            "tokens_trained": trained["training"]["tokens"],
            "seconds": trained["training"]["seconds"],
            "prefill_speedup": speedup["prefill"],
            "prefill_speedup_limit": speedup["prefill_limit"],
            "decode_speedup": speedup["decode"],
            "decode_speedup_limit": speedup["decode_limit"],
            "speed_protocol": {
                "prompt_tokens": r.prompt_tokens,
                "new_tokens": r.new_tokens,
                "repeats": r.repeats,
                "batch": 1,
                "statistic": "median, dense and pruned interleaved",
            },
            "evaluation": {key: pruned["perplexity"][key] for key in ("window", "stride", "tokens")},
            "data": {
                "text": self.corpus.description,
                "train_tokens": self.train_tokens,
                "train_documents": len(self.corpus.train),
                "held_out_documents": len(self.corpus.held_out),
            },
            "dense_model": str(self.dense),
            "dtype": dense["dtype"],
            "steps": r.steps,
            "seed": r.seed,
            **environment(),
        }


def check_method(method: Method, dense: str | Path, trust_remote_code: bool = False) -> None:
    """Raises ValueError when the family of a model is not known, or with what the method has against its shapes; reads
    only the model's config. Whole parts can go from fewer families than single weights."""
    skeleton = open_skeleton(dense, trust_remote_code)
    known = describe_blocks if getattr(method, "sparse", False) else describe
    known(skeleton)
    check = getattr(method, "check", None)
    if check is not None:
        check(skeleton)


def _seconds(record: dict[str, Any]) -> float:
    """A stage's time; one that trained in several processes counts at least all of its steps."""
    return max(record["seconds"], record.get("training", {}).get("seconds", 0.0))


def _device() -> str:
    """Where `open_model` puts a model."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def shape_of(model: nn.Module) -> dict[str, Any]:
    """Sizes counted from the tensors, not from a setting; of packed weights, `params` are the values that are stored.
    `bytes` are those of all weights, shared ones once; `linears` the shapes [out, in] of the blocks' linears."""
    blocks, counts = describe_blocks(model).blocks, surgery.parameter_counts(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    return {
        "params": counts["total"],
        "block_params": counts["blocks"],
        "bytes": sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values()),
        "hidden_size": size_of(blocks[0].branches[0].reads[0].module)[1],
        "tied": head.weight is embedding.weight,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "linears": {
            f"{block.name}.{linear.name}": size_of(linear.module)
            for block in blocks
            for branch in block.branches
            for linear in (*branch.reads, branch.write)
        },
    }


# ----------------------------------------------------------------------------------------------------- what it ran on


def environment() -> dict[str, Any]:
    """Versions, hardware and, in a git checkout, the commit."""
    packages = ("pyprune", "torch", "transformers", "peft")
    versions = {"python": platform.python_version()} | {name: version_of(name) for name in packages}
    return {"versions": versions, "hardware": hardware(), "commit": commit()}


def hardware() -> dict[str, Any]:
    """The processor, its cores, the threads that torch uses, and the GPU if there is one."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}
