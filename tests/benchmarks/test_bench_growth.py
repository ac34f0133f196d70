"""bench_growth.py: exponents of known power laws, and counts made by hand."""

from __future__ import annotations

import csv
import importlib
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pyprune.timing import Samples

SIZES = "--tokens 16 32 64 --hidden 32 64 128 --layers 1 2 4 --threads 1"


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("bench_growth")


def test_fit_of_a_power_law_is_its_exponent(growth: Any) -> None:
    sizes = [96, 250, 512, 2048, 5000]
    found = growth.fit(sizes, [3e-7 * size**1.7 for size in sizes])
    assert found.exponent == pytest.approx(1.7, abs=1e-12)
    assert found.residual == pytest.approx(0, abs=1e-12)


def test_fit_leaves_what_is_no_power_law(growth: Any) -> None:
    """Deviations of (+, -, -, +) at sizes that double are orthogonal to constant and slope: all of it is left."""
    sizes = [128, 256, 512, 1024]
    found = growth.fit(sizes, [5 * size**2 * 1.1**sign for size, sign in zip(sizes, (1, -1, -1, 1), strict=True)])
    assert found.exponent == pytest.approx(2, abs=1e-12)
    assert found.residual == pytest.approx(0.1, abs=1e-12)


def test_fit_of_a_fixed_cost_is_lower_than_the_law(growth: Any) -> None:
    """By hand: logarithms 0, 1, 2 of the sizes, log2 of 1 + 1, 1 + 2 and 1 + 4; the slope is (last - first) / 2."""
    found = growth.fit([1, 2, 4], [2, 3, 5])
    assert found.exponent == pytest.approx((math.log2(5) - 1) / 2)


@pytest.mark.parametrize(
    ("sizes", "values", "message"),
    [
        ([1, 2], [1, 2], "2 sizes for 2 values; expected a value each for three or more"),
        ([1, 2, 3], [1, 2], "3 sizes for 2 values"),
        ([1, 2, 3], [1, 0, 2], "the least size or value is 0; expected positive ones"),
    ],
)
def test_fit_refuses_what_it_cannot_judge(growth: Any, sizes: list[int], values: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        growth.fit(sizes, values)


def test_exponents_are_those_of_what_was_measured(
    growth: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A clock and a memory that follow laws of their own, another one for each axis."""

    def law(label: str) -> float:
        tokens, hidden, layers = (int(part.partition("=")[2]) for part in label.split()[:3])
        return 1e-6 * tokens**1.25 * hidden**1.5 * layers**0.75

    def measure(session: Any, case: Any) -> dict[str, Samples]:
        return {label: Samples((law(label),)) for label in case.contenders}

    right = growth.decode
    scenario = growth.Scenario(lambda size: replace(right(size), held=lambda: size))
    monkeypatch.setitem(growth.SCENARIOS, "decoded token", scenario)
    monkeypatch.setattr(growth.Session, "measure", measure)
    monkeypatch.setattr(growth, "peak", lambda held: 2**20 * law(str(held())) ** 2)
    monkeypatch.setattr(importlib.import_module("results"), "RESULTS", tmp_path / "results.csv")
    monkeypatch.setattr(sys, "argv", ["bench_growth.py", *SIZES.split(), "--scenarios", "decoded token", "--save"])
    growth.main()
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["case"].split()[0], row["unit"], row["provider"]): float(row["p50"]) for row in rows}
    for axis, exponent in (("tokens", 1.25), ("hidden", 1.5), ("layers", 0.75)):
        assert found[axis, "exponent of time", "measured"] == pytest.approx(exponent, abs=1e-3)  # four digits are kept
        assert found[axis, "exponent of memory", "measured"] == pytest.approx(2 * exponent, abs=1e-3)
        assert found[axis, "exponent of time", "within"] == pytest.approx(0, abs=1e-9)
        assert found[axis, "exponent of memory", "predicted"] == pytest.approx(1, abs=1e-3)
    assert "| decoded token | layers | 0.75 |" in capsys.readouterr().out


def test_a_prompt_is_counted_as_by_hand(growth: Any) -> None:
    """Blocks of four d x d and three d x 3 d, the head for the last token, half of what attention multiplies."""
    tokens, hidden, layers = 32, 64, 2
    work = growth.prefill(growth.Size(tokens, hidden, layers))
    products = 2 * tokens * layers * 13 * hidden**2 + 2 * hidden * growth.VOCABULARY
    assert work.count == products + layers * 2 * tokens**2 * hidden


def test_sparsegpt_is_counted_as_by_hand(growth: Any) -> None:
    """One window, one block: a pass for each of the four Gram matrices and one for the outputs, then the solves."""
    tokens, d = 32, 64
    work = growth.one_shot(growth.Size(tokens, d, 1), "sparsegpt")
    attention, weights = 2 * tokens**2 * d, [3 * d * d, d * d, 6 * d * d]  # before o, before gate and up, before down
    passes = sum(2 * tokens * sum(weights[:reached]) + (attention if reached else 0) for reached in range(4))
    passes += 2 * tokens * 13 * d * d + attention
    grams = 2 * tokens * (3 * d**2 + (3 * d) ** 2)
    factors = 3 * (4 * d**3 // 3) + 4 * (3 * d) ** 3 // 3
    solves = (4 * d + 6 * d) * d**2 + d * (3 * d) ** 2
    assert work.count == passes + grams + factors + solves


def test_autograd_keeps_what_is_counted(growth: Any) -> None:
    """The prediction of a step's memory grows by what a block keeps, the same for every block."""
    one, two, three = (growth.training(growth.Size(64, 64, layers), growth.LoRA()).nbytes for layers in (1, 2, 3))
    assert three - two == two - one > 0


def test_peak_is_what_a_call_allocates(growth: Any) -> None:
    """64 MiB, as Linux counts pages (some late), and less than a tenth beside it; what was held before is not in it."""
    held = torch.ones(2**23)
    found = growth.peak(lambda: torch.ones(2**24).sum()) / 2**20
    assert 63.5 < found < 70 and len(held) == 2**23
