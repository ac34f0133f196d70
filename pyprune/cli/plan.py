"""`pyprune plan MODEL --target params=0.75`: what would go, block by block; saved, or applied, when asked for."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from pyprune.cli import structured

HELP = "choose heads, channels, hidden size and blocks to remove; print, save or apply the choice"


def options(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    from pyprune.criteria import CRITERIA
    from pyprune.plan import AXES

    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a transformers checkpoint in safetensors")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--target",
        metavar="TEXT",
        help="the model that is left: params=, bytes= (a share of the dense model's, or a number), latency= (a share, "
        "measured), or a shape such as heads=4,channels=8192,hidden=3072,layers=28",
    )
    what.add_argument("--apply", type=Path, metavar="FILE", help="cut as a saved plan says; needs --out")
    parser.add_argument("--out", type=Path, metavar="DIR", help="with --apply: where the smaller checkpoint goes")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the plan, for --apply")
    axes, criterion = "heads,channels", "activation"
    parser.add_argument("--axes", default=axes, help=f"what may shrink, of {','.join(AXES)} (default: {axes})")
    parser.add_argument(
        "--criterion", default=criterion, choices=list(CRITERIA), help=f"what is important (default: {criterion})"
    )
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="text, jsonl or parquet that criteria read")
    structured.add_calibration_windows(parser)
    parser.add_argument(
        "--round-to", type=int, default=64, metavar="N", help="of channels and hidden size (default: 64)"
    )
    parser.add_argument(
        "--uniform",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the same widths in every block, as stock code wants (default: yes)",
    )
    parser.add_argument(
        "--skip", default="", metavar="LIST", help="with --no-uniform: blocks to leave alone, as 0,1,29"
    )
    parser.add_argument(
        "--ranking", default="local", choices=["local", "global"], help="in every block (default: local), or in all"
    )
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the model brings")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from pyprune.plan import Plan

    if (args.apply is None) != (args.out is None):
        raise ValueError("--apply FILE and --out DIR belong together; a plan with --target is only printed or saved")
    chosen = Plan.load(args.apply) if args.apply else _make(args)
    if args.apply:
        _apply(chosen, args)
    elif args.save:
        chosen.save(args.save)
    return {**dataclasses.asdict(chosen), "table": chosen.table(), "saved": _text(args.save), "out": _text(args.out)}


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _make(args: argparse.Namespace) -> Any:
    from pyprune import models, plan
    from pyprune.criteria import WITHOUT_TEXT, score

    try:
        skip = tuple(int(number) for number in args.skip.split(",") if number)
    except ValueError:
        raise ValueError(f"--skip {args.skip}: expected numbers of blocks separated by commas, as 0,1,29") from None
    rules = plan.Rules(tuple(args.axes.split(",")), args.uniform, args.round_to, skip)
    plan.Target.parse(args.target)  # what can be wrong is said before anything large is read
    if args.calibration is None and args.criterion not in WITHOUT_TEXT:
        raise ValueError(
            f"--criterion {args.criterion} reads text: give --calibration FILE, or choose {' or '.join(WITHOUT_TEXT)}"
        )
    structured.check_calibration_windows(args)
    batches = structured.calibration_batches(args)
    model = models.open_model(args.model, args.dtype, args.trust_remote_code)
    return plan.make(model, args.target, score(model, batches, args.criterion), rules, ranking=args.ranking)


def _apply(chosen: Any, args: argparse.Namespace) -> None:
    from pyprune import models, surgery

    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"--out {args.out} exists and is not an empty folder; name a new one or empty it")
    tokenizer = models.open_tokenizer(args.model, args.trust_remote_code)
    model = models.open_model(args.model, args.dtype, args.trust_remote_code)
    surgery.export(chosen.apply(model), tokenizer, args.out)


def show(result: dict[str, Any]) -> None:
    print(result["table"])
    if result["saved"]:
        print(f"saved: {result['saved']}")
    if result["out"]:
        print(f"cut: {result['out']}")
