"""`pyprune compare MODEL --methods wanda,sparsegpt --calibration FILE --eval-data FILE --out DIR`: side by side."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from pyprune.cli import prune
from pyprune.cli.fields import add_fields, from_fields
from pyprune.cli.log import log_to_stderr
from pyprune.methods import ONE_SHOT, find

HELP = "prune a model by several methods and compare perplexity, size and speed"


def options(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    from pyprune.oneshot import Recipe

    prune.add_run_options(parser)
    parser.add_argument(
        "--methods",
        default="magnitude,wanda,sparsegpt",
        metavar="LIST",
        help=f"separated by commas, of {', '.join(ONE_SHOT)} (default: magnitude,wanda,sparsegpt)",
    )
    parser.add_argument("--sparsity", type=float, metavar="X", help="as of pyprune prune (default: the same)")
    parser.add_argument("--pattern", metavar="TEXT", help="as of pyprune prune (default: each method's own)")
    add_fields(parser, Recipe)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from pyprune import oneshot, runs

    recipe, methods = from_fields(oneshot.Recipe, args), _methods(args)
    if args.eval_data is None:
        raise ValueError("a comparison is of perplexity: give held-out text with --eval-data FILE")
    config = prune.configuration(args, recipe) | {"methods": {name: repr(m) for name, m in methods.items()}}
    runs.check_folder(args.out, config, args.resume)
    calibration, held_out = prune.documents(args, list(methods.values()))
    log_to_stderr()
    first = oneshot.Pruning(
        args.model,
        next(iter(methods.values())),
        calibration,
        held_out,
        recipe,
        trust_remote_code=args.trust_remote_code,
        progress=True,
    )
    prunings = {name: first.another(method) for name, method in methods.items()}
    with runs.open_run(args.out, config, args.resume, args.argv) as run:
        return oneshot.Comparison(prunings)(run)


def _methods(args: argparse.Namespace) -> dict[str, Any]:
    names = args.methods.split(",")
    for name in names:
        if name not in ONE_SHOT:
            raise ValueError(f"--methods {args.methods}: {name!r} is unknown; expected some of {', '.join(ONE_SHOT)}")
    shared = {key: getattr(args, key) for key in ("sparsity", "pattern") if getattr(args, key) is not None}
    return {name: find(name)(**shared) for name in names}


def show(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"one-shot pruning: {summary['dense_model']}", title_justify="left")
    for column in ("", "sparsity", "perplexity", "MB", "decode tokens/s", "decode", "seconds to prune"):
        table.add_column(column, justify="right" if column else "left")
    methods = summary["methods"]
    dense_speed = statistics.median(row["tokens_per_second"] / row["decode_speedup"] for row in methods)
    dense = {"method": "dense", "sparsity": 0.0, "tokens_per_second": dense_speed, "decode_speedup": 1.0}
    for row in (dense | summary["dense"], *methods):
        table.add_row(
            row["method"],
            f"{row['sparsity']:.3%}",
            f"{row['perplexity']:,.2f}",
            f"{row['bytes'] / 1e6:,.1f}",
            f"{row['tokens_per_second']:,.1f}",
            f"{row['decode_speedup']:.2f}x",
            f"{row['seconds']:,.0f}" if "seconds" in row else "",
        )
    evaluation, console = summary["evaluation"], Console()
    console.print(table)
    console.print(
        f"Perplexity on {evaluation['tokens']:,} held-out tokens, window {evaluation['window']}, stride "
        f"{evaluation['stride']}. Sparsity is that of the blocks' linears, counted; MB those of the packed checkpoint; "
        "decoding at batch 1, each method in turn with the dense model.",
        highlight=False,
    )
