"""`pyprune info`: versions, devices, and what each op runs on."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "versions, devices, and what each op runs on"


def options(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """None of its own."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    from pyprune import info

    return info.report()


def show(result: dict[str, Any]) -> None:
    from pyprune import info

    print(info.render(result))
