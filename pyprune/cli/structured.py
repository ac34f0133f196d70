"""`pyprune prune --method slimgpt|llm-pruner|slicegpt`: cut whole heads, channels or hidden dimensions, no training."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from pyprune.methods import find

METHODS = ("slimgpt", "llm-pruner", "slicegpt")


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """The method's own options, without those of LoRA, and what calibrates and measures."""
    from pyprune.cli.fields import add_fields

    add_fields(parser, find(name), without=_lora_options())
    add_calibration_windows(parser)
    parser.add_argument("--eval-window", type=int, default=512, metavar="N", help="tokens in a window of perplexity")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])


def add_calibration_windows(parser: argparse.ArgumentParser) -> None:
    """What `calibration_batches` reads of --calibration."""
    for name, default, text in (("windows", 32, "of the calibration text"), ("window", 256, "tokens in one of them")):
        parser.add_argument(
            f"--calibration-{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})"
        )


def check_calibration_windows(args: argparse.Namespace) -> None:
    """Raises ValueError when one of the two makes no sense."""
    _check_least(args, calibration_windows=1, calibration_window=2)


def _check_least(args: argparse.Namespace, **least: int) -> None:
    for name, value in least.items():
        if getattr(args, name) < value:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected at least {value}")


def calibration_batches(args: argparse.Namespace) -> list[Any] | None:
    """The first windows of the calibration text, in batches of four; None without a text. Raises DataError when the
    text is shorter than one."""
    from pyprune import data

    if args.calibration is None:
        return None
    documents, tokenizer = _documents(args, args.calibration)
    windows = data.encode(documents, tokenizer).windows(args.calibration_window)
    return list(windows.ids[: args.calibration_windows].split(4))


def _lora_options() -> set[str]:
    return {field.name for field in dataclasses.fields(find("lora"))}


def method_of(args: argparse.Namespace) -> Any:
    """The method that the options describe."""
    method = find(args.method)
    names = {field.name for field in dataclasses.fields(method)} - _lora_options()
    return method(**{name: getattr(args, name) for name in names})


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Cuts, exports to OUT/model, and measures that checkpoint beside the dense one."""
    from pyprune import runs

    method = method_of(args)
    check_calibration_windows(args)
    _check_least(args, eval_window=2)
    config = {"command": "prune", "method": args.method, "model": args.model, **dataclasses.asdict(method)}
    for key, path in (("calibration", args.calibration), ("eval_data", args.eval_data)):
        config[key] = None if path is None else runs.file_digest(path)
    config |= {key: getattr(args, key) for key in ("calibration_windows", "calibration_window", "eval_window", "dtype")}
    runs.check_folder(args.out, config, args.resume)
    runs.check_method(method, args.model, args.trust_remote_code)
    if args.calibration is None and method.reads_text:
        raise ValueError(f"--method {args.method} reads text to choose what goes: give --calibration FILE")
    batches, held_out = calibration_batches(args), _held_out(args)
    with runs.open_run(args.out, config, args.resume, args.argv) as run:
        cut = run.stage("cut", lambda: _cut(args, method, batches, run))
        measured = run.stage("measure", lambda: _measure(args, held_out, run)) if held_out else {}
        counted = {key: value for key, value in cut.items() if key not in ("dense", "pruned")}
        summary = {**config, **counted, **measured, "model_pruned": str(run.model), **runs.environment()}
        runs.write_json(run.folder / "summary.json", summary)
    return summary


def _cut(args: argparse.Namespace, method: Any, batches: list[Any] | None, run: Any) -> dict[str, Any]:
    import shutil

    from pyprune import models, runs, surgery
    from pyprune.architectures import describe
    from pyprune.plan import Widths

    model = models.open_model(args.model, args.dtype, args.trust_remote_code)
    before = runs.shape_of(model)
    model = method.cut(model, batches)
    shutil.rmtree(run.model, ignore_errors=True)  # of a run that was stopped between the export and its record
    surgery.export(model, models.open_tokenizer(args.model, args.trust_remote_code), run.model)
    after, widths = runs.shape_of(model), Widths.of(describe(model)).largest()
    counts = {"params_dense": before["params"], "params_pruned": after["params"], "widths": widths}
    return counts | {"dense": before, "pruned": after}


def _documents(args: argparse.Namespace, path: Path) -> tuple[list[Any], Any]:
    """What a file holds, and the model's tokenizer."""
    from pyprune import data, models

    tokenizer = models.open_tokenizer(args.model, args.trust_remote_code)
    return data.read_documents(path, tokenizer), tokenizer


def _held_out(args: argparse.Namespace) -> Any:
    """The text to measure on, None without one. Raises DataError when it cannot be measured on."""
    from pyprune import data

    if args.eval_data is None:
        return None
    return data.held_out_stream(*_documents(args, args.eval_data), args.eval_window)


def _measure(args: argparse.Namespace, text: Any, run: Any) -> dict[str, Any]:
    from pyprune import evaluation, models

    found = {}
    for name, path in (("dense", args.model), ("pruned", run.model)):
        model = models.open_model(path, args.dtype, args.trust_remote_code)
        measured = evaluation.perplexity(model, text.ids, args.eval_window, labels=text.labels, bos=text.bos)
        found[f"ppl_{name}"] = measured.value
    return found | {"eval_tokens": measured.tokens}


def show(summary: dict[str, Any]) -> None:
    """What is left, and its perplexity."""
    from pyprune.plan import met

    widths = ", ".join(f"{axis} {count}" for axis, count in summary["widths"].items())
    print(f"{summary['method']}: {met(summary['target'], summary['params_dense'], summary['params_pruned'])}; {widths}")
    if "ppl_pruned" in summary:
        print(
            f"perplexity {summary['ppl_dense']:.2f} dense, {summary['ppl_pruned']:.2f} pruned, on "
            f"{summary['eval_tokens']:,} held-out tokens, window {summary['eval_window']}"
        )
    print(f"checkpoint: {summary['model_pruned']}")
