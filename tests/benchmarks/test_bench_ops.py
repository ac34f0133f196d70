"""bench_ops.py on toy weights: every family is checked and kept, and a wrong result is refused."""

from __future__ import annotations

import csv
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pyprune import ops, timing

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_micro_views_commands_are_taken(tmp_path: Path) -> None:
    """Those of its docstring, on a file that has one of its names and no benchmark, which takes long to collect."""
    (tmp_path / "test_one.py").write_text(
        "import pytest\n@pytest.mark.parametrize('x', [0], ids=['nm_linear 576x1536 T=1 bfloat16 2:4'])\n"
        "def test_op(x): ...\n"
    )
    commands = re.findall(r"^    pytest benchmarks/ (.*?)(?:   .*)?$", (BENCHMARKS / "test_ops.py").read_text(), re.M)
    assert len(commands) == 3
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # not one of many
    for command in commands:
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "test_one.py", *shlex.split(command), "--collect-only"],
            cwd=tmp_path,
            env=alone,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0 and "test_op[nm_linear 576x1536" in run.stdout, run.stderr


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], list[dict[str, str]]]:
    """Runs the script on small weights, with rates of this machine that need no measurement; returns what it kept."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("bench_ops")
    monkeypatch.setattr(importlib.import_module("results"), "RESULTS", tmp_path / "results.csv")
    monkeypatch.setattr(module, "SHAPES", {"attention": (64, 64), "down": (64, 128), "gate and up": (128, 64)})
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # takes minutes
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
    kept = bench("--families packing ranks scores optimizer linears selected solve")
    floors = {(row["benchmark"], row["case"]): float(row["p50"]) for row in kept if row["provider"] == "floor"}
    assert {(row["benchmark"], row["case"]) for row in kept} == set(floors)
    # these names are those of the rows of other days and machines
    listed = {
        ("nm_prune", "64x128 bfloat16"),
        ("rank_mask", "64x128 float32"),
        ("lora_group_score", "64x64 r=8 dim=1 bfloat16"),
        ("nm_adamw_", "64x128 bfloat16"),
        ("nm_linear", "gate and up 128x64 T=3 bfloat16"),
        ("bitmap_linear", "attention 64x64 T=1 bfloat16 70%"),
        ("masked_linear", "down 64x128 T=1 bfloat16 50%"),
        ("gathered_linear", "down 64x128 T=1 bfloat16 75%"),
        ("sparsegpt_solve", "64x64 2:4 float32"),
    }
    assert listed <= set(floors)
    # by hand: a 64 x 128 bf16 weight read, values and 2:4 metadata written, 1e10 bytes a second
    assert floors["nm_compress", "64x128 bfloat16"] == pytest.approx(
        1e6 * (64 * 128 * 2 * 1.5 + 64 * 128 / 8) / 1e10, rel=1e-3
    )


def test_shapes_and_dtypes_can_be_chosen(bench: Any) -> None:
    kept = bench("--families linears --shapes down --dtypes float32")
    assert {row["case"].removesuffix(" 50%").removesuffix(" 70%") for row in kept} == {
        "down 64x128 T=1 float32",
        "down 64x128 T=3 float32",
    }


def test_rivals_are_there_or_say_why(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    kept = bench("--families linears selected optimizer")
    found = {op: {row["provider"] for row in kept if row["benchmark"] == op} for op in {r["benchmark"] for r in kept}}
    shown = capsys.readouterr().out
    skipped = {line.partition(" skipped: ")[0].strip() for line in shown.splitlines() if " skipped: " in line}
    assert {"dense", "torch CSR", "bitmap"} <= found["bitmap_linear"]
    assert found["masked_linear"] == {"masked in torch", "compile", "dense", "pyprune", "floor"}
    assert found["gathered_linear"] == {"dense", "sliced copy", "pyprune", "floor"}
    assert found["nm_adamw_"] == {"plain torch", "compile", "pyprune", "fused AdamW", "floor"}
    assert {"torch 2:4 CUTLASS", "torch 2:4 cuSPARSELt"} <= skipped | found["nm_linear"]
    assert {"dense fp32", "oneDNN", "bitsandbytes 4-bit"} <= skipped | found["nm_linear"]


def test_a_provider_that_crashes_is_named_and_the_rest_goes_on(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module("bench_ops")

    def unable(case: Any) -> Any:
        raise OSError("no such library\nand more")

    def crash(*data: Any) -> Any:
        raise RuntimeError("it was fine on my machine")

    rivals = {**module.RIVALS["rank_mask"], "unable": unable, "crash": lambda case: timing.Contender(crash)}
    monkeypatch.setitem(module.RIVALS, "rank_mask", rivals)
    kept = bench("--families ranks --without compile")
    shown = capsys.readouterr().out
    assert "unable             skipped: it fails with OSError: no such library\n" in shown
    assert "crash              skipped: it fails with RuntimeError: it was fine on my machine\n" in shown
    assert {row["provider"] for row in kept if row["benchmark"] == "rank_mask"} == {"torch", "pyprune", "floor"}
    assert "rank_bucket_grad" in {row["benchmark"] for row in kept}


@pytest.mark.parametrize("who", ["2:4", "dense"])
def test_a_wrong_result_is_refused(bench: Any, monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    module, right = importlib.import_module("bench_ops"), ops.nm_linear
    if who == "2:4":
        monkeypatch.setattr(ops, "nm_linear", lambda *tensors: torch.mul(right(*tensors), 1.1))
    else:
        rival = {"dense": lambda case: timing.Contender(lambda: 1.1 * case.eager(*case.eager_data))}
        monkeypatch.setitem(module.RIVALS, "nm_linear", rival)
    with pytest.raises(SystemExit, match=rf"nm_linear, .*: {who} is off by"):
        bench("--families linears")


def test_quantized_weights_may_be_off_by_what_four_bits_lose(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("bench_ops")

    def rounded(by: float) -> Any:
        return lambda case: timing.Contender(lambda: (1 + by) * case.eager(*case.eager_data))

    monkeypatch.setitem(module.RIVALS, "nm_linear", {"bitsandbytes 4-bit": rounded(0.1)})
    assert "bitsandbytes 4-bit" in {row["provider"] for row in bench("--families linears")}
    monkeypatch.setitem(module.RIVALS, "nm_linear", {"bitsandbytes 4-bit": rounded(0.3)})
    with pytest.raises(SystemExit, match="bitsandbytes 4-bit is off by 3"):
        bench("--families linears")
