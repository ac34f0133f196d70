"""The table and the picture that results.py makes of kept rows."""

from __future__ import annotations

import csv
import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module, with a csv of its own that is not there yet."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    module = importlib.import_module("results")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results.csv")
    return module


def test_a_csv_with_other_columns_is_refused_and_stays(
    results: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By who appends, by who reads, and before anything is measured."""
    file = tmp_path / "results.csv"
    file.write_text("hardware,b\nH100,2\n")
    harness = importlib.import_module("harness")
    monkeypatch.setattr(sys, "argv", ["results.py", "H100"])
    for use in (
        lambda: results.append([results.Row("op", "T=1", "pyprune", "us", 1, 1, 1)]),
        results.main,
        lambda: harness.Session(harness.options("", 1).parse_args(["--save"])),
    ):
        with pytest.raises(
            SystemExit, match=r"results\.csv has .*\(missing: benchmark, case, .*; unexpected: b\).* away"
        ):
            use()
    assert file.read_text() == "hardware,b\nH100,2\n"
    file.write_text(",".join(reversed(results.COLUMNS)) + "\n")
    with pytest.raises(SystemExit, match="in another order: commit, pyprune"):
        results.append([])


def test_rows_are_appended_below_one_header(results: Any, tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        results.append([results.Row("op", "T=1", "pyprune", "us", value, value, value)])
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["p50"] for row in rows] == ["1", "2"] and all(row["torch"] for row in rows)
    assert rows[0]["hardware"].startswith(results.processor())


def test_hardware_of_one_name_has_a_table_for_each_kind(
    results: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gain is a ratio on one machine; rows from before the generation was told are found too."""
    kinds = {"AMD EPYC": ("8", "2"), "AMD EPYC (family 25 model 17), avx512": ("9", "3"), "NVIDIA H100": ("1", "1")}
    with (tmp_path / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, results.COLUMNS)
        writer.writeheader()
        for kind, times in kinds.items():
            for provider, p50 in zip(("dense", "2:4"), times, strict=True):
                row = {"benchmark": "nm_linear", "case": "T=1", "unit": "us", "provider": provider, "p50": p50}
                writer.writerow({**dict.fromkeys(results.COLUMNS, ""), **row, "hardware": kind})
    monkeypatch.setattr(sys, "argv", ["results.py", "AMD EPYC"])
    results.main()
    old, new = capsys.readouterr().out.split("AMD EPYC (family 25 model 17), avx512\n")
    assert old.startswith("AMD EPYC\n") and "dense 8 (4.00x)" in old and "dense 9 (3.00x)" in new
    monkeypatch.setattr(sys, "argv", ["results.py", "family 25"])
    results.main()
    assert capsys.readouterr().out.startswith("| op |")


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_what_is_not_in_git_marks_the_commit(results: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kernels, package and benchmarks do, rows that are kept do not."""
    kept = ("csrc/a.cu", "pyprune/a.py", "benchmarks/a.py", "benchmarks/results.csv")
    for name in kept:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(results, "__file__", str(tmp_path / "benchmarks" / "results.py"))
    assert not results.environment()["commit"].endswith("+")
    for name in (*kept, "benchmarks/new.py"):
        (tmp_path / name).write_text("changed")
        assert results.environment()["commit"].endswith("+") is not name.endswith(".csv"), name
        git("stash", "--include-untracked")


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
