"""Removing heads, channels and blocks equals masking them, for every family, in memory, in training and on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from surgery.tiny_decoders import FAMILY_NAMES, logits, relative_error, tiny, token_ids
from torch import nn
from transformers import AutoModelForCausalLM

from pyprune import removal
from pyprune.architectures import describe, unwrap
from pyprune.models import ModelError, open_model, open_skeleton
from pyprune.surgery import export, fold_adapters, parameter_counts

ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-4}
CHANNELS = [0, 3, 4, 7, 8, 11, 12, 20, 21, 22, 30, 39]
UNIFORM = {f"block{i}_{axis}": kept for i in (0, 1) for axis, kept in (("heads", [1]), ("channels", CHANNELS))}
UNEVEN = {"block0_heads": [0], "block1_channels": CHANNELS[:5]}


@contextmanager
def zeroed(model: nn.Module, kept: dict[str, list[int]]) -> Iterator[None]:
    """The masked model, written with the stock names: 2 query heads to each of 2 key/value heads, 40 channels."""
    handles = []
    for i, layer in enumerate(unwrap(model).model.layers):
        width = getattr(layer.self_attn.o_proj, "in_features", 0)
        heads = kept.get(f"block{i}_heads", [0, 1])
        attention = torch.cat([torch.full((width // 2,), float(g in heads)) for g in (0, 1)])
        mlp = torch.tensor([float(c in kept.get(f"block{i}_channels", range(40))) for c in range(40)])
        for module, mask in ((layer.self_attn.o_proj, attention), (layer.mlp.down_proj, mlp)):
            handles.append(module.register_forward_pre_hook(lambda m, args, mask=mask: (args[0] * mask.to(args[0]),)))
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("kept", [UNIFORM, UNEVEN], ids=["uniform", "uneven"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_removed_equals_masked(family: str, kept: dict[str, list[int]], dtype: torch.dtype) -> None:
    model = tiny(family, dtype=dtype)
    dense = logits(model)
    with zeroed(model, kept):
        expected = logits(model)
    assert relative_error(expected, dense) > 0.01
    with removal.masked(model, kept):
        assert relative_error(logits(model), expected) < ROUNDING[dtype]
    before = parameter_counts(model)["total"]
    removal.remove_groups(model, kept)
    assert relative_error(logits(model), expected) < ROUNDING[dtype]
    assert parameter_counts(model)["total"] < before


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_stock_code_loads_equal_widths_and_only_ours_the_others(family: str, tmp_path: Path) -> None:
    for name, kept in (("uniform", UNIFORM), ("uneven", UNEVEN)):
        model = tiny(family, tied=True, dtype=torch.float32)
        removal.remove_groups(model, kept)
        expected = logits(model)
        export(model, None, tmp_path / name)
        loaded = open_model(tmp_path / name)
        assert relative_error(logits(loaded.eval()), expected) < 1e-6
        assert describe(loaded).tied
        skeleton = open_skeleton(tmp_path / name)
        assert [group.count for group in describe(skeleton).groups()] == [g.count for g in describe(model).groups()]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "uniform").eval()
    assert relative_error(logits(stock), logits(open_model(tmp_path / "uniform"))) == 0
    assert stock.config.num_attention_heads == 2 and stock.config.num_key_value_heads == 1
    assert stock.config.intermediate_size == len(CHANNELS) and not hasattr(stock.config, "block_widths")
    with pytest.raises(RuntimeError, match="size"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "uneven")


def test_counts_follow_the_formula() -> None:
    model = tiny("mistral")
    removal.remove_groups(model, UNIFORM)
    width, head_dim, ffn, vocabulary = 24, 6, len(CHANNELS), 61
    block = width * head_dim * (2 + 2 * 1 + 2) + 3 * width * ffn + 2 * width
    assert parameter_counts(model) == {"blocks": 2 * block + width, "total": 2 * block + width + 2 * vocabulary * width}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_model_in_training_goes_on_as_the_masked_one(family: str, dora: bool) -> None:
    """Three steps of SGD masked; a cut after the first one gives the same weights, and folding keeps the function."""
    results = []
    for cut in (False, True):
        torch.manual_seed(0)
        model = tiny(family)
        config = LoraConfig(r=3, target_modules="all-linear", use_dora=dora, init_lora_weights=False)
        model = get_peft_model(model, config).double()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05, momentum=0.5)
        for step in range(3):
            if cut and step == 1:
                changes = removal.remove_groups(model, UNEVEN)
                for parameter, change in changes.items():
                    for state in [s for p, s in optimizer.state.items() if p is parameter]:
                        state["momentum_buffer"] = change(state["momentum_buffer"])
            with nullcontext() if cut and step else zeroed(model, UNEVEN):
                model(token_ids(), labels=token_ids()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if not cut:
            removal.remove_groups(model, UNEVEN)
        results.append(logits(model))
        assert relative_error(logits(fold_adapters(model).eval()), results[-1]) < 1e-6
    assert relative_error(*results) < 1e-7


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_removed_blocks_are_passed_by(family: str, tmp_path: Path) -> None:
    model = tiny(family, dtype=torch.float32)
    layers = model.model.layers
    handle = layers[0].register_forward_hook(lambda module, args, output: args[0])
    expected = logits(model)
    handle.remove()
    removal.remove_blocks(model, [1])
    assert relative_error(logits(model), expected) < 1e-5
    export(model, None, tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert len(stock.model.layers) == 1
    assert relative_error(logits(stock), expected) < 1e-5
    # one token at a time, with the cache that stock code indexes by block
    cached = stock.generate(token_ids(), max_new_tokens=4, do_sample=False)
    plain = stock.generate(token_ids(), max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_uneven_models_generate_with_a_cache(family: str) -> None:
    model = tiny(family, dtype=torch.float32)
    removal.remove_groups(model, UNEVEN)
    cached = model.generate(token_ids(), max_new_tokens=4, do_sample=False)
    assert torch.equal(cached, model.generate(token_ids(), max_new_tokens=4, do_sample=False, use_cache=False))


def test_bad_input(tmp_path: Path) -> None:
    model = tiny("llama")
    before = logits(model)
    for kept, message in (
        ({"block2_heads": [0]}, r"unknown groups \['block2_heads'\]; expected names like block0_heads"),
        ({"block0_heads": [0], "block1_heads": []}, r"block1_heads'\]: expected different indices from 0 to 1"),
        ({"block0_heads": [0], "block1_heads": [2]}, "from 0 to 1"),
        ({"block0_channels": [3, 3]}, "from 0 to 39"),
    ):
        with pytest.raises(ValueError, match=message):
            removal.remove_groups(model, kept)
    for blocks in ([], [1, 0], [0, 2]):
        with pytest.raises(ValueError, match="rising indices of blocks, 0 to 1"):
            removal.remove_blocks(model, blocks)
    assert torch.equal(logits(model), before)
    removal.remove_groups(model, UNEVEN)
    export(model.float(), None, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"block_widths": [', '"block_widths": [[9, 9],'))
    with pytest.raises(ModelError, match="block_widths"):
        open_model(tmp_path / "model")
