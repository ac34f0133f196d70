"""`pyprune demo`: a small real model and text that come from packages, tuned, pruned and compared."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pyprune.cli import experiment
from pyprune.cli.fields import from_fields
from pyprune.cli.log import log_to_stderr
from pyprune.methods import find

HELP = "tune and prune a small real model and compare it with the dense one"
DEMO: dict[str, Any] = {
    "steps": 36,
    "batch_size": 4,
    "window": 256,
    "learning_rate": 1e-3,
    "warmup": 4,
    "eval_tokens": 16384,
    "round_to": 16,
    "lora_rank": 16,
    "lora_alpha": 16.0,
    "lora_dropout": 0.0,
    "milestone": 2 / 3,
    "save_every": 16,
}

show = experiment.show


def options(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    from pyprune.models import fast_dtype  # with torch, which the help of other commands need not wait for

    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder (default: runs/demo)")
    experiment.add_options(parser, argv, ["lora", "prune-then-tune"], DEMO | {"dtype": fast_dtype()})


def run(args: argparse.Namespace) -> dict[str, Any]:
    from pyprune import data, runs

    recipe, method = from_fields(runs.Recipe, args), from_fields(find(args.method), args)
    baselines = experiment.baselines(args.baselines, method)
    config = experiment.configuration(args, recipe, method, baselines)
    log_to_stderr()
    with runs.open_run(args.out, config, args.resume, args.argv) as run:
        dense = run.folder / "original"
        run.stage(
            "model",
            lambda: {"folder": str(dense if dense.exists() else data.demo_model(dense)), "model": data.DEMO_MODEL},
        )
        planned = runs.Experiment(dense, data.demo_text(), recipe, args.method, method, baselines, progress=True)
        return planned(run)
