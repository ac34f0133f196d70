"""`pyprune generate` and `pyprune export`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pyprune.cli import main


@pytest.fixture(scope="session")
def zeros(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tokenizer: Any) -> Path:
    """The tiny model with the half of its linears' weights that is smallest set to zero."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.dim() == 2:
                parameter[parameter.abs() <= parameter.abs().median()] = 0
    folder = tmp_path_factory.mktemp("models") / "zeros"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def packed(zeros: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "packed"
    assert main(["export", str(zeros), "--out", str(folder)]) == 0
    return folder


def result(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    return line


def test_packed_and_dense_give_the_same_text(
    capsys: pytest.CaptureFixture[str], zeros: Path, packed: Path, tiny_llama: Path
) -> None:
    found = [result(capsys, "generate", str(m), "--prompt", "the river", "--tokens", "12") for m in (zeros, packed)]
    assert found[0]["text"] == found[1]["text"] and found[0]["tokens"] == found[1]["tokens"]
    assert found[0]["prompt_tokens"] == len("the river")
    assert found[1]["weight_bytes"] < found[0]["weight_bytes"]
    assert all(run["tokens"] == 1 or run["tokens_per_second"] > 0 for run in found)
    assert all(run["first_token_seconds"] > 0 and run["peak_bytes"] > run["weight_bytes"] for run in found)


def test_text_goes_to_stdout_and_figures_to_stderr(capsys: pytest.CaptureFixture[str], packed: Path) -> None:
    expected = result(capsys, "generate", str(packed), "--prompt", "the river", "--tokens", "12")
    assert main(["generate", str(packed), "--prompt", "the river", "--tokens", "12"]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == expected["text"].strip()
    last = err.strip().splitlines()[-1]
    tokens = f"prompt of {expected['prompt_tokens']} tokens, the first of {expected['tokens']} new ones after "
    assert last.startswith(tokens) and "MB, peak memory" in last


def test_sampling_follows_the_seed(capsys: pytest.CaptureFixture[str], packed: Path) -> None:
    run = ("generate", str(packed), "--prompt", "the", "--tokens", "16", "--temperature", "1.5")
    first, again, other = (result(capsys, *run, "--seed", seed)["text"] for seed in ("1", "1", "2"))
    assert first == again != other


def test_prompt_from_stdin_and_chat(
    capsys: pytest.CaptureFixture[str], packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the river"))
    assert result(capsys, "generate", str(packed), "--prompt", "-", "--tokens", "1")["prompt_tokens"] == 9
    chat = result(capsys, "generate", str(packed), "--prompt", "the river", "--chat", "--tokens", "1")
    assert chat["prompt_tokens"] == 9 + 3  # <|user|>, <|end|>, <|assistant|>


def test_export_reports_and_goes_back(
    capsys: pytest.CaptureFixture[str], zeros: Path, packed: Path, tmp_path: Path
) -> None:
    found = result(capsys, "export", str(zeros), "--out", str(tmp_path / "packed"))
    assert found["packed"] == found["linears"] == 14
    assert found["bytes"] < 0.7 * found["dense_bytes"]
    assert "14 of 14 linears packed" in found["report"]
    assert result(capsys, "export", str(packed), "--out", str(tmp_path / "dense"), "--dense")["format"] == "dense"
    dense, expected = load_file(tmp_path / "dense" / "model.safetensors"), load_file(zeros / "model.safetensors")
    assert dense.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name] + 0.0) for name, tensor in dense.items())
    assert (tmp_path / "dense" / "tokenizer.json").exists()


def test_export_says_when_nothing_is_packed(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path
) -> None:
    assert main(["export", str(tiny_llama), "--out", str(tmp_path / "packed")]) == 0
    shown = capsys.readouterr().out
    assert "0 of 14 linears packed" in shown and "nothing was packed, for there are too few zeros" in shown


def test_a_model_whose_logits_are_not_finite_is_named(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for more in ((), ("--temperature", "1")):
        message = refused(capsys, "generate", str(tmp_path), "--prompt", "a", *more)
        assert f"model {tmp_path}: its logits are not finite" in message


def test_bad_input_is_refused(capsys: pytest.CaptureFixture[str], packed: Path, tmp_path: Path) -> None:
    run = ("generate", str(packed), "--prompt")
    assert "--prompt is empty" in refused(capsys, *run, " ")
    assert "--tokens is 0; expected at least 1" in refused(capsys, *run, "a", "--tokens", "0")
    assert "--temperature is -1.0" in refused(capsys, *run, "a", "--temperature", "-1")
    assert "model folder /nowhere does not exist" in refused(capsys, "generate", "/nowhere", "--prompt", "a")
    assert "exists and is not an empty folder" in refused(capsys, "export", str(packed), "--out", str(packed))
    (tmp_path / "run" / "stages").mkdir(parents=True)
    given = ("generate", str(tmp_path / "run"), "--prompt", "a")
    assert "is the folder of a run; give its result, once there is one" in refused(capsys, *given)
    (tmp_path / "run" / "packed").mkdir()
    (tmp_path / "run" / "packed" / "config.json").write_text("{}")
    assert f"is the folder of a run; give {tmp_path}/run/packed" in refused(capsys, *given)
    (tmp_path / "config.json").write_text((packed / "config.json").read_text())
    content = (packed / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-100])
    for file in packed.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    message = refused(capsys, "generate", str(tmp_path), "--prompt", "a")
    assert "model.safetensors: tensor " in message and "lies at bytes" in message
