"""bench_ops.py on toy weights: every family is checked and kept, and a wrong result is refused."""

from __future__ import annotations

import csv
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pyprune import ops, timing

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], list[dict[str, str]]]:
    """Runs the script on small weights, with rates of this machine that need no measurement; returns what it kept."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("bench_ops")
    monkeypatch.setattr(importlib.import_module("results"), "RESULTS", tmp_path / "results.csv")
    monkeypatch.setattr(module, "SHAPES", {"attention": (64, 64), "down": (64, 128), "gate and up": (128, 64)})
    monkeypatch.setattr(timing, "copies_for", lambda nbytes, device: 2)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(timing, "matmul_rate", lambda device, dtype: 1e11)

    def run(arguments: str) -> list[dict[str, str]]:
        options = ["--tokens", "1", "3", "--rounds", "1", "--threads", "1", "--save", *arguments.split()]
        monkeypatch.setattr(sys, "argv", ["bench_ops.py", *options])
        module.main()
        with (tmp_path / "results.csv").open() as file:
            return list(csv.DictReader(file))

    return run


def test_every_family_is_kept_with_its_floor(bench: Any) -> None:
    kept = bench("--families packing ranks scores optimizer linears selected")
    floors = {(row["benchmark"], row["case"]): float(row["p50"]) for row in kept if row["provider"] == "floor"}
    assert {(row["benchmark"], row["case"]) for row in kept} == set(floors)
    found = {op for op, _ in floors}
    listed = {"nm_prune", "bitmap_pack", "rank_mask", "lora_group_score", "nm_adamw_", "nm_linear", "gathered_linear"}
    assert listed <= found
    # by hand: a 64 x 128 bf16 weight read, values and 2:4 metadata written, 1e10 bytes a second
    assert floors["nm_compress", "64x128 bfloat16"] == pytest.approx(
        1e6 * (64 * 128 * 2 * 1.5 + 64 * 128 / 8) / 1e10, rel=1e-3
    )


def test_a_wrong_result_is_refused(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.nm_linear
    monkeypatch.setattr(ops, "nm_linear", lambda *tensors: torch.mul(right(*tensors), 1.1))
    with pytest.raises(SystemExit, match=r"nm_linear, .*: 2:4 is off by"):
        bench("--families linears")
