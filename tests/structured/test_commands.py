"""`pyprune plan`, `pyprune prune` by whole groups, and `pyprune tune --method loraprune`, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from pyprune.architectures import describe
from pyprune.cli import main
from pyprune.models import open_model
from pyprune.surgery import parameter_counts


@pytest.fixture
def text(tmp_path: Path, prose: str) -> str:
    path = tmp_path / "text.txt"
    path.write_text(prose, encoding="utf-8")
    return str(path)


def answer(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> dict[str, Any]:
    assert main([*argv, "--json"] if code == 0 else argv) == code
    out, err = capsys.readouterr()
    return json.loads(out) if code == 0 else {"error": err}


def test_plan_prints_saves_and_applies(
    tiny_llama: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, small = tmp_path / "plan.json", tmp_path / "small"
    common, reads = ("plan", str(tiny_llama)), ("--calibration", text)
    found = answer(
        capsys,
        *common,
        "--target",
        "params=0.8",
        "--round-to",
        "4",
        "--calibration",
        text,
        "--calibration-window",
        "64",
        "--save",
        str(saved),
    )
    assert found["params"][1] <= 0.8 * found["params"][0] and "-> " in found["table"]
    assert parameter_counts(open_model(tiny_llama))["total"] == found["params"][0]  # nothing was cut
    assert answer(capsys, *common, "--apply", str(saved), "--out", str(small))["out"] == str(small)
    model = AutoModelForCausalLM.from_pretrained(small)
    assert parameter_counts(model)["total"] == found["params"][1]
    assert main(["plan", str(tiny_llama), "--target", "layers=1", "--axes", "layers", "--calibration", text]) == 0
    assert "gone" in capsys.readouterr().out
    for wrong, message in (
        (("--target", "params=0.8", "--out", str(small)), "belong together"),
        (("--apply", str(saved), "--out", str(small)), "not an empty folder"),
        (("--target", "params=1", "--criterion", "magnitude"), "nothing would go"),
        (("--target", "params=0.8", "--criterion", "taylor"), "--criterion taylor reads text: give --calibration"),
        (("--target", "params=0.8", "--calibration-windows", "0", *reads), "--calibration-windows is 0; expected at"),
        (("--target", "params=0.8", "--calibration-window", "99999", *reads), "fewer than one window of 99999"),
        (("--target", "params=0.8", "--skip", "first"), "--skip first: expected numbers"),
        (("--apply", text, "--out", str(tmp_path / "other")), "not a plan that pyprune wrote"),
    ):
        assert message in answer(capsys, *common, *wrong, code=2)["error"]


@pytest.mark.parametrize("method", ["slimgpt", "llm-pruner", "slicegpt"])
def test_prune_by_whole_groups(
    method: str, tiny_llama: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = (
        "prune",
        str(tiny_llama),
        "--method",
        method,
        "--target",
        "params=0.8",
        "--round-to",
        "4",
        "--calibration",
        text,
        "--eval-data",
        text,
        "--calibration-window",
        "64",
        "--calibration-windows",
        "8",
        "--eval-window",
        "64",
        "--out",
        str(out),
    )
    without = [word for i, word in enumerate(command) if "--calibration" not in (word, command[i - 1])]
    assert f"--method {method} reads text" in answer(capsys, *without, code=2)["error"]
    long = tuple("9999999" if word == "64" else word for word in command)
    assert "fewer than one window of 9999999" in answer(capsys, *long, code=2)["error"]
    assert not out.exists()
    found = answer(capsys, *command)
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert parameter_counts(model)["total"] == found["params_pruned"] <= 0.8 * found["params_dense"]
    assert found["ppl_pruned"] != found["ppl_dense"]
    assert answer(capsys, *command, "--resume") == found
    assert "is not empty" in answer(capsys, *command, code=2)["error"]
    other = tuple("params=0.7" if word == "params=0.8" else word for word in command)
    assert "target was 'params=0.8' and is now 'params=0.7'" in answer(capsys, *other, "--resume", code=2)["error"]


@pytest.mark.parametrize(
    ("wrong", "held_out", "message"),
    [
        (("--eval-window", "0"), None, "--eval-window is 0; expected at least 2"),
        (("--eval-window", "64"), " \n", "is empty: it holds no text"),
        (("--eval-window", "64"), "a short text", "the held-out text has 13 tokens, fewer than one eval_window of 64"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_cut(
    wrong: tuple[str, ...],
    held_out: str | None,
    message: str,
    tiny_llama: Path,
    tmp_path: Path,
    text: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, file = tmp_path / "run", tmp_path / "held_out.txt"
    if held_out is not None:
        file.write_text(held_out, encoding="utf-8")
        wrong += ("--eval-data", str(file))
    command = ("prune", str(tiny_llama), "--method", "slicegpt", "--target", "params=0.8", "--round-to", "4")
    command += ("--calibration", text, "--calibration-window", "64", "--calibration-windows", "2", "--out", str(out))
    assert message in answer(capsys, *command, *wrong, code=2)["error"]
    assert not out.exists()


def test_tune_by_loraprune(tiny_llama: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    found = answer(
        capsys,
        "tune",
        str(tiny_llama),
        "--method",
        "loraprune",
        "--target",
        "heads=1,channels=32",
        "--data",
        text,
        "--out",
        str(out),
        "--baselines",
        "none",
        "--steps",
        "6",
        "--batch-size",
        "2",
        "--window",
        "32",
        "--warmup",
        "1",
        "--mask-every",
        "2",
        "--eval-window",
        "64",
        "--prompt-tokens",
        "8",
        "--new-tokens",
        "2",
        "--repeats",
        "1",
    )
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert [group.count for group in describe(model).groups()] == [1, 32, 1, 32]
    assert found["params_pruned"] == parameter_counts(model)["total"]
    assert found["widths_pruned"] == {"heads": 1, "channels": 32, "hidden": 32, "layers": 2}
    assert found["target"] == "heads=1,channels=32" and 0 < found["params_removed"] < 1
