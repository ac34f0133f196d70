"""The table and the picture that results.py makes of kept rows."""

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


def test_gains_of_packed_linears(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The newest row of each contender, shapes side by side; what is no packed bf16 linear is left out."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    results = importlib.import_module("results")

    def row(benchmark: str, case: str, provider: str, p50: float) -> dict[str, str]:
        return {"benchmark": benchmark, "case": case, "unit": "us", "provider": provider, "p50": str(p50)}

    rows = [
        row("bitmap_linear", "down 8x8 T=1 bfloat16 50%", "bitmap", 9),
        row("bitmap_linear", "down 8x8 T=1 bfloat16 50%", "dense", 8),
        row("bitmap_linear", "down 8x8 T=1 bfloat16 50%", "bitmap", 4),
        row("bitmap_linear", "up 8x8 T=1 bfloat16 50%", "dense", 9),
        row("bitmap_linear", "up 8x8 T=1 bfloat16 50%", "bitmap", 3),
        row("bitmap_linear", "up 8x8 T=16 float32 50%", "dense", 9),
        row("nm_linear", "up 8x8 T=16 bfloat16", "dense", 6),
        row("nm_linear", "up 8x8 T=16 bfloat16", "2:4", 12),
        row("masked_linear", "up 8x8 T=1 bfloat16 50%", "dense", 6),
    ]
    gains = results.packed_gains(rows)
    assert gains == {"bitmap 50%": {1: [2, 3]}, "2:4": {16: [0.5]}}
    results.picture(gains, [1, 16], "title", tmp_path / "packed.png")
    assert (tmp_path / "packed.png").read_bytes().startswith(b"\x89PNG")
