"""The micro view: every op and rival of bench_ops.py on the small weights of SmolLM2-135M, by pytest-benchmark.

    pytest benchmarks/ --benchmark-only
    pytest benchmarks/ --benchmark-only -k nm_linear --benchmark-autosave
    pytest benchmarks/ --benchmark-only -k nm_linear --benchmark-compare         beside those kept last

Each is checked first, and called on one data set after the other, so that these are cold. On a GPU a call ends when the
device has done it: these are times with launches; bench_ops.py leaves launches out, and its contenders take turns.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import bench_ops
import pytest
import torch
from harness import Case

from pyprune import speed, timing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE, TOKENS = "SmolLM2-135M", (1, 64)
WITHOUT = ("compile",)  # it takes longer than all others together


@functools.cache
def cases() -> dict[str, Case]:
    """By their names; all are kept, a few megabytes each."""
    torch.manual_seed(0)
    found = (bench_ops.contest(case, without=WITHOUT) for case in speed.cases(SIZE, DEVICE, TOKENS))
    return {f"{case.op} {case.label}": case for case in found}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    pairs = [(name, who) for name, case in cases().items() for who in (*case.contenders, *case.skipped)]
    metafunc.parametrize(("name", "who"), pairs, ids=[f"{name} {who}" for name, who in pairs])


def test_op(benchmark: Any, name: str, who: str) -> None:
    """One contender of one case."""
    case = cases()[name]
    if who in case.skipped:
        pytest.skip(case.skipped[who])
    contender = case.contenders[who]
    with torch.no_grad():
        entrant = timing.enter(contender, DEVICE, lambda result: case.check(who, result))
        count = timing.copies_for(timing.bytes_of(*entrant.data), DEVICE)
        sets = itertools.cycle([entrant.data, *(contender.make() for _ in range(count - 1))])

        def call() -> None:
            contender.run(*next(sets))
            timing.now(DEVICE)

        benchmark.group = name
        benchmark.extra_info["floor"] = timing.floor(case.bytes, case.operations, DEVICE, case.dtype)
        benchmark(call)
