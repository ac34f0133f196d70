"""`pyprune bench`: what is measured where, what it prints and refuses."""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pyprune import info, speed, timing
from pyprune.cli import main

COPY_BANDWIDTH = timing.copy_bandwidth


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny shapes and a machine of round numbers; a GPU, if there is one, is left alone."""
    monkeypatch.setattr(speed, "SIZES", {"SmolLM2-135M": (64, 96), "larger": (96, 128)})
    monkeypatch.setattr(timing, "copies_for", lambda nbytes, device: 2)
    monkeypatch.setattr(timing, "load", lambda: 0.0)
    monkeypatch.setattr(timing, "_turns", [0])
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 2e12)
    monkeypatch.setattr(timing, "matmul_rate", lambda device, dtype: 3e14)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_ops_by_name_with_limits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["copy_bandwidth"], found["matmul_rates"]) == (2e12, {"bfloat16": 3e14, "float32": 3e14})
    assert {row["model"] for row in found["ops"]} == {"SmolLM2-135M"} and found["versions"]["torch"]
    (row,) = [row for row in found["ops"] if row["op"] == "nm_prune"]
    assert row["floor"] == pytest.approx(64 * 96 * (2 + 2 / 8) / 2e12) and row["label"] == "64x96 bfloat16"
    assert (row["bytes"], row["operations"], row["dtype"]) == (64 * 96 * 9 // 4, 0, "bfloat16")
    assert 0 < row["eager_p20"] <= row["eager"] <= row["eager_p80"]
    (row,) = [row for row in found["ops"] if row["op"] == "nm_linear" and " T=64 " in row["label"]]
    assert row["operations"] == 64 * 64 * 96  # half of the weights
    assert found["load"] == 0 and found["commit"] == info.commit()
    assert abs(datetime.now(timezone.utc) - datetime.fromisoformat(found["date"] + "T12:00+00:00")).days <= 1
    assert main(["bench", "--quick"]) == 0
    shown = capsys.readouterr().out
    assert "nm_prune 64x96 bfloat16" in shown and "copies 2,000.0 GB/s" in " ".join(shown.split())
    assert "300,000 GFLOP/s bfloat16" in " ".join(shown.split()) and "launch" not in shown


def test_the_commit_is_that_of_the_checkout_the_package_lies_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(info, "__file__", str(tmp_path / "site-packages" / "pyprune" / "info.py"))
    assert info.commit() is None


def test_others_at_work_are_told_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    assert [timing.busy(cores - 1), timing.busy(cores), timing.busy(cores + 1)] == [False, False, True]
    monkeypatch.setattr(timing, "load", lambda: cores + 3.25)
    assert timing.busy(1)
    assert main(["bench", "--quick", "--json"]) == 0
    shown = capsys.readouterr()
    assert f"load {cores + 3.2:.1f} beside {threads} threads: others are at work here" in " ".join(shown.err.split())
    assert json.loads(shown.out)["load"] == cores + 3.25


def test_limits_are_the_fastest_of_before_and_after(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy beside others' work, then one of the idle machine."""
    rates = [2e3, 1e12]
    monkeypatch.setattr(timing, "copy_bandwidth", COPY_BANDWIDTH)
    monkeypatch.setattr(timing, "_copy_bandwidth", lambda device, threads, turn: rates[turn])
    assert main(["bench", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["copy_bandwidth"] == 1e12
    assert all(row["floor"] <= row["bytes"] / 1e12 + row["operations"] / 3e14 for row in found["ops"])


def test_more_than_a_limit_allows_is_doubtful(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [timing.share(least, 1.0) for least in (0.5, 1.09, 1.11)] == ["50%", "109%", "doubtful 111%"]
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1e15)
    monkeypatch.setattr(timing, "matmul_rate", lambda device, dtype: 1e18)
    assert main(["bench", "--quick"]) == 0
    assert "doubtful" not in capsys.readouterr().out
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1e3)
    assert main(["bench", "--quick"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("doubtful") > 2 and "doubtful: faster than a limit" in shown


def test_two_models_in_turn(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)
    cut = tmp_path / "cut"
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.config.layer_types = None
    model.save_pretrained(cut)
    latency = {
        "model": speed.evaluation.Latency(0.25, 0.01, [0.2, 0.25, 0.3, 0.35, 0.2], [0.01] * 5),
        "against": speed.evaluation.Latency(0.5, 0.03, [0.5], [0.03]),
    }
    monkeypatch.setattr(speed.evaluation, "latency", lambda models, *load, **more: {n: latency[n] for n in models})
    monkeypatch.setattr(speed, "memory", lambda path, *rest: speed.Memory(10**6, 10**7 if path == str(cut) else None))
    command = ["bench", str(cut), "--against", str(tiny_llama), "--batches", "1,4", "--new-tokens", "2"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["batches"], found["new_tokens"], found["prompt_tokens"]) == ([1, 4], 2, 128)
    first, second = found["models"]["model"], found["models"]["against"]
    assert (first["path"], first["peak_bytes"], second["peak_bytes"]) == (str(cut), 10**7, None)
    assert [one["tokens_per_second"] for one in first["speed"]] == pytest.approx([100, 400])
    assert first["speed"][0]["first_token_p20"] == pytest.approx(0.2)
    assert first["speed"][0]["first_token_p80"] == pytest.approx(0.31)  # a fifth of the way from 0.3 to 0.35
    assert first["speed"][0]["token_p20"] == first["speed"][0]["token_p80"] == 0.01
    ratio = second["speed"][0]["token_floor"] / first["speed"][0]["token_floor"]
    block, head = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32, 32 * model.config.vocab_size
    assert ratio == pytest.approx((2 * block + head) / (block + head))  # bytes: there are few operations at batch 1
    assert main(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for figure in ("250.0 (2.00x)", "400.0 (3.00x)", "500.0", "133.3", "1 MB of weights, 10 MB at the peak"):
        assert figure in shown


def test_the_peak_is_that_of_a_process_of_its_own(tiny_llama: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)
    found = speed.memory(str(tiny_llama), speed.Load((1,), 4, 2, 1))
    assert found.weights == model.get_memory_footprint()
    assert found.peak is None or found.peak > found.weights


def test_bad_input_is_one_line(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny_llama)
    assert "there is no MODEL to measure against it" in refused(capsys, "bench", "--against", model)
    assert "torch sees no CUDA device" in refused(capsys, "bench", "--device", "cuda")
    assert "--device is for the ops" in refused(capsys, "bench", model, "--device", "cpu")
    assert "--batches 1,two: expected numbers" in refused(capsys, "bench", model, "--batches", "1,two")
    assert "batches is 0; expected at least 1" in refused(capsys, "bench", model, "--batches", "0")
    assert "does not exist" in refused(capsys, "bench", model, "--against", str(tmp_path / "nowhere"))
