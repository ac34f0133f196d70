"""Packed models on a GPU: loaded there by transformers, and as close to fp64 as the dense model is there."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint"))
from packed_models import llama

import pyprune
from pyprune import checkpoint
from pyprune.quantizer import packed_linears

pytestmark = pytest.mark.gpu
IDS = torch.randint(3, 61, (2, 8), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS.to(next(model.parameters()).device)).logits.double().cpu()


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_loads_and_computes(pattern: str, dtype: torch.dtype, device: torch.device, tmp_path: Path) -> None:
    model = llama(pattern, dtype)
    checkpoint.save(model, None, tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map=device)
    packed = packed_linears(loaded).values()
    assert packed and all(tensor.is_cuda for linear in packed for tensor in linear.packed().values())
    exact = logits(copy.deepcopy(model).double())
    dense = (logits(model.to(device)) - exact).abs().max()
    assert (logits(loaded) - exact).abs().max() <= 2 * dense + 1e-4


def test_sparsify_measures_on_the_device(device: torch.device) -> None:
    model = llama("0.5", torch.bfloat16).to(device)
    report = pyprune.sparsify(model, expected_batch=4)
    assert all(layer.measured_gain is not None and layer.measured_gain > 0 for layer in report.layers)
    assert all((layer.format == "dense") == (layer.measured_gain <= 1) for layer in report.layers)


def test_damage_is_found_on_the_device(device: torch.device) -> None:
    model = llama().to(device)
    pyprune.sparsify(model, measure=False)
    linear = model.get_submodule("model.layers.0.mlp.up_proj")
    linear.check()
    with torch.no_grad():
        linear.offsets[-1] += 8
    with pytest.raises(ValueError, match="offsets gives tile"):
        linear.check()
