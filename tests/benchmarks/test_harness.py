"""The measurement that benchmarks share: what is checked, who is skipped, what a row says."""

from __future__ import annotations

import importlib
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pyprune import timing

CPU = torch.device("cpu")


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    """With a clock that a call of `Work` moves, and rates of round numbers."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1e6)
    return importlib.import_module("harness")


class Work:
    """Contenders whose calls take known seconds of this clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def contender(self, seconds: float, result: object = torch.ones(2)) -> timing.Contender:
        def call() -> object:
            self.now += seconds
            return result

        return timing.Contender(call)


def test_rows_have_the_unit_and_the_floor_comes_last(harness: Any, capsys: pytest.CaptureFixture[str]) -> None:
    work = Work()
    sides = {"dense": work.contender(0.004), "pyprune": work.contender(0.002)}
    case = harness.Case("op", "T=1", sides, bytes=1000, expected=torch.ones(2), unit="ms")
    rows = harness.run(case, CPU, 3, work.clock)
    assert [(row.benchmark, row.case, row.provider, row.unit) for row in rows] == [
        ("op", "T=1", name, "ms") for name in ("dense", "pyprune", "floor")
    ]
    assert [row.p50 for row in rows] == pytest.approx([4, 2, 1])
    assert "2.00x dense   (2 to 2)   50% of the floor's speed" in capsys.readouterr().out


def test_the_floor_says_of_what_work_and_a_faster_one_is_doubtful(
    harness: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "matmul_rate", lambda device, dtype: 1e9)
    work = Work()
    case = harness.Case("op", "T=1", {"pyprune": work.contender(20.0)}, bytes=45_000_000, operations=1_234_567_890)
    harness.run(case, CPU, 1, work.clock)
    shown = capsys.readouterr().out
    assert "   of 45 MB and 1.235 GFLOP\n" in shown and "doubtful 225% of the floor's speed" in shown
    harness.run(harness.Case("op", "T=1", {"pyprune": work.contender(1e-3)}, bytes=999), CPU, 1, work.clock)
    shown = capsys.readouterr().out
    assert "   of 999 B\n" in shown and "   100% of the floor's speed" in shown


def test_processor_time_says_so_and_has_no_floor(harness: Any) -> None:
    case = harness.Case("op", "T=1", {"pyprune": Work().contender(0.0)}, bytes=1000)
    (row,) = harness.run(case, CPU, 3, time.process_time)
    assert (row.provider, row.unit) == ("pyprune", "us CPU time")


def test_a_bound_is_timed_but_not_checked(harness: Any) -> None:
    work = Work()
    bounds = {"copy": work.contender(0.5, result=None)}
    case = harness.Case("op", "", {"pyprune": work.contender(1.0)}, expected=torch.ones(2), bounds=bounds, unit="s")
    assert [(row.provider, row.p50) for row in harness.run(case, CPU, 2, work.clock)] == [("pyprune", 1), ("copy", 0.5)]


def test_a_wrong_result_ends_the_benchmark_and_a_crash_only_when_it_is_ours(harness: Any) -> None:
    def crash() -> None:
        raise MemoryError

    work = Work()
    wrong = {"dense": work.contender(1.0), "pyprune": work.contender(1.0, torch.tensor([1.0, 1.1]))}
    with pytest.raises(SystemExit, match=r"op, T=1: pyprune is off by 7\.1e-02, more than 1\.0e-02"):
        harness.run(harness.Case("op", "T=1", wrong, expected=torch.ones(2), allowed=0.01), CPU, 1)
    rough = harness.Case(
        "op", "T=1", wrong, expected=torch.ones(2), allowed=0.01, roundings={"pyprune": 0.08}
    )  # fmt: skip
    assert len(harness.run(rough, CPU, 1, work.clock)) == 2
    nothing = harness.Case("op", "", {"dense": work.contender(1.0, (torch.full((2,), math.nan),))})
    nothing.expected = (torch.ones(2),)
    with pytest.raises(SystemExit, match="dense is off by nan"):
        harness.run(nothing, CPU, 1)
    sides = {"rival": timing.Contender(crash), "pyprune": work.contender(1.0)}
    case = harness.Case("op", "", sides)
    assert [row.provider for row in harness.run(case, CPU, 1, work.clock)] == ["pyprune"]
    assert case.skipped == {"rival": "it fails with MemoryError: no message"}
    with pytest.raises(MemoryError):
        harness.run(harness.Case("op", "", {"pyprune": timing.Contender(crash)}), CPU, 1)
