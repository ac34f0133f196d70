"""The command line. Results go to stdout (with --json as one object), everything else to stderr.

Exit codes: 0 done; 1 the run failed (a loss that is not finite); 2 bad input, or too little memory; 130 interrupted,
continue with --resume. Each command is a file of its name with what `Command` lists. torch is imported only by the
command that needs it, so that `pyprune --help` is quick.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Protocol, cast

Options = argparse.Namespace

COMMANDS = ("demo", "tune", "plan", "prune", "compare", "eval", "generate", "bench", "export", "report", "info")


class Command(Protocol):
    """One command: its line of help, its options, what it does and how its result is shown."""

    HELP: str
    options: Callable[[argparse.ArgumentParser, list[str]], None]
    run: Callable[[Options], dict[str, Any]]
    show: Callable[[dict[str, Any]], None]


def _command(name: str) -> Command:
    return cast(Command, import_module(f"pyprune.cli.{name}"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(argv)
    args, unknown = parser.parse_known_args(argv, Options(argv=["pyprune", *argv]))
    if unknown:
        parser.error(_unknown(args, unknown))
    logging.captureWarnings(True)
    try:
        result = _command(args.command).run(args)
    except KeyboardInterrupt:
        return _failed(args, "interrupted; continue a run with --resume", 130)
    except Exception as error:
        return _handled(args, error)
    try:
        if args.json:
            print(json.dumps(result, indent=2))
        else:
            _command(args.command).show(result)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads a pipe has seen enough (`| head`); what is left must not fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _unknown(args: Options, unknown: Sequence[str]) -> str:
    """Why arguments were not understood: an option may be one of another method, or almost one of this one."""
    text = f"unrecognized arguments: {' '.join(unknown)}"
    if getattr(args, "method", None) is None:
        return text
    from pyprune.methods import with_option

    option = unknown[0].partition("=")[0]
    owners = with_option(option.removeprefix("--no-").removeprefix("--").replace("-", "_"))
    if owners and args.method not in owners:
        return f"{text}; {option} is an option of --method {', '.join(owners)}"
    return f"{text}; `pyprune {args.command} --method {args.method} --help` lists what it takes"


def _handled(args: Options, error: Exception) -> int:
    if args.debug:
        raise error
    codes: dict[type[Exception], int] = {ValueError: 2, OSError: 2}
    torch, training = map(sys.modules.get, ("torch", "pyprune.training"))  # not imported: `report` has no use for them
    if torch is not None:
        codes |= {torch.OutOfMemoryError: 2}
    if training is not None:
        codes |= {training.InterruptedTraining: 130, training.DivergedError: 1}
    code = next((code for kind, code in codes.items() if isinstance(error, kind)), None)
    if code is None:
        raise error  # a fault of ours: show all of it
    hint = "; continue with --resume" if code == 130 else ""
    return _failed(args, f"{error}{hint}", code)


def _failed(args: Options, message: str, code: int) -> int:
    print(f"pyprune {args.command}: {' '.join(message.split())}", file=sys.stderr)
    return code


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    from pyprune import __version__

    parser = argparse.ArgumentParser(
        prog="pyprune", description="Prunes language models and says honestly by how much."
    )
    parser.add_argument("--version", action="version", version=f"pyprune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = _command(name)
        sub = commands.add_parser(name, help=command.HELP, description=command.HELP)
        sub.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if argv[:1] == [name]:
            command.options(sub, argv)
    return parser
