"""`pyprune tune --method ast`: what it writes, that it resumes, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from pyprune.cli import main
from pyprune.modules import SparseLinear
from pyprune.training import read_metrics

QUICK = (
    "--method ast --baselines none --steps 6 --window 32 --batch-size 2 --save-every 2 --refresh 2 --eval-window 64 "
    "--prompt-tokens 8 --new-tokens 2 --repeats 1 --learning-rate 0.01 --warmup 0"
)


def test_a_run_writes_dense_and_packed(
    tmp_path: Path, tiny_llama: Path, prose: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "prose.txt", tmp_path / "run"
    text.write_text(prose)
    arguments = ["tune", str(tiny_llama), "--data", str(text), "--out", str(out), "--json", *QUICK.split()]
    assert main(arguments) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["sparsity"] == pytest.approx(0.5, abs=1e-3) and summary["bytes_packed"] < summary["bytes_dense"]
    assert summary["block_params_pruned"] < 0.6 * summary["block_params_dense"]
    dense, packed = (AutoModelForCausalLM.from_pretrained(out / name).eval() for name in ("dense", "packed"))
    up = dense.model.layers[0].mlp.up_proj
    assert type(up) is nn.Linear and bool(((up.weight != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all())
    assert type(packed.model.layers[0].mlp.up_proj) is SparseLinear
    ids = torch.arange(20)[None]
    with torch.no_grad():  # the same products, summed in another order
        torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    assert main([*arguments, "--resume"]) == 0  # everything is done
    assert json.loads(capsys.readouterr().out)["ppl_pruned"] == summary["ppl_pruned"]
    assert main([*arguments, "--resume", "--pattern", "1:4"]) == 2
    assert "pattern was '2:4' and is now '1:4'" in " ".join(capsys.readouterr().err.split())


def test_a_pattern_that_does_not_fit_is_refused_before_anything_is_read(
    tmp_path: Path, tiny_llama: Path, prose: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prose.txt").write_text(prose)
    arguments = ["tune", str(tiny_llama), "--data", str(tmp_path / "prose.txt"), "--out", str(tmp_path / "run")]
    assert main([*arguments, *QUICK.split(), "--pattern", "2:5"]) == 2
    assert "the pattern 2:5 needs the inputs to be a multiple of 5" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_a_gradual_mask_that_would_never_be_final_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_llama: Path, prose: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prose.txt").write_text(prose)
    arguments = ["tune", str(tiny_llama), "--data", str(tmp_path / "prose.txt"), "--out", str(tmp_path / "run")]
    assert main([*arguments, *QUICK.split(), "--mask", "gradual", "--refresh", "6"]) == 2
    assert "mask is 'gradual' with refresh 6 and milestone 0.25: in steps=6" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (tmp_path / "run").exists()


def test_each_method_has_a_learning_rate_of_its_own(
    tmp_path: Path, tiny_llama: Path, prose: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The peak, without warm-up, is that of the first step."""
    text = tmp_path / "prose.txt"
    text.write_text(prose)
    quick = QUICK.replace("--learning-rate 0.01 ", "").replace("--baselines none", "--baselines lora")
    common = ["tune", str(tiny_llama), "--data", str(text), *quick.split(), "--steps", "2", "--refresh", "1"]
    for options, peaks in (
        ([], {"lora": 1e-3, "ast": 1e-4}),
        (["--learning-rate", "0.02"], {"lora": 0.02, "ast": 0.02}),
    ):
        out = tmp_path / f"run{len(options)}"
        assert main([*common, "--out", str(out), *options]) == 0
        first = {
            line["stage"]: line["learning_rate"] for line in read_metrics(out / "metrics.jsonl") if line["step"] == 1
        }
        assert first == pytest.approx(peaks)


def test_families_with_layer_norm(
    tmp_path: Path, prose: str, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the paper's models: Conv1D, positions that are learnt. LoRA, the default baseline, is not for them."""
    text, gpt2 = tmp_path / "prose.txt", tmp_path / "gpt2"
    text.write_text(prose)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128)
    GPT2LMHeadModel(config).save_pretrained(gpt2)
    tokenizer.save_pretrained(gpt2)
    arguments = ["tune", str(gpt2), "--data", str(text), "--out", str(tmp_path / "run"), "--json", *QUICK.split()]
    assert main([*arguments, "--baselines", "lora"]) == 2
    assert "LayerNorm" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert main(arguments) == 0
    summary = json.loads(capsys.readouterr().out)
    blocks = sum(p.numel() for p in GPT2LMHeadModel(config).transformer.h.parameters()) + 2 * 32  # and the last norm
    assert summary["block_params_dense"] == blocks and summary["hidden_size_pruned"] == 32 and summary["tied"]
    assert summary["sparsity"] == 0.5 and summary["decode_speedup"] > 0
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "dense")
    weight = dense.transformer.h[1].mlp.c_fc.weight.T  # [out, in]
    assert bool(((weight != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all())
