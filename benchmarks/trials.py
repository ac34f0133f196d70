"""Trials of a benchmark as child processes, some at a time; what is done stays done, whatever becomes of the others.

A script that has trials calls `add_options`, and with `--one NAME ...` it is the child that works through these. On a
GPU, which one trial leaves half idle, `--jobs 8` is several times faster, and a child takes a share of all trials, so
that it starts and reads the text only once. On a CPU every trial has a child of its own, whose peak memory is then that
of the trial.

What is finished becomes rows of a csv in git. New rows join those that are there, which took hours on other days and
machines; only rows of one protocol are compared with each other.
"""

from __future__ import annotations

import argparse
import csv
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from csvs import Cell, read_csv

LINES = 15  # of a failed child's output that are shown
PATIENCE = 15.0  # seconds that an interrupted child has to write a checkpoint

Result = Callable[[str], "str | None"]
"""A line about a finished trial, None for another one."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that all such scripts have."""
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trials at a time; above 1 no speed is taken")
    parser.add_argument("--collect", action="store_true", help="run nothing, write the results of what is finished")
    parser.add_argument("--threads", type=int, help="of torch in each process (default: all cores, shared by the jobs)")
    parser.add_argument("--one", nargs="+", metavar="NAME", help=argparse.SUPPRESS)


def set_threads(arguments: argparse.Namespace) -> int:
    """Sets and returns torch's threads of this process."""
    torch.set_num_threads(arguments.threads or max(1, torch.get_num_threads() // arguments.jobs))
    return torch.get_num_threads()


@dataclass
class _Child:
    names: list[str]
    process: subprocess.Popen[bytes]
    log: Path | None


def run(names: Sequence[str], result: Result, logs: Path, jobs: int = 1) -> list[str]:
    """Runs this script with `--one` for all trials that are not finished, `jobs` at a time. A child that fails loses
    one trial; what is left of its share gets another child. Ctrl-C and SIGTERM stop all of them, and this returns.

    Args:
        result: looks for what a child has written.
        logs: the folder where the children's output goes, when there are several at a time.

    Returns:
        The trials that are not finished.
    """
    todo = [name for name in names if result(name) is None]
    alone = not torch.cuda.is_available()
    waiting = [[name] for name in todo] if alone else [todo[i::jobs] for i in range(min(jobs, len(todo)))]
    running: list[_Child] = []
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(waiting.pop(0), logs if jobs > 1 else None))
            time.sleep(0.1)
            ended = [child for child in running if child.process.poll() is not None]
            todo = [name for name in todo if not _shown(name, result)]
            for child in ended:
                running.remove(child)
                if left := [name for name in child.names if name in todo]:
                    _report(left[0], child)
                    waiting[:0] = [left[1:]] if left[1:] else []
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
    finally:
        _stop([child.process for child in running])
        signal.signal(signal.SIGTERM, before)
    return [name for name in names if result(name) is None]


def finish(missing: Sequence[str], logs: Path) -> None:
    """Ends the script with an error that says which trials are missing, if any are."""
    if missing:
        raise SystemExit(f"{len(missing)} trials are not finished: {', '.join(missing)}; what they said is in {logs}")


# ------------------------------------------------------------------------------------------------------------ the csv


def write_csv(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Replaces the file."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


def add_rows(found: Sequence[dict[str, Any]], path: Path, key: Sequence[str]) -> list[Cell]:
    """Puts rows beside those that are there, in place of the ones that agree in `key`. Returns all of them.

    Raises SystemExit when the file has other columns."""
    columns = list(found[0])
    before = read_csv(path, columns) if path.exists() else []
    write_csv(list({tuple(str(row[name]) for name in key): row for row in (*before, *found)}.values()), path)
    return read_csv(path, columns)


def protocols(cells: Sequence[Cell], names: Sequence[str]) -> list[list[Cell]]:
    """The rows that agree in `names`, and so can be compared; the largest group first."""
    found: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        found.setdefault(tuple(cell[name] for name in names), []).append(cell)
    return sorted(found.values(), key=len, reverse=True)


# ----------------------------------------------------------------------------------------------------------- children


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _start(names: list[str], logs: Path | None) -> _Child:
    command = [sys.executable, *sys.argv, "--one", *names]
    # a session of its own: a signal to all of this process's group would reach the child twice, and a second one means
    # that it is to end without a checkpoint
    if logs is None:
        return _Child(names, subprocess.Popen(command, start_new_session=True), None)
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{names[0]}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    return _Child(names, process, log)


def _shown(name: str, result: Result) -> bool:
    """Whether a trial is finished; then its line is printed."""
    line = result(name)
    if line is not None:
        print(f"{name}: {line}", flush=True)
    return line is not None


def _report(name: str, child: _Child) -> None:
    said = ""
    if child.log is not None:
        lines = child.log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = "\n    ".join(["; it said:", *lines[-LINES:]])
    print(f"{name}: failed with status {child.process.returncode}{said}", file=sys.stderr, flush=True)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    end = time.monotonic() + PATIENCE
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()
