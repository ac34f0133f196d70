"""`pyprune tune MODEL --data FILE --out DIR`: tune and prune a model on your own text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pyprune.cli import experiment
from pyprune.cli.fields import from_fields
from pyprune.cli.log import log_to_stderr
from pyprune.methods import find, like

HELP = "tune and prune a model on your data; exports an ordinary checkpoint"

show = experiment.show


def options(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a transformers checkpoint in safetensors")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="text, jsonl or parquet to train on")
    parser.add_argument("--eval-data", type=Path, metavar="FILE", help="held-out text (default: a tenth of --data)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="run folder; the result is in DIR/model")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the model brings")
    experiment.add_options(parser, argv, ["lora"], {})


def run(args: argparse.Namespace) -> dict[str, Any]:
    from pyprune import data, models, runs

    recipe, method = from_fields(runs.Recipe, args), from_fields(find(args.method), args)
    baselines = experiment.baselines(args.baselines, method)
    config = experiment.configuration(args, recipe, method, baselines) | {"model": args.model}
    for key, path in (("data", args.data), ("eval_data", args.eval_data)):
        config[key] = None if path is None else str(path)
        config[f"{key}_sha256"] = None if path is None else runs.file_digest(path)
    runs.check_folder(args.out, config, args.resume)
    for each in (method, *(like(name, method) for name in baselines)):
        runs.check_method(each, args.model, args.trust_remote_code)
    tokenizer = models.open_tokenizer(args.model, args.trust_remote_code)
    corpus = data.file_corpus(args.data, args.eval_data, tokenizer)
    log_to_stderr()
    planned = runs.Experiment(
        args.model,
        corpus,
        recipe,
        args.method,
        method,
        baselines,
        trust_remote_code=args.trust_remote_code,
        progress=True,
    )
    with runs.open_run(args.out, config, args.resume, args.argv) as run:
        return planned(run)
