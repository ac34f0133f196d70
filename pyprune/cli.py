"""The command line. Results go to stdout (with --json as one object), everything else to stderr.

Exit codes: 0 done; 1 the run failed (a loss that is not finite); 2 bad input; 130 interrupted, continue with --resume.
torch is imported only by the command that needs it, so that `pyprune --help` is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyprune.methods import REGISTRY, find

Options = argparse.Namespace


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parser(argv).parse_args(argv)
    logging.captureWarnings(True)
    try:
        result = COMMANDS[args.command].run(args)
    except KeyboardInterrupt:
        return _failed(args, "interrupted; continue a run with --resume", 130)
    except Exception as error:
        return _handled(args, error)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        COMMANDS[args.command].show(result)
    return 0


def _handled(args: Options, error: Exception) -> int:
    from pyprune.training import DivergedError, InterruptedTraining

    if args.debug:
        raise error
    codes: dict[type[Exception], int] = {InterruptedTraining: 130, DivergedError: 1, ValueError: 2, OSError: 2}
    code = next((code for kind, code in codes.items() if isinstance(error, kind)), None)
    if code is None:
        raise error  # a fault of ours: show all of it
    hint = "; continue with --resume" if isinstance(error, InterruptedTraining) else ""
    return _failed(args, f"{error}{hint}", code)


def _failed(args: Options, message: str, code: int) -> int:
    print(f"pyprune {args.command}: {' '.join(message.split())}", file=sys.stderr)
    return code


# ------------------------------------------------------------------------------------------------------------ options


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    from pyprune import __version__

    parser = argparse.ArgumentParser(
        prog="pyprune", description="Prunes language models and says honestly by how much."
    )
    parser.add_argument("--version", action="version", version=f"pyprune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help)
        sub.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if argv[:1] == [name]:
            command.options(sub, argv)
    return parser


def add_fields(parser: argparse.ArgumentParser, cls: type, defaults: dict[str, Any] | None = None) -> None:
    """One option for every field of a dataclass that has a `help` in its metadata."""
    group = parser.add_argument_group(f"{cls.__name__} options")
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if "help" not in field.metadata:
            continue
        default = (defaults or {}).get(field.name, field.default)
        kind = _plain_type(hints[field.name])
        known: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        if typing.get_origin(kind) is typing.Literal:
            known = {"choices": typing.get_args(kind)}
        elif "choices" in field.metadata:
            known["choices"] = field.metadata["choices"]
        if kind is not bool and "choices" not in known:
            known["metavar"] = {int: "N", float: "X"}.get(kind, "TEXT")
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            default=default,
            help=(field.metadata["help"] + shown).replace("%", "%%"),
            **known,
        )


def _plain_type(hint: Any) -> Any:
    """T of `T | None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


def from_fields(cls: type, args: Options) -> Any:
    """The dataclass that the options of `add_fields` describe."""
    names = [field.name for field in dataclasses.fields(cls) if "help" in field.metadata]
    return cls(**{name: getattr(args, name) for name in names})


def _run_options(parser: argparse.ArgumentParser, argv: list[str], baselines: str, defaults: dict[str, Any]) -> None:
    """What demo and tune share: the run folder, the method and its options, the recipe."""
    from pyprune.runs import BASELINES, Recipe

    method = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    method.add_argument("--method", default="pat")
    chosen = method.parse_known_args(argv)[0].method
    parser.add_argument("--method", default="pat", choices=list(REGISTRY), help="how to tune and prune (default: pat)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument(
        "--baselines",
        default=baselines,
        metavar="LIST",
        help=f"what to compare with: {', '.join(BASELINES)} (separated by commas) or none (default: {baselines})",
    )
    if chosen in REGISTRY:
        add_fields(parser, find(chosen), defaults)
    add_fields(parser, Recipe, defaults)


def _baselines(text: str) -> list[str]:
    from pyprune.runs import BASELINES

    names = [] if text == "none" else text.split(",")
    for name in names:
        if name not in BASELINES:
            raise ValueError(f"--baselines {text}: {name!r} is unknown; expected {', '.join(BASELINES)} or none")
    return names


# ----------------------------------------------------------------------------------------------------- demo and tune

DEMO: dict[str, Any] = {
    "steps": 48,
    "batch_size": 4,
    "window": 256,
    "learning_rate": 1e-3,
    "warmup": 4,
    "dtype": "bfloat16",
    "eval_tokens": 16384,
    "round_to": 16,
    "lora_rank": 16,
    "lora_alpha": 16.0,
    "lora_dropout": 0.0,
    "milestone": 2 / 3,
    "save_every": 16,
}


def _demo_options(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder (default: runs/demo)")
    _run_options(parser, argv, "lora,prune-then-tune", DEMO)


def _demo(args: Options) -> dict[str, Any]:
    from pyprune import data, runs

    recipe, method = from_fields(runs.Recipe, args), from_fields(find(args.method), args)
    baselines = _baselines(args.baselines)
    config = _config(args, recipe, method, baselines)
    _log_to_stderr()
    with runs.open_run(args.out, config, args.resume) as run:
        dense = run.folder / "dense"
        run.stage(
            "model",
            lambda: {"folder": str(dense if dense.exists() else data.demo_model(dense)), "model": data.DEMO_MODEL},
        )
        experiment = runs.Experiment(dense, data.demo_text(), recipe, args.method, method, baselines, progress=True)
        return experiment(run)


def _tune_options(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a transformers checkpoint in safetensors")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="text, jsonl or parquet to train on")
    parser.add_argument("--eval-data", type=Path, metavar="FILE", help="held-out text (default: a tenth of --data)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="run folder; the result is in DIR/model")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the model brings")
    _run_options(parser, argv, "lora", {})


def _tune(args: Options) -> dict[str, Any]:
    from pyprune import data, models, runs

    recipe, method = from_fields(runs.Recipe, args), from_fields(find(args.method), args)
    baselines = _baselines(args.baselines)
    config = _config(args, recipe, method, baselines) | {"model": args.model}
    for key, path in (("data", args.data), ("eval_data", args.eval_data)):
        config[key] = None if path is None else str(path)
        config[f"{key}_sha256"] = None if path is None else runs.file_digest(path)
    runs.check_folder(args.out, config, args.resume)
    runs.check_method(method, args.model, args.trust_remote_code)
    tokenizer = models.open_tokenizer(args.model, args.trust_remote_code)
    corpus = data.file_corpus(args.data, args.eval_data, tokenizer)
    _log_to_stderr()
    experiment = runs.Experiment(
        args.model,
        corpus,
        recipe,
        args.method,
        method,
        baselines,
        trust_remote_code=args.trust_remote_code,
        progress=True,
    )
    with runs.open_run(args.out, config, args.resume) as run:
        return experiment(run)


def _config(args: Options, recipe: Any, method: Any, baselines: list[str]) -> dict[str, Any]:
    """What defines the result of a run, flat, so that a difference can be named."""
    known = {"command": args.command, "method": args.method, "baselines": baselines}
    return known | dataclasses.asdict(method) | dataclasses.asdict(recipe)


def _log_to_stderr() -> None:
    from rich.logging import RichHandler

    from pyprune.console import console

    logger = logging.getLogger("pyprune")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [RichHandler(console=console, show_path=False, show_level=False, omit_repeated_times=False)]
    logging.getLogger("py.warnings").propagate = False


def _show_summary(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

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
    for side in ("prefill", "decode"):
        limit = summary[f"{side}_speedup_limit"]
        table.add_row(f"{side} (limit {limit:.2f}x)", "1.00x", f"{summary[f'{side}_speedup']:.2f}x")
    evaluation, console = summary["evaluation"], Console()
    console.print(table)
    console.print(
        f"Perplexity on {evaluation['tokens']:,} held-out tokens, window {evaluation['window']}, stride "
        f"{evaluation['stride']}: {summary['data']['text']}. {summary['tokens_trained']:,} tokens trained in "
        f"{summary['seconds']:.0f} s ({summary['seconds_total']:.0f} s in all).",
        highlight=False,
    )


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


# ------------------------------------------------------------------------------------------------------ eval and info


def _eval_options(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a transformers checkpoint in safetensors")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="text, jsonl or parquet")
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens a window reads (default: 512)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens between windows (default: the window)")
    parser.add_argument("--tokens", type=int, metavar="N", help="measure on the first N tokens (default: all)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the model brings")


def _eval(args: Options) -> dict[str, Any]:
    from pyprune import data, evaluation, models

    if args.tokens is not None and args.tokens < args.window:
        raise ValueError(f"--tokens {args.tokens} is smaller than a window of {args.window}")
    tokenizer = models.open_tokenizer(args.model, args.trust_remote_code)
    stream = data.encode(data.read_documents(args.text, tokenizer), tokenizer)
    ids, labels = stream.ids[: args.tokens], stream.labels[: args.tokens]
    if len(ids) < args.window:
        raise data.DataError(f"{args.text} has {len(ids)} tokens, fewer than one window of {args.window}")
    model = models.open_model(args.model, args.dtype, args.trust_remote_code)
    found = evaluation.perplexity(model, ids, args.window, args.stride, labels=labels, bos=stream.bos, progress=True)
    return {"model": args.model, "text": str(args.text), "perplexity": found.value, **dataclasses.asdict(found)}


def _show_eval(result: dict[str, Any]) -> None:
    print(
        f"perplexity {result['perplexity']:.4f} (nll {result['nll']:.6f} nats) on {result['tokens']:,} tokens of "
        f"{result['text']}, window {result['window']}, stride {result['stride']}"
    )


def _info(args: Options) -> dict[str, Any]:
    from pyprune import info

    return info.report()


def _show_info(result: dict[str, Any]) -> None:
    from pyprune import info

    print(info.render(result))


# ----------------------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Command:
    """One command: its line of help, its options, what it does and how its result is shown."""

    help: str
    options: Callable[[argparse.ArgumentParser, list[str]], None]
    run: Callable[[Options], dict[str, Any]]
    show: Callable[[dict[str, Any]], None]


COMMANDS = {
    "demo": Command(
        "tune and prune a small real model and compare it with the dense one", _demo_options, _demo, _show_summary
    ),
    "tune": Command(
        "tune and prune a model on your data; exports an ordinary checkpoint", _tune_options, _tune, _show_summary
    ),
    "eval": Command("perplexity of a model on a text", _eval_options, _eval, _show_eval),
    "info": Command("versions, devices, and what each op runs on", lambda parser, argv: None, _info, _show_info),
}
