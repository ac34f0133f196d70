"""`pyprune eval MODEL --text FILE`: perplexity; `pyprune eval MODEL --tasks LIST`: downstream tasks through lm-eval."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

HELP = "perplexity of a model on a text, or its scores on tasks"
OF_PERPLEXITY = ("window", "stride", "tokens")
OF_TASKS = ("fewshot", "limit", "batch_size", "seed")


def options(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a checkpoint, dense, cut or packed")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="text, jsonl or parquet; with --tasks, what continuation is made of"
    )
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the model brings")
    perplexity = parser.add_argument_group("perplexity")
    perplexity.add_argument("--window", type=int, metavar="N", help="tokens a window reads (default: 512)")
    perplexity.add_argument("--stride", type=int, metavar="N", help="tokens between windows (default: the window)")
    perplexity.add_argument("--tokens", type=int, metavar="N", help="measure on the first N tokens (default: all)")
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument(
        "--tasks",
        metavar="LIST",
        help="separated by commas: names of lm-eval; pat14, the tasks of PAT's paper; continuation, made of --text; "
        "files: .jsonl with context, choices and answer, or .yaml of lm-eval",
    )
    tasks.add_argument("--fewshot", type=int, metavar="N", help="examples before each question (default: the task's)")
    tasks.add_argument("--limit", type=int, metavar="N", help="first N questions of each task (default: all)")
    tasks.add_argument("--batch-size", type=int, metavar="N", help="sequences in a forward pass (default: 8)")
    tasks.add_argument("--seed", type=int, metavar="N", help="of examples and of continuation (default: 0)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.tasks is None and args.text is None:
        raise ValueError("give a text for perplexity (--text FILE), or tasks (--tasks LIST)")
    foreign, other = (OF_TASKS, "--tasks") if args.tasks is None else (OF_PERPLEXITY, "perplexity, without --tasks")
    for name in foreign:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} belongs to {other}; leave it out")
    return _perplexity(args) if args.tasks is None else _tasks(args)


def _perplexity(args: argparse.Namespace) -> dict[str, Any]:
    from pyprune import data, evaluation, models

    window = 512 if args.window is None else args.window
    if args.tokens is not None and args.tokens < window:
        raise ValueError(f"--tokens {args.tokens} is smaller than a window of {window}")
    tokenizer = models.open_tokenizer(args.model, args.trust_remote_code)
    stream = data.encode(data.read_documents(args.text, tokenizer), tokenizer)
    ids, labels = stream.ids[: args.tokens], stream.labels[: args.tokens]
    if len(ids) < window:
        raise data.DataError(f"{args.text} has {len(ids)} tokens, fewer than one window of {window}")
    model = models.open_model(args.model, args.dtype, args.trust_remote_code)
    found = evaluation.perplexity(model, ids, window, args.stride, labels=labels, bos=stream.bos, progress=True)
    return {"model": args.model, "text": str(args.text), "perplexity": found.value, **dataclasses.asdict(found)}


def _tasks(args: argparse.Namespace) -> dict[str, Any]:
    from pyprune import data, models, tasks

    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if args.text is not None and tasks.CONTINUATION not in names:
        raise ValueError(f"--text {args.text}: of the tasks only {tasks.CONTINUATION} reads it, which --tasks lacks")
    tokenizer = models.open_tokenizer(args.model, args.trust_remote_code)
    documents = None if args.text is None else data.read_documents(args.text, tokenizer)
    chosen = tasks.load(names, documents, 0 if args.seed is None else args.seed)
    model = models.open_model(args.model, args.dtype, args.trust_remote_code)
    given = {name: getattr(args, name) for name in OF_TASKS if name != "seed" and getattr(args, name) is not None}
    found = tasks.evaluate(model, tokenizer, chosen, **given)
    text = {} if args.text is None else {"text": str(args.text)}
    return {"model": args.model, **text, **dataclasses.asdict(found)}


def show(result: dict[str, Any]) -> None:
    if "scores" in result:
        _show_tasks(result)
        return
    print(
        f"perplexity {result['perplexity']:.4f} (nll {result['nll']:.6f} nats) on {result['tokens']:,} tokens of "
        f"{result['text']}, window {result['window']}, stride {result['stride']}"
    )


def _show_tasks(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"tasks: {result['model']}", title_justify="left")
    for column in ("task", "metric", "value", "stderr", "few-shot", "questions", "version"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for score in result["scores"]:
        if score["task"] not in result["asked"]:
            continue  # inside of a group, whose line says it
        samples, available = score["samples"], score["available"]
        table.add_row(
            score["task"],
            score["metric"] if score["filter"] == "none" else f"{score['metric']} ({score['filter']})",
            f"{score['value']:.4f}",
            "" if score["stderr"] is None else f"{score['stderr']:.4f}",
            "" if score["fewshot"] is None else str(score["fewshot"]),
            "" if samples is None else f"{samples:,}" if samples == available else f"{samples:,} of {available:,}",
            "" if score["version"] is None else str(score["version"]),
        )
    console = Console()
    console.print(table)
    for group, mean in result["means"].items():
        console.print(f"{group}: mean accuracy {mean:.4f}, by likelihood", highlight=False)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    console.print(f"{versions}; seed {result['seed']}", highlight=False)
