"""What `pyprune tune` and `pyprune demo` share: the options of a run, its configuration, the table it ends with."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from pyprune.cli.fields import add_fields
from pyprune.methods import REGISTRY, Method, find, like


def add_options(
    parser: argparse.ArgumentParser, argv: list[str], baselines: Sequence[str], defaults: dict[str, Any]
) -> None:
    """What demo and tune share: the run folder, the method and its options, the recipe. By default it is compared with
    those of the `baselines` that it can be."""
    from pyprune.runs import BASELINES, Recipe

    method = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    method.add_argument("--method", default="pat")
    chosen = method.parse_known_args(argv)[0].method
    parser.add_argument("--method", default="pat", choices=list(REGISTRY), help="how to tune and prune (default: pat)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    if chosen in REGISTRY and not hasattr(find(chosen), "ratio"):
        baselines = [name for name in baselines if not hasattr(find(name), "ratio")]
    default = ",".join(baselines)
    parser.add_argument(
        "--baselines",
        default=default,
        metavar="LIST",
        help=f"what to compare with: {', '.join(BASELINES)} (separated by commas) or none (default: {default})",
    )
    if chosen in REGISTRY:
        add_fields(parser, find(chosen), defaults)
    add_fields(parser, Recipe, defaults)


def baselines(text: str, method: Method) -> list[str]:
    """The names in `text`. Raises ValueError for an unknown one and for one that `method` cannot be compared with."""
    from pyprune.runs import BASELINES

    names = [] if text == "none" else text.split(",")
    for name in names:
        if name not in BASELINES:
            raise ValueError(f"--baselines {text}: {name!r} is unknown; expected {', '.join(BASELINES)} or none")
        like(name, method)
    return names


def configuration(args: argparse.Namespace, recipe: Any, method: Any, baselines: list[str]) -> dict[str, Any]:
    """What defines the result of a run, flat, so that a difference can be named."""
    known = {"command": args.command, "method": args.method, "baselines": baselines}
    return known | dataclasses.asdict(method) | dataclasses.asdict(recipe)


def show(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from pyprune.plan import met

    table = Table(title=f"{summary['method']}: {summary['dense_model']}", title_justify="left")
    for column in ("", "dense", summary["method"]):
        table.add_column(column, justify="left" if not column else "right")
    for label, key in (("parameters", "params"), ("in the blocks", "block_params"), ("hidden size", "hidden_size")):
        table.add_row(label, f"{summary[f'{key}_dense']:,}", f"{summary[f'{key}_pruned']:,}")
    table.add_row("perplexity", _number(summary["ppl_dense"]), _number(summary["ppl_pruned"]))
    for label, key in (("  dense, LoRA", "ppl_tuned_dense"), ("  pruned, then tuned", "ppl_prune_then_tune")):
        if summary[key] is not None:
            left, right = (_number(summary[key]), "") if key == "ppl_tuned_dense" else ("", _number(summary[key]))
            table.add_row(label, left, right)
    for side in ("prefill", "decode") if summary["speed_protocol"]["repeats"] else ():
        limit = summary[f"{side}_speedup_limit"]
        table.add_row(f"{side} (limit {limit:.2f}x)", "1.00x", f"{summary[f'{side}_speedup']:.2f}x")
    evaluation, console = summary["evaluation"], Console()
    console.print(table)
    if summary["target"] is not None:
        console.print(met(summary["target"], summary["params_dense"], summary["params_pruned"]), highlight=False)
    console.print(
        f"Perplexity on {evaluation['tokens']:,} held-out tokens, window {evaluation['window']}, stride "
        f"{evaluation['stride']}: {summary['data']['text']}. {summary['tokens_trained']:,} tokens trained in "
        f"{summary['seconds']:.0f} s ({summary['seconds_total']:.0f} s in all).",
        highlight=False,
    )


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"
