"""`pyprune prune` and `pyprune compare`: what they leave, that they resume, and what they refuse."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pyprune import blockwise, cli, data, oneshot
from pyprune.data import Document
from pyprune.methods.magnitude import Magnitude
from pyprune.methods.sparsegpt import SparseGPT
from pyprune.methods.wanda import Wanda

QUICK = "--calibration-windows 6 --calibration-window 32 --eval-window 64 --eval-tokens 640 --dtype float32"


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory, prose: str) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(prose)
    return path


def prune(model: Path, out: Path, *more: str) -> list[str]:
    return ["prune", str(model), "--out", str(out), *QUICK.split(), *more]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that exits with 2."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and "Traceback" not in streams.err
    return next(line for line in streams.err.splitlines() if line.startswith("pyprune "))


def linears(model: Any) -> list[torch.Tensor]:
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return [value for name, value in model.state_dict().items() if name.split(".")[-2] in names]


def test_prune_leaves_a_stock_checkpoint_a_packed_one_and_what_it_counted(
    tmp_path: Path, tiny_llama: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = prune(tiny_llama, tmp_path, "--method", "sparsegpt", "--sparsity", "0.7", "--calibration", str(text))
    command += ["--reconstruct"]
    assert cli.main([*command, "--eval-data", str(text), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    zeros = sum(int((weight == 0).sum()) for weight in linears(dense))
    assert summary["zeros"] == zeros == round(0.7 * sum(weight.numel() for weight in linears(dense)))
    assert "SparseLinear" in {type(module).__name__ for module in packed.modules()}
    ids = torch.randint(200, (1, 16))
    assert torch.allclose(packed(ids).logits, dense(ids).logits, atol=1e-5)
    assert all(block["figures"]["after_mlp"] < block["figures"]["before_mlp"] for block in summary["blocks"])
    assert summary["ppl_pruned"] > 1 and summary["evaluation"] == {"tokens": 639, "window": 64, "stride": 64}
    assert summary["calibration"] == {"windows": 6, "tokens": 6 * 32}
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert not (tmp_path / "blocks").exists()


def test_an_interrupted_run_goes_on_behind_its_last_block(
    tmp_path: Path, tiny_llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--method", "wanda", "--calibration", str(text))
    assert cli.main(prune(tiny_llama, tmp_path / "whole", *arguments)) == 0
    solve, solved = blockwise._solve, []

    def interrupted(walk: Any, block: Any, *rest: Any) -> Any:
        solved.append(block.index)
        if solved == [0, 1]:
            raise KeyboardInterrupt
        return solve(walk, block, *rest)

    monkeypatch.setattr(blockwise, "_solve", interrupted)
    assert cli.main(prune(tiny_llama, tmp_path / "cut", *arguments)) == 130
    assert "continue a run with --resume" in capsys.readouterr().err
    assert "is not empty; continue it with --resume" in refused(
        capsys, *prune(tiny_llama, tmp_path / "cut", *arguments)
    )
    assert cli.main(prune(tiny_llama, tmp_path / "cut", *arguments, "--resume")) == 0
    assert solved == [0, 1, 1]
    whole, cut = (load_file(tmp_path / name / "dense" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(cut[name], value) for name, value in whole.items())


def test_compare_writes_one_table_and_one_picture(
    tmp_path: Path, tiny_llama: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    command = ["compare", str(tiny_llama), "--methods", "magnitude,wanda", "--pattern", "2:4", *QUICK.split()]
    command += ["--calibration", str(text), "--eval-data", str(text), "--out", str(tmp_path)]
    assert cli.main([*command, "--prompt-tokens", "4", "--new-tokens", "2", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in summary["methods"]] == ["magnitude", "wanda"]
    assert all(row["sparsity"] == 0.5 and row["tokens_per_second"] > 0 for row in summary["methods"])
    assert summary["methods"][0]["bytes"] == (tmp_path / "magnitude/packed/model.safetensors").stat().st_size
    assert summary["dense"]["bytes"] == (tmp_path / "wanda/dense/model.safetensors").stat().st_size
    assert (tmp_path / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    table = cli.compare.show(summary) or capsys.readouterr().out
    assert "magnitude" in table and "639 held-out tokens" in table
    speeds = [row["tokens_per_second"] / row["decode_speedup"] for row in summary["methods"]]
    assert f"{statistics.median(speeds):,.1f}" in next(line for line in table.splitlines() if "dense" in line)


def test_methods_that_are_compared_share_one_encoded_text(
    tiny_llama: Path, tokenizer: Any, prose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {name: [Document(f"{name} {prose}")] for name in ("calibration", "held out")}
    encoded: list[str] = []
    right = data.encode

    def encode(documents: Any, tokenizer: Any) -> Any:
        encoded.append(documents[0].text.removesuffix(f" {prose}"))
        return right(documents, tokenizer)

    for module in (oneshot, data):
        monkeypatch.setattr(module, "encode", encode)
    recipe = oneshot.Recipe(calibration_windows=6, calibration_window=32, eval_window=64, eval_tokens=640)
    first = oneshot.Pruning(tiny_llama, Magnitude(), *texts.values(), recipe)
    assert encoded == ["held out"] and first.calibration == ()  # which looks at no text
    wanda, sparsegpt = first.another(Wanda()), first.another(SparseGPT(pattern="2:4"))
    assert encoded == ["held out", "calibration"]
    assert wanda.calibration is sparsegpt.calibration and wanda.held_out is first.held_out is sparsegpt.held_out
    expected = right(texts["calibration"], tokenizer).windows(32).ids
    assert {tuple(row) for row in torch.cat(wanda.calibration).tolist()} <= {tuple(row) for row in expected.tolist()}
    assert torch.equal(first.held_out.ids, right(texts["held out"], tokenizer).ids[:640])
    assert (type(first.method), type(wanda.method), type(sparsegpt.method)) == (Magnitude, Wanda, SparseGPT)
    with pytest.raises(ValueError, match="has 32 inputs, which groups of 5 do not"):
        first.another(Magnitude(pattern="2:5"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "wanda"], "Wanda looks at activations; give text to calibrate on: --calibration FILE"),
        (["--calibration", "none.txt"], "none.txt cannot be read"),
        (["--sparsity", "0", "--method", "magnitude"], "sparsity is 0.0; expected a number between 0 and 1"),
        (["--sparsity", "1", "--method", "magnitude"], "sparsity is 1.0; expected a number between 0 and 1"),
        (["--pattern", "3:5", "--method", "magnitude", "--sparsity", "0.4"], "has 32 inputs, which groups of 5 do not"),
        (["--method", "magnitude", "--reconstruct"], "--reconstruct: magnitude shows a block no text"),
        (["--calibration-windows", "0"], "calibration_windows is 0; expected at least 1"),
        (["--new-tokens", "0"], "new_tokens is 0; expected at least 1"),
        (["--eval-tokens", "63"], "eval_tokens is 63, fewer than one eval_window of 64; give more tokens"),
        (
            ["--method", "magnitude", "--eval-data", "TEXT", "--eval-window", "16384", "--eval-tokens", "99999"],
            "tokens, fewer than one eval_window of 16384; give more of it",
        ),
        (
            ["--calibration", "TEXT", "--calibration-windows", "999"],
            "fewer than calibration_windows=999; give more text",
        ),
        (["--calibration", "TEXT", "--calibration-window", "4000"], "windows of 4000 tokens, more than the 2048"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, tiny_llama: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(text) if argument == "TEXT" else argument for argument in arguments]
    if "4000" in given:
        given += ["--calibration-windows", "1"]
    assert message in refused(capsys, *prune(tiny_llama, tmp_path / "out", *given))


def test_compare_refuses_unknown_methods_and_no_text(
    tmp_path: Path, tiny_llama: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", str(tiny_llama), "--out", str(tmp_path / "out")]
    assert "'pat' is unknown; expected some of magnitude" in refused(capsys, *command, "--methods", "wanda,pat")
    assert "give held-out text with --eval-data FILE" in refused(capsys, *command)
