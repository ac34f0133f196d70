"""`pyprune report RUN [RUN ...]`: what runs did, as one page, pictures and tables; several runs side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "a page with the pictures and tables of one or more runs"


def options(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder: what --out was")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/report"), metavar="DIR", help="folder of the page (default: runs/report)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from pyprune import report

    return report.make(args.runs, args.out)


def show(result: dict[str, Any]) -> None:
    from pyprune import report

    report.show(result)
    print("written: " + ", ".join(result["files"]))
