"""A dataclass as command line options: every field that has a `help` in its metadata."""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Collection
from typing import Any


def add_fields(
    parser: argparse.ArgumentParser,
    cls: type,
    defaults: dict[str, Any] | None = None,
    without: Collection[str] = (),
) -> None:
    """One option for every field of a dataclass that has a `help` in its metadata, but those named in `without`."""
    group = parser.add_argument_group(f"{cls.__name__} options")
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if "help" not in field.metadata or field.name in without:
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
        text = field.metadata["help"]
        if default is not None:
            text = f"{re.sub(r' [(]default: [^()]*[)]', '', text)} (default: {default})"
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            default=default,
            help=text.replace("%", "%%"),
            **known,
        )


def _plain_type(hint: Any) -> Any:
    """T of `T | None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


def from_fields(cls: type, args: argparse.Namespace) -> Any:
    """The dataclass that the options of `add_fields` describe."""
    names = [field.name for field in dataclasses.fields(cls) if "help" in field.metadata]
    return cls(**{name: getattr(args, name) for name in names})
