"""LoRAPrune on bases that bitsandbytes has quantised: the same as on the numbers that their codes stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from surgery.tiny_decoders import token_ids
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from pyprune import LoRAPrune
from pyprune.data import TokenWindows
from pyprune.surgery import dense_weight, export
from pyprune.training import read_metrics, tune

bitsandbytes = pytest.importorskip("bitsandbytes")

BITS = {
    "4 bits": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "8 bits": {"load_in_8bit": True},
}
# the same sums, but bitsandbytes' are of transposed matrices; measured: below 1e-6, after sixteen steps of Adam
FP32 = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose matrices are whole blocks of 64 codes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("quantised") / "dense"
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=61, num_key_value_heads=2, initializer_range=0.2, **sizes)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(params=BITS)
def model(request: pytest.FixtureRequest, folder: Path) -> nn.Module:
    """That model, quantised."""
    options = BitsAndBytesConfig(**BITS[request.param])
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=options)


def numbers(linear: Any) -> Tensor:
    """What a linear's codes stand for, by bitsandbytes' own definition of them."""
    weight = linear.weight
    if weight.dtype == torch.uint8:
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    scales = weight.SCB if weight.SCB is not None else linear.state.SCB
    return weight.data.float() * scales[:, None] / 127


def plain(model: nn.Module, folder: Path) -> nn.Module:
    """The unquantised model of the same numbers."""
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, linear in found.named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            linear.weight = nn.Parameter(numbers(model.get_submodule(name)))
    return found


def windows() -> TokenWindows:
    ids = torch.randint(3, 61, (32, 12), generator=torch.Generator().manual_seed(3))
    return TokenWindows(ids, ids.clone())


def tuned(model: nn.Module, out: Path) -> tuple[LoRAPrune, nn.Module, list[float]]:
    """The method and the model after sixteen steps, and their losses."""
    options = dict(target="heads=1,channels=48", lora_rank=4, lora_alpha=8.0, lora_dropout=0.0)
    method = LoRAPrune(**options, mask_every=2, milestones=0)
    torch.manual_seed(1)  # of the adapters
    prepared = method.prepare(model)
    options = dict(learning_rate=1e-2, batch_size=4, save_every=1000)
    tune(prepared, windows(), out, steps=16, callbacks=method.callbacks(), metrics=out / "metrics.jsonl", **options)
    return method, prepared, [entry["loss"] for entry in read_metrics(out / "metrics.jsonl")]


def test_numbers_are_read_and_left_alone(model: nn.Module) -> None:
    linear = model.model.layers[0].self_attn.q_proj
    for forward_first in (False, True):
        if forward_first:
            model(token_ids())
        codes, right = linear.weight.data.clone(), numbers(linear)
        torch.testing.assert_close(dense_weight(linear), right, rtol=1e-6, atol=0)
        assert torch.equal(linear.weight.data, codes)
        assert torch.equal(numbers(linear), right)
        model.train()(token_ids())  # what reading has left behind serves the next pass


def test_tuned_as_the_unquantised_model(model: nn.Module, folder: Path, tmp_path: Path) -> None:
    """Losses, groups and weights; the result is exactly what was trained, and a stock checkpoint."""
    reference, reference_model, expected = tuned(plain(model, folder), tmp_path / "plain")
    method, trained, losses = tuned(model, tmp_path / "quantised")
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), **FP32)

    with torch.no_grad():
        masked = trained.train()(token_ids()).logits  # in eval mode, 8 bits quantise the inputs too
    small, other = method.finalize(trained), reference.finalize(reference_model)
    assert small.config.intermediate_size == 48 and small.config.num_key_value_heads == 1
    for name, weight in other.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], weight, **FP32)
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(token_ids()).logits, masked, **FP32)

    export(small, None, tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert getattr(again.config, "quantization_config", None) is None
    with torch.no_grad():
        assert torch.equal(again.eval()(token_ids()).logits, small(token_ids()).logits)


def test_cutting_while_training_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"milestones is 3, but the model's weights are quantised.*milestones=0"):
        LoRAPrune(target="heads=1,channels=48", milestones=3).prepare(model)
