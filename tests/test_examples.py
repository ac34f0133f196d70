"""The examples run as their first lines say and leave a smaller stock checkpoint."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def model(tmp_path: Path, tokenizer: Any) -> Path:
    """A Llama wide enough for the default multiple of 64 channels."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def run(example: str, *arguments: Any, monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    monkeypatch.setattr(sys, "argv", [example, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / example), run_name="__main__")
    return AutoModelForCausalLM.from_pretrained(arguments[2] / "model")


def check(small: LlamaForCausalLM) -> None:
    assert type(small) is LlamaForCausalLM and small.config.hidden_size == 192


def test_tune_with_trainer(tmp_path: Path, model: Path, prose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text(prose)
    check(run("tune_with_trainer.py", model, tmp_path / "text.txt", tmp_path / "out", 3, monkeypatch=monkeypatch))


def test_tune_with_sft_trainer(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    turns = [
        {"role": "user", "content": "Where is the mill?"},
        {"role": "assistant", "content": "the river runs past an old stone mill"},
    ]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 16)
    check(
        run("tune_with_sft_trainer.py", model, tmp_path / "chats.jsonl", tmp_path / "out", 3, monkeypatch=monkeypatch)
    )
