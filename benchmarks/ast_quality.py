"""The quality of AST on a real model: 2:4 by every part of it, and what it is compared with, on equal tokens.

    python benchmarks/ast_quality.py                    hours; stop it at will, the same command goes on
    python benchmarks/ast_quality.py --table            the table, from ast_quality.csv
    python benchmarks/ast_quality.py --steps 40 --trials ast fixed-mask
    python benchmarks/ast_quality.py --jobs 9           all at a time, on a GPU
    python benchmarks/ast_quality.py --collect          csv, picture and table of the trials that are finished

Every trial prunes or prepares the dense model, trains all of it on the demo's text, and
measures perplexity on held-out text at a few steps on the way, with the masks of that moment. The results are
ast_quality.csv, one row for each trial and measurement, and the picture ast_quality.png, perplexity over tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import trials
from csvs import Cell, read_csv
from models import conditions
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from trials import add_rows, protocols

from pyprune import data, evaluation
from pyprune.blockwise import prune
from pyprune.cli.fields import add_fields, from_fields
from pyprune.methods import option
from pyprune.methods.admm import ADMM
from pyprune.methods.ast import AST
from pyprune.methods.sparsegpt import SparseGPT
from pyprune.methods.wanda import Wanda
from pyprune.models import open_model, open_tokenizer
from pyprune.optim import MaskedAdamW
from pyprune.runs import environment, write_json
from pyprune.training import latest_checkpoint, tune

CSV = Path(__file__).with_name("ast_quality.csv")
COLUMNS = (
    "trial step tokens perplexity seconds steps batch_size window learning_rate warmup refresh calibration_windows "
    "eval_tokens eval_window dtype seed date threads hardware torch commit"
)
PATTERN = "2:4"

# of a trial's recipe: rows that share it are compared
PROTOCOL = ("steps", "batch_size", "window", "learning_rate", "warmup", "refresh", "calibration_windows")
PROTOCOL += ("eval_tokens", "eval_window", "dtype", "seed")


@dataclasses.dataclass(frozen=True)
class Trial:
    """What is pruned before the training, and the AST options of the training; None trains the dense model."""

    label: str
    options: dict[str, Any] | None
    pruned: Callable[[], Any] | None = None


TRIALS = {
    "dense": Trial("dense, tuned", None),
    "wanda": Trial("Wanda, tuned", {"mask": "fixed"}, lambda: Wanda(pattern=PATTERN)),
    "sparsegpt": Trial("SparseGPT, tuned", {"mask": "fixed"}, lambda: SparseGPT(pattern=PATTERN)),
    "admm": Trial("ADMM, tuned", {"mask": "fixed"}, lambda: ADMM(pattern=PATTERN)),
    "gradual": Trial("gradual magnitude", {"mask": "gradual"}),
    "no-distillation": Trial("AST without distillation", {"kl_weight": 0.0}),
    "fixed-mask": Trial("AST, fixed mask", {"mask": "fixed"}),
    "static-decay": Trial("AST, static decay", {"decay_shape": "static"}),
    "ast": Trial("AST", {}),
    "ast-wanda": Trial("AST, masks by Wanda's score", {"criterion": "wanda"}),
    "ast-slorb": Trial("AST + SLoRB", {"slorb": 16}),
}


@dataclasses.dataclass
class Recipe:
    """What is the same for all trials."""

    steps: int = option(600, "optimiser steps")
    batch_size: int = option(4, "windows in a step")
    window: int = option(256, "tokens in a window")
    learning_rate: float = option(1e-4, "peak learning rate")
    warmup: int = option(30, "steps over which it rises")
    refresh: int = option(10, "steps between two choices of the masks")
    points: int = option(6, "measurements on the way")
    save_every: int | None = option(None, "steps between checkpoints (default: half of them; 0: none)")
    calibration_windows: int = option(32, "windows that calibrate Wanda and SparseGPT")
    eval_tokens: int = option(16384, "held-out tokens that are measured")
    eval_window: int = option(512, "tokens in a window that measures perplexity")
    dtype: str = option("bfloat16", "dtype of the weights", choices=["float32", "bfloat16"])
    seed: int = option(0, "seed of everything that is random")

    def measured(self) -> list[int]:
        """The steps after which perplexity is measured."""
        return sorted({round(self.steps * i / self.points) for i in range(1, self.points + 1)})


# ---------------------------------------------------------------------------------------------------------- one trial


class Curve(TrainerCallback):
    """Perplexity at some steps, kept in a file, so that a resumed trial does not measure twice."""

    def __init__(self, path: Path, steps: Sequence[int], measure: Callable[[nn.Module], float]) -> None:
        self.path, self.steps, self.measure = path, steps, measure

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.add(state.global_step, kwargs["model"])

    def add(self, step: int, model: nn.Module) -> None:
        """Measures unless that was done."""
        found = self.read()
        if str(step) not in found:
            training = model.training
            found[str(step)] = self.measure(model.eval())
            model.train(training)
            write_json(self.path, found)

    def read(self) -> dict[str, float]:
        """Perplexity by step."""
        return json.loads(self.path.read_text()) if self.path.exists() else {}


def plain(recipe: Recipe) -> Callable[[TrainingArguments], Any]:
    """AST's optimiser without masks."""
    return lambda args: (MaskedAdamW, {"lr": recipe.learning_rate})


def run(name: str, dense: Path, recipe: Recipe, folder: Path) -> None:
    """Trains and measures one trial, or goes on with it."""
    trial, tokenizer, corpus = TRIALS[name], open_tokenizer(dense), data.demo_text()
    held_out = data.encode(corpus.held_out, tokenizer)
    ids, labels = held_out.ids[: recipe.eval_tokens], held_out.labels[: recipe.eval_tokens]

    def measure(model: nn.Module) -> float:
        found = evaluation.perplexity(model, ids, recipe.eval_window, None, labels=labels, bos=held_out.bos)
        return found.value

    folder.mkdir(parents=True, exist_ok=True)
    curve = Curve(folder / "curve.json", recipe.measured(), measure)
    windows = data.encode(corpus.train, tokenizer).windows(recipe.window)
    calibrating = calibration(windows.ids, recipe)
    set_seed(recipe.seed)
    model = open_model(dense, recipe.dtype)
    if trial.pruned:
        prune(model, trial.pruned(), calibrating, folder=folder / "pruned")
    callbacks: list[TrainerCallback] = []
    optimizer = plain(recipe)
    if trial.options is not None:
        method = AST(pattern=PATTERN, refresh=recipe.refresh, teacher=str(dense), **trial.options)
        model = method.prepare(model, calibrating, latest_checkpoint(folder))
        callbacks, optimizer = method.callbacks(), method.optimizer
    if latest_checkpoint(folder) is None:
        curve.add(0, model)
    tuned = tune(
        model,
        windows,
        folder,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup,
        callbacks=[*callbacks, curve],
        optimizer=optimizer,
        seed=recipe.seed,
        save_every=max(1, recipe.steps // 2) if recipe.save_every is None else recipe.save_every,
        metrics=folder / "metrics.jsonl",
    )
    record = {"trial": name, "curve": curve.read(), "recipe": dataclasses.asdict(recipe), "seconds": tuned.seconds}
    write_json(folder / "record.json", record | environment())
    for checkpoint in folder.glob("checkpoint-*"):
        remove(checkpoint)


def calibration(ids: Tensor, recipe: Recipe) -> tuple[Tensor, ...]:
    """Training windows [4, window], the same for every trial."""
    return ids[:: max(1, len(ids) // recipe.calibration_windows)][: recipe.calibration_windows].split(4)


def remove(folder: Path) -> None:
    """A checkpoint, several times the model's size."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    folder.rmdir()


# ------------------------------------------------------------------------------------ the csv, the table, the picture


def rows(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One for each trial and measurement."""
    found = []
    for record in records:
        recipe, hardware = record["recipe"], record["hardware"]
        for step, perplexity in sorted(record["curve"].items(), key=lambda item: int(item[0])):
            row = {
                "trial": record["trial"],
                "step": step,
                "tokens": int(step) * recipe["batch_size"] * recipe["window"],
            }
            row |= {"perplexity": f"{perplexity:.4f}", "seconds": f"{record['seconds']:.0f}"}
            row |= {key: value for key, value in recipe.items() if key not in ("points", "save_every")}
            row |= {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "threads": hardware["threads"]}
            row |= {"hardware": hardware["gpu"] or hardware["cpu"], "torch": record["versions"]["torch"]}
            found.append(row | {"commit": (record["commit"] or "unknown")[:12]})
    return found


def curves(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The measurements of each trial, in the order of `TRIALS`."""
    found = {name: [cell for cell in cells if cell["trial"] == name] for name in TRIALS}
    return {name: line for name, line in found.items() if line}


def tables(cells: Sequence[Cell]) -> str:
    """One table for each protocol."""
    return "\n\n".join(map(table, protocols(cells, PROTOCOL)))


def table(cells: Sequence[Cell]) -> str:
    """Markdown: before the training and after it, and below what it was measured on."""
    lines = ["| | before training | after |", "| --- | ---: | ---: |"]
    for name, line in curves(cells).items():
        first, last = (f"{float(cell['perplexity']):.2f}" for cell in (line[0], line[-1]))
        lines.append(f"| {TRIALS[name].label} | {first} | {last} |")
    cell = cells[0]
    tokens = max(int(cell["tokens"]) for cell in cells)
    note = (
        f"Perplexity at {PATTERN} on {int(cell['eval_tokens']):,} held-out tokens of {data.DEMO_TEXT} (window "
        f"{cell['eval_window']}); {data.DEMO_MODEL}; every row read {tokens:,} tokens in {cell['steps']} steps of "
        f"{cell['batch_size']} x {cell['window']}, learning rate {cell['learning_rate']}, masks chosen every "
        f"{cell['refresh']} steps, {cell['dtype']}, seed {cell['seed']}; {cell['threads']} threads of "
        f"{cell['hardware']}, torch {cell['torch']}, commit {cell['commit']}."
    )
    return "\n".join([*lines, "", note])


def picture(cells: Sequence[Cell], path: Path) -> None:
    """Perplexity over tokens, a line for each trial."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5.6), layout="constrained")
    for name, line in curves(cells).items():
        x, y = [int(cell["tokens"]) for cell in line], [float(cell["perplexity"]) for cell in line]
        ours = name.startswith("ast")
        axes.plot(x, y, "o-" if ours else "s--", label=f"{TRIALS[name].label}: {y[-1]:.1f}", linewidth=2, markersize=4)
    axes.set_yscale("log")
    axes.set_xlabel("tokens of training")
    axes.set_ylabel(f"perplexity, {int(cells[0]['eval_tokens']):,} held-out tokens")
    axes.set_title(f"SmolLM2-135M (4-bit-rounded), {PATTERN}, {cells[0]['steps']} steps", fontsize=11)
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    figure.savefig(path, dpi=160)
    pyplot.close(figure)


def main() -> None:
    """Runs what is not done yet, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of ast_quality.csv and run nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/ast_quality"), help="where the trials' folders are")
    parser.add_argument("--model", type=Path, help="a dense checkpoint (default: the demo's, made once)")
    parser.add_argument("--trials", nargs="+", default=list(TRIALS), choices=TRIALS)
    trials.add_options(parser)
    add_fields(parser, Recipe)
    arguments = parser.parse_args()
    if arguments.table:
        print(tables(read_csv(CSV, COLUMNS.split())))
        return
    dense, recipe = arguments.model or arguments.out / "model", from_fields(Recipe, arguments)
    print(conditions(trials.set_threads(arguments)))
    for name in arguments.one or ():
        run(name, dense, recipe, arguments.out / name)
    if arguments.one:
        return

    def result(name: str) -> str | None:
        path = arguments.out / name / "record.json"
        return str(json.loads(path.read_text())["curve"]) if path.exists() else None

    if arguments.collect:
        missing = [name for name in arguments.trials if result(name) is None]
    else:
        if not dense.exists():
            data.demo_model(dense)
        missing = trials.run(arguments.trials, result, arguments.out / "logs", arguments.jobs)
    records = [json.loads(path.read_text()) for path in sorted(arguments.out.glob("*/record.json"))]
    if len({tuple(record["recipe"][name] for name in PROTOCOL) for record in records}) > 1:
        raise SystemExit(f"the trials in {arguments.out} had different recipes; they are no comparison")
    if records:
        cells = add_rows(rows(records), CSV, ("trial", "step", *PROTOCOL))
        picture(protocols(cells, PROTOCOL)[0], CSV.with_suffix(".png"))
        print(tables(cells))
    trials.finish(missing, arguments.out)


if __name__ == "__main__":
    main()
