"""`pyprune prune MODEL --method wanda --calibration FILE --out DIR`: prune without training, one block at a time."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from pyprune.cli import structured
from pyprune.cli.fields import add_fields, from_fields
from pyprune.cli.log import log_to_stderr
from pyprune.methods import ONE_SHOT, find

HELP = "prune a model without training: single weights (packed), or whole heads, channels and hidden dimensions"


def options(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    from pyprune.oneshot import Recipe

    method = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    method.add_argument("--method", default="wanda")
    chosen = method.parse_known_args(argv)[0].method
    parser.add_argument(
        "--method", default="wanda", choices=[*ONE_SHOT, *structured.METHODS], help="how to prune (default: wanda)"
    )
    add_run_options(parser)
    if chosen in structured.METHODS:
        structured.add_options(parser, chosen)
        return
    parser.add_argument(
        "--reconstruct", action="store_true", help="train what survives of each attention and MLP on the same text"
    )
    if chosen in ONE_SHOT:
        add_fields(parser, find(chosen))
    add_fields(parser, Recipe)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What prune and compare share besides the recipe."""
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a transformers checkpoint in safetensors")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="text, jsonl or parquet that calibrates")
    parser.add_argument("--eval-data", type=Path, metavar="FILE", help="held-out text to measure perplexity on")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="run folder")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the model brings")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.method in structured.METHODS:
        return structured.run(args)
    from pyprune import oneshot, runs
    from pyprune.reconstruction import Reconstruction

    recipe, method = from_fields(oneshot.Recipe, args), from_fields(find(args.method), args)
    config = configuration(args, recipe) | {"method": args.method, **dataclasses.asdict(method)}
    config["reconstruct"] = args.reconstruct
    runs.check_folder(args.out, config, args.resume)
    if args.reconstruct and not method.calibrated:
        raise ValueError(f"--reconstruct: {args.method} shows a block no text; reconstruct behind another method")
    calibration, held_out = documents(args, [method])
    log_to_stderr()
    planned = oneshot.Pruning(
        args.model,
        method,
        calibration,
        held_out,
        recipe,
        then=[Reconstruction()] if args.reconstruct else [],
        trust_remote_code=args.trust_remote_code,
        progress=True,
    )
    with runs.open_run(args.out, config, args.resume, args.argv) as run:
        return planned(run)


def configuration(args: argparse.Namespace, recipe: Any) -> dict[str, Any]:
    """What defines the result of a run besides the method, flat, so that a difference can be named."""
    from pyprune.runs import file_digest

    config = {"command": args.command, "model": args.model, **dataclasses.asdict(recipe)}
    for key, path in (("calibration", args.calibration), ("eval_data", args.eval_data)):
        config[key] = None if path is None else str(path)
        config[f"{key}_sha256"] = None if path is None else file_digest(path)
    return config


def documents(args: argparse.Namespace, methods: list[Any]) -> tuple[list[Any], list[Any]]:
    """The calibration and the held-out documents. Raises ValueError when a method needs text that was not given."""
    from pyprune import data, models
    from pyprune.blockwise import reads_text

    tokenizer = models.open_tokenizer(args.model, args.trust_remote_code)
    for method in methods:
        if args.calibration is None and reads_text(method):
            raise ValueError(
                f"{type(method).__name__} looks at activations; give text to calibrate on: --calibration FILE"
            )
    calibration, held_out = (
        [] if path is None else data.read_documents(path, tokenizer) for path in (args.calibration, args.eval_data)
    )
    return calibration, held_out


def show(summary: dict[str, Any]) -> None:
    if summary["method"] in structured.METHODS:
        structured.show(summary)
        return
    print(
        f"{summary['method']}\n{summary['zeros']:,} of {summary['size']:,} weights of the blocks' linears are zero "
        f"({summary['sparsity']:.4%}); {summary['bytes_dense'] / 1e6:,.1f} MB dense, "
        f"{summary['bytes_packed'] / 1e6:,.1f} MB packed; {summary['seconds']:.0f} s"
    )
    if summary["ppl_pruned"] is not None:
        where = summary["evaluation"]
        print(
            f"perplexity {summary['ppl_dense']:.2f} dense, {summary['ppl_pruned']:.2f} pruned, on {where['tokens']:,} "
            f"held-out tokens, window {where['window']}, stride {where['stride']}"
        )
