"""One measurement for every benchmark of ops: contenders take turns on cold data, beside the floor of their work.

A `Case` says what is computed, by whom, and the least bytes and operations that it takes. `run` checks every contender
against the expected result, times them (`pyprune.timing`), and prints for each its time, its gain over the first one
and the share of the floor's speed that it reaches. The floor (`timing.floor`) is the longer of the bytes at the
bandwidth of a large copy and the operations at the rate of a large product, both measured here in this process.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from results import Row
from torch import Tensor

from pyprune import timing

Data = tuple[Any, ...]


@dataclass(frozen=True)
class Contender:
    """Somebody's way to compute a case: `run(*data)`, on data that `make()` gives, new memory at each call."""

    run: Callable[..., object]
    make: Callable[[], Data]


@dataclass
class Case:
    """One op at one size.

    Attributes:
        op: its name.
        label: its sizes and dtype.
        contenders: by name; ratios are against the first.
        bytes, operations: the least that the op moves and computes.
        dtype: of the matrix products, whose rate the operations are counted at.
        expected: what every contender's result must be; None where contenders check themselves.
        allowed: the error, relative to `expected` in the norm, that is still roundings.
        graphs: whether it can be a CUDA graph; what reads a result back cannot.
        skipped: who could not run, and why.
    """

    op: str
    label: str
    contenders: dict[str, Contender]
    bytes: int
    operations: int = 0
    dtype: torch.dtype = torch.bfloat16
    expected: Tensor | None = None
    allowed: float = 0.0
    graphs: bool = True
    skipped: dict[str, str] = field(default_factory=dict)


def bytes_of(data: Sequence[object]) -> int:
    """Of all tensors among the data."""
    return sum(tensor.nbytes for tensor in data if isinstance(tensor, Tensor))


def check(case: Case, name: str, result: object) -> None:
    """Ends the benchmark when a contender computes something else."""
    if case.expected is None:
        return
    found = result[0] if isinstance(result, tuple) else result
    assert isinstance(found, Tensor)
    difference, size = (found.double() - case.expected.double()).norm(), case.expected.double().norm()
    error = float(difference / size) if size else float(difference)
    if not error <= case.allowed:
        raise SystemExit(f"{case.op}, {case.label}: {name} is off by {error:.1e}, more than {case.allowed:.1e}")


def run(case: Case, device: torch.device, rounds: int, clock: Callable[[], float] = time.perf_counter) -> list[Row]:
    """Checks, measures, prints and returns the rows of one case, that of its floor last. `time.process_time` as the
    clock of a CPU is for one thread on a busy machine."""
    sets: dict[str, list[Data]] = {}
    for name, contender in case.contenders.items():
        first = contender.make()
        check(case, name, contender.run(*first))
        size = bytes_of(first)
        copies = timing.copies_for(size, device) if case.graphs and size else 1
        sets[name] = [first, *(contender.make() for _ in range(copies - 1))]
    found = timing.interleave(
        {
            name: lambda i, run=contender.run, data=sets[name]: run(*data[i])
            for name, contender in case.contenders.items()
        },
        rounds,
        device,
        {name: len(data) for name, data in sets.items()},
        graphs=case.graphs,
        clock=clock,
    )
    least, base = timing.floor(case.bytes, case.operations, device, case.dtype), found[next(iter(found))]
    print(f"\n{case.op}, {case.label}   floor {1e6 * least:.1f} us")
    rows = []
    unit = "us GPU time" if device.type == "cuda" else "us CPU time" if clock is time.process_time else "us"
    for name, times in found.items():
        eager = "" if times.graph or device.type == "cpu" else "   (launched one by one)"
        print(
            f"  {name:14} {1e6 * times.p50:10.1f} us   {base.p50 / times.p50:6.2f}x {next(iter(found))}   "
            f"{least / times.p50:5.0%} of the floor's speed{eager}",
            flush=True,
        )
        rows.append(Row(case.op, case.label, name, unit, 1e6 * times.p20, 1e6 * times.p50, 1e6 * times.p80))
    for name, reason in case.skipped.items():
        print(f"  {name:14} skipped: {reason}")
    rows.append(Row(case.op, case.label, "floor", unit, *[1e6 * least] * 3))
    del sets
    gc.collect()
    return rows
