"""One measurement for every benchmark: contenders take turns on cold data, beside the floor of their work.

A `Case` says what is computed, by whom, and the least bytes and operations that it takes. `run` checks every contender
against the expected result, times them (`pyprune.timing`), and prints for each its time, its gain over the first one
and the share of the floor's speed that it reaches. The floor (`timing.floor`) is the longer of the bytes at the
bandwidth of a large copy and the operations at the rate of a large product, both measured here in this process.

A contender with a wrong result ends the benchmark. A rival that crashes is named with its reason and left out; one of
ours (`results.OURS`) that crashes ends the benchmark too.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from models import conditions
from results import OURS, Row, append, check
from torch import Tensor

from pyprune import timing
from pyprune.timing import Contender, Samples

LEAST = ("floor", "limit")
"""Bounds that the shares are of."""
UNITS = {"us": 1e6, "ms": 1e3, "s": 1.0}
Clock = Callable[[], float]


@dataclass
class Case:
    """One op or step at one size.

    Attributes:
        op: its name.
        label: its sizes and dtype.
        contenders: by name; ratios are against the first.
        bytes, operations: the least that the op moves and computes; without either there is no floor.
        dtype: of the matrix products, whose rate the operations are counted at.
        expected: what every contender's result must be, a tensor or a tuple of them; None where contenders check
            themselves.
        allowed: the error, relative to `expected` in the norm, that is still roundings.
        roundings: contender -> the error allowed to it, where that is more: of quantised weights.
        graphs: whether it can be a CUDA graph; what reads a result back cannot.
        skipped: who could not run, and why.
        bounds: parts of the work, timed in turn with the contenders, and not checked.
        unit: of the rows, a key of `UNITS`.
        copies: data sets of every contender, where that is not to be as many as make the data cold.
    """

    op: str
    label: str
    contenders: dict[str, Contender]
    bytes: int = 0
    operations: int = 0
    dtype: torch.dtype = torch.bfloat16
    expected: Tensor | tuple[Tensor, ...] | None = None
    allowed: float = 0.0
    roundings: dict[str, float] = field(default_factory=dict)
    graphs: bool = True
    skipped: dict[str, str] = field(default_factory=dict)
    bounds: dict[str, Contender] = field(default_factory=dict)
    unit: str = "us"
    copies: int | None = None

    def check(self, name: str, result: object) -> None:
        """Ends the benchmark when a contender computes something else."""
        if self.expected is None or name in self.bounds:
            return
        error, allowed = timing.error(result, self.expected), self.roundings.get(name, self.allowed)
        if not error <= allowed:
            raise SystemExit(f"{self.op}, {self.label}: {name} is off by {error:.1e}, more than {allowed:.1e}")


def measure(
    case: Case, device: torch.device, rounds: int, clock: Clock = time.perf_counter, budget: float = math.inf
) -> dict[str, Samples]:
    """Checks the contenders, and times them in turn with the bounds; who crashes goes to `case.skipped`.
    `time.process_time` as the clock of a CPU is for one thread on a busy machine. `budget`: seconds for the case, where
    slow calls get fewer rounds (`timing.race`)."""
    entrants: dict[str, timing.Entrant] = {}
    for name, contender in (case.contenders | case.bounds).items():
        try:
            entrants[name] = timing.enter(contender, device, lambda result, name=name: case.check(name, result))
        except Exception as error:
            if name in OURS:
                raise
            case.skipped[name] = failure(error)
    return timing.race(entrants, rounds, device, budget=budget, copies=case.copies, graphs=case.graphs, clock=clock)


def failure(error: Exception) -> str:
    """Why somebody who crashed was skipped, in a line."""
    return f"it fails with {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def work(case: Case) -> str:
    """The least that a case moves and computes, such as "45 MB and 1.2 GFLOP"."""
    return " and ".join(amount(n, unit) for n, unit in ((case.bytes, "B"), (case.operations, "FLOP")) if n)


def amount(number: float, unit: str) -> str:
    """With four digits and a prefix of the unit."""
    prefix = min(int(math.log10(number)) // 3, 4)
    return f"{number / 1000**prefix:.4g} {['', 'k', 'M', 'G', 'T'][prefix]}{unit}"


def report(case: Case, found: dict[str, Samples], device: torch.device, clock: Clock = time.perf_counter) -> list[Row]:
    """Prints a line for each contender and bound, and who was skipped; returns the rows. Shares are of
    the first of `LEAST`."""
    bound = next((name for name in LEAST if name in found), None)
    least = found[bound].p50 if bound else None
    first, base = next(iter(found.items()))
    scale, unit = UNITS[case.unit], case.unit
    unit += " GPU time" if device.type == "cuda" else " CPU time" if clock is time.process_time else ""
    print(f"\n{case.op}, {case.label}")
    rows = []
    for name, times in found.items():
        note = f"{base.p50 / times.p50:6.2f}x {first}   ({scale * times.p20:.4g} to {scale * times.p80:.4g})"
        if least is not None and name not in LEAST:
            note += f"   {timing.share(least, times.p50)} of the {bound}'s speed"
        if device.type == "cuda" and not times.graph and name not in LEAST:
            note += "   (launched one by one)"
        if name == "floor" and (least_work := work(case)):
            note += f"   of {least_work}"
        print(f"  {name:18} {scale * times.p50:10.4g} {unit}   {note}", flush=True)
        rows.append(Row(case.op, case.label, name, unit, scale * times.p20, scale * times.p50, scale * times.p80))
    for name, reason in case.skipped.items():
        print(f"  {name:18} skipped: {reason}", flush=True)
    return rows


def run(
    case: Case, device: torch.device, rounds: int, clock: Clock = time.perf_counter, budget: float = math.inf
) -> list[Row]:
    """Checks, measures, prints and returns the rows of one case, that of its floor last. The floor is one of the wall
    clock, so processor time has none."""
    found = measure(case, device, rounds, clock, budget)
    if clock is not time.process_time and (case.bytes or case.operations):
        found["floor"] = Samples((timing.floor(case.bytes, case.operations, device, case.dtype),))
    if device.type == "cuda":
        gc.collect()  # graphs hold memory of the device
    return report(case, found, device, clock)


# ------------------------------------------------------------------------------------------------------- command lines


def options(
    doc: str | None, rounds: int, budget: float = math.inf, devices: Sequence[str] = ("cpu", "cuda")
) -> argparse.ArgumentParser:
    """What every benchmark's command line has; `doc` is its page."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=devices)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--budget", type=float, default=budget, help="seconds a case, where slow calls get less rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for one thread on a busy machine")
    parser.add_argument("--save", action="store_true", help="append to results.csv")
    return parser


class Session:
    """One run of a benchmark, as its command line wants it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device, self.rounds, self.budget = torch.device(arguments.device), arguments.rounds, arguments.budget
        self.clock: Clock = time.process_time if arguments.cpu_time else time.perf_counter
        self.save = arguments.save
        if self.save:
            check()  # before anything is measured
        torch.set_num_threads(arguments.threads)
        torch.manual_seed(0)
        print(conditions(arguments.threads) + (", CPU time" if arguments.cpu_time else ""))

    def run(self, case: Case) -> None:
        """`run`, and the rows are kept: case by case, so that what was measured stays when a later one fails."""
        self.keep(run(case, self.device, self.rounds, self.clock, self.budget))

    def measure(self, case: Case) -> dict[str, Samples]:
        """`measure`, for who makes rows of its own."""
        return measure(case, self.device, self.rounds, self.clock, self.budget)

    def report(self, case: Case, found: dict[str, Samples]) -> None:
        """`report`, and the rows are kept."""
        self.keep(report(case, found, self.device, self.clock))

    def keep(self, rows: list[Row]) -> None:
        """In results.csv, where that is wanted."""
        if self.save:
            append(rows, self.device.type)
