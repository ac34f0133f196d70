"""The table that results.py makes of kept rows."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest


def test_newest_row_counts_and_gains_are_ratios_of_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    results = importlib.import_module("results")

    def row(provider: str, p50: str) -> dict[str, Any]:
        return {"benchmark": "nm_linear", "case": "T=1", "unit": "us", "provider": provider, "p50": p50}

    kept = [row("2:4", "99"), row("dense", "30"), row("2:4", "20"), row("floor", "16")]
    other = [{**row("dense", "1"), "case": "no kernel of ours"}]
    *_, line = results.table(kept + other).splitlines()
    assert line == "| nm_linear | T=1 | us | 20 | 16 (80%) | dense 30 (1.50x) |"
