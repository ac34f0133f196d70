"""Exported folders are stock checkpoints that a process without pyprune loads; failures lose nothing."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_decoders import FAMILY_NAMES, KEEP, logits, masked, relative_error, tiny, token_ids

from pyprune.architectures import describe
from pyprune.basis import rotate
from pyprune.surgery import export, merge_hsm, slice_hidden

RELOAD = """
import sys
sys.modules["pyprune"] = None  # importing it now fails
try:
    import pyprune
except ImportError:
    pass
else:
    raise SystemExit("pyprune is importable")
import pathlib, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
root = pathlib.Path(sys.argv[1])
ids = torch.tensor(eval(sys.argv[2]))
answers = {}
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), (folder.name, info)
    with torch.no_grad():
        answers[folder.name] = model(ids).logits.float().contiguous()
save_file(answers, root / "logits.safetensors")
"""

KINDS = ("untied", "tied", "tied_hsm", "tied_rotated", "tied_bf16")
CASES = [f"{family}-{kind}" for family in FAMILY_NAMES for kind in KINDS]


def build(case: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A sliced model, and the logits of the masked model that it was cut from (in bf16: its own, see test_slice)."""
    family, kind = case.split("-")
    model = tiny(family, kind != "untied", torch.bfloat16 if kind == "tied_bf16" else torch.float32)
    if kind == "tied_rotated":
        rotate(model, torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q)
    if kind == "tied_hsm":
        matrix = torch.eye(24) + 0.2 * torch.randn(24, 24, dtype=torch.float64)
        merge_hsm(describe(model), {"embedding": matrix, "block1_mlp": matrix.T})
    with masked(model):
        expected = logits(model)
    slice_hidden(model, KEEP)
    return model, logits(model) if kind == "tied_bf16" else expected


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, torch.Tensor, dict]]:
    """For each case: logits after a reload in a process without pyprune, those of the masked model, and config.json."""
    root = tmp_path_factory.mktemp("exports")
    expected = {}
    for case in CASES:
        model, expected[case] = build(case)
        export(model, None, root / case)
    command = [sys.executable, "-c", RELOAD, str(root), str(token_ids().tolist())]
    subprocess.run(command, check=True, cwd=root, capture_output=True, text=True)
    found = load_file(root / "logits.safetensors")
    configs = {case: json.loads((root / case / "config.json").read_text()) for case in CASES}
    return {case: (found[case].double(), expected[case], configs[case]) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_reloaded_logits_equal_the_masked_models(
    case: str, reloaded: dict[str, tuple[torch.Tensor, torch.Tensor, dict]]
) -> None:
    found, expected, config = reloaded[case]
    # In bf16 the same weights in another process: a last bit (2^-8) may differ with the number of threads.
    assert relative_error(found, expected) < (2**-7 if case.endswith("bf16") else 1e-4)
    assert config["tie_word_embeddings"] is (case.split("-")[1] in ("tied", "tied_bf16"))
    assert config["hidden_size"] == len(KEEP)
    assert config["dtype"] == ("bfloat16" if case.endswith("bf16") else "float32")
    assert not any("quant" in key for key in config)


def test_folder_holds_safetensors_and_no_leftovers(tmp_path: Path) -> None:
    model = slice_hidden(tiny("llama", tied=True), KEEP)
    model.hf_quantizer = object()
    model.config.quantization_config = {"quant_method": "gguf"}
    model.config._is_quantized = True
    (tmp_path / "model").mkdir()
    export(model, None, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "config.json",
        "generation_config.json",
        "model",
        "model.safetensors",
    ]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert not any("quant" in key for key in config)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")


class FailingTokenizer:
    """Writes half a file, then fails."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{")
        raise self.error


FULL = "No space left on device"
ERRORS = {"oserror": OSError(errno.ENOSPC, FULL), "safetensors": SafetensorError(f"I/O error: {FULL} (os error 28)")}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())
def test_full_disk_leaves_no_folder_and_the_model_as_it_was(tmp_path: Path, error: Exception) -> None:
    model = slice_hidden(tiny("llama"), KEEP)
    expected = logits(model)
    with pytest.raises(OSError, match=r"disk filled while writing .*small; nothing was left there") as raised:
        export(model, FailingTokenizer(error), tmp_path / "small")
    assert raised.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(logits(model), expected)
    export(model, None, tmp_path / "small")
    assert (tmp_path / "small" / "config.json").exists()


def test_interrupt_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        export(tiny("llama"), FailingTokenizer(KeyboardInterrupt()), tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_not_empty_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
            export(tiny("llama"), None, folder)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
