"""The table that tune_sparse_gemm.py makes of measured times, here invented ones."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pyprune._cuda import plans

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("tune_sparse_gemm")


def invented(op: str, dtype: torch.dtype, layer: tuple[int, int], tokens: int, choice: Any) -> float:
    """Plain multiply-adds win up to two tokens, then tensor cores; 3 blocks win up to 16, then 2; 256 expand.

    One layer disagrees: on the smallest one 8 blocks are best, by less than what they lose on the others.
    """
    size = layer[0] * layer[1]
    if choice == "dense":
        return 1.5 * size
    if choice == "expand":
        return 3.0 * size if tokens < 256 else 0.5 * size
    if choice == "cutlass":
        return 0.5 * size if tokens != 512 else 0.6 * size
    kernel, blocks = choice
    slow = 1.2 if dtype == torch.bfloat16 and kernel != ("plain" if tokens <= 2 else "tensor cores") else 1.0
    wanted = 3 if tokens <= 16 else 2
    if layer == (4096, 4096):
        return size * slow * (0.9 if blocks == 8 else 1.0)
    return size * slow * (1 + 0.1 * abs(blocks - wanted))


def test_the_table_of_measured_times(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    table = script.tune(invented, True, lines.append)
    expected = {
        "16-bit": [[2, "plain", 3], [16, "tensor cores", 3], [128, "tensor cores", 2]],
        "32-bit": [[16, "plain", 3]],  # beyond 16 tokens the plain kernel is not tried
    }
    assert table == {"nm_linear": expected, "bitmap_linear": expected, "cutlass_tokens": 1024}
    assert script.tune(invented, False, lines.append)["cutlass_tokens"] == plans.tables()["default"]["cutlass_tokens"]
    assert "1.50x dense, 3.00x expanding" in lines[0]

    copy = tmp_path / "tables.json"
    copy.write_text(plans.TABLES.read_text())
    monkeypatch.setattr(plans, "TABLES", copy)
    script.save("NVIDIA X", table)
    before = json.loads((Path(plans.__file__).with_name("sparse_gemm.json")).read_text())
    assert json.loads(copy.read_text()) == {**before, "NVIDIA X": table}
