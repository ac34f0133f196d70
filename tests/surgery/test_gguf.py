"""An exported Llama through llama.cpp's own converter and its engine: the same logits as in transformers.

Needs a llama.cpp source folder and a Python with llama-cpp-python, which `tests/surgery/llama_cpp.sh DIR` builds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_decoders import COMMON, relative_error
from transformers import AutoModelForCausalLM, LlamaConfig

from pyprune.surgery import export, slice_hidden

SOURCE, PYTHON = os.environ.get("PYPRUNE_LLAMA_CPP"), os.environ.get("PYPRUNE_LLAMA_CPP_PYTHON")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SOURCE and PYTHON),
        reason="PYPRUNE_LLAMA_CPP and PYPRUNE_LLAMA_CPP_PYTHON are not set: build llama.cpp with "
        "tests/surgery/llama_cpp.sh DIR and set what it prints",
    ),
]

# KV cache in fp32 (type 0) and no flash attention, so that nothing rounds below fp32.
RUN = """
import json, sys
import llama_cpp, numpy
model = llama_cpp.Llama(sys.argv[1], n_ctx=64, n_batch=64, n_threads=1, logits_all=True, verbose=False,
                        type_k=0, type_v=0, flash_attn=False)
tokens = json.loads(sys.argv[2])
model.eval(tokens)
numpy.save(sys.argv[3], model.scores[: len(tokens)])
"""


class SentencePiece:
    """A tokenizer that the converter knows: a byte-level sentencepiece model trained on a few words."""

    def __init__(self, folder: Path) -> None:
        trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
        text = folder / "words.txt"
        text.write_text("prune while tuning and cut the channels that carry little\n" * 20)
        self.model = folder / "words.model"
        trainer.train(
            input=str(text), model_prefix=str(folder / "words"), vocab_size=300, byte_fallback=True,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(self.model.read_bytes())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_llama_cpp_computes_the_same_logits(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    fields = COMMON | {"vocab_size": 300, "hidden_size": 96, "num_attention_heads": 4, "rms_norm_eps": 0.05}
    config = LlamaConfig(**fields, tie_word_embeddings=tied)
    model = slice_hidden(AutoModelForCausalLM.from_config(config).eval(), range(8, 72))
    folder, gguf = export(model, SentencePiece(tmp_path), tmp_path / "model"), tmp_path / "model.gguf"

    converter = [sys.executable, f"{SOURCE}/convert_hf_to_gguf.py", str(folder), "--outfile", str(gguf)]
    subprocess.run([*converter, "--outtype", "f32"], check=True, capture_output=True)
    ids = torch.randint(3, 250, (1, 24))
    logits = tmp_path / "logits.npy"
    subprocess.run([str(PYTHON), "-c", RUN, str(gguf), json.dumps(ids[0].tolist()), str(logits)], check=True)

    numpy = pytest.importorskip("numpy")
    found = torch.from_numpy(numpy.load(logits)).double()
    with torch.no_grad():
        expected = model(ids).logits[0].double()
    assert relative_error(found, expected) < 1e-4
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
