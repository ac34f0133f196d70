"""What `describe` finds and what it and the surgery refuse, with the reasons."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_decoders import FAMILY_NAMES, KEEP, WIDTH, logits, tiny
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from pyprune.architectures import UnsupportedArchitecture, base, describe
from pyprune.surgery import export, fold_adapters, merge_hsm, settle_config, slice_hidden

SMALL = dict(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_parameter_of_a_decoder_is_accounted_for(family: str) -> None:
    """All that has a hidden-size dimension is a handle; what is left over are biases and norms of the heads."""
    decoder = describe(tiny(family))
    parts = [*decoder.writers().values(), *(part for r in decoder.reads() for part in (r.norm, *r.linears))]
    known = {id(parameter) for part in parts for parameter in part.parameters()}
    rest = [name for name, parameter in decoder.model.named_parameters() if id(parameter) not in known]
    assert all("q_norm" in name or "k_norm" in name for name in rest)
    assert len(decoder.blocks) == 2 and decoder.hidden_size == WIDTH and len(decoder.writers()) == 5
    assert decoder.norm_offset == (family == "gemma")


def test_describe_looks_through_peft() -> None:
    stock = tiny("llama")
    plain = describe(stock)
    modules = {name: base(module) for name, module in plain.writers().items()}
    wrapped = describe(get_peft_model(stock, LoraConfig(r=2, target_modules=list(plain.linear_names()))))
    assert {name: base(module) for name, module in wrapped.writers().items()} == modules
    assert type(wrapped.blocks[0].writes[0]).__module__.startswith("peft.")
    assert all(base(linear) is not linear for block in wrapped.blocks for r in block.reads for linear in r.linears)


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_layer_norm_families_are_refused_with_the_reason(model_type: str) -> None:
    fields = SMALL | {"n_embd": 8, "n_layer": 1, "n_head": 2} if model_type == "gpt2" else SMALL | {"ffn_dim": 8}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**fields))
    with pytest.raises(UnsupportedArchitecture, match=f"'{model_type}'.*LayerNorm, which subtracts the mean"):
        describe(model)


@pytest.mark.parametrize("model_type", ["gemma2", "olmo2"])
def test_unknown_families_are_told_what_is_missing(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type](**SMALL, intermediate_size=8, num_key_value_heads=1, pad_token_id=0)
    with pytest.raises(UnsupportedArchitecture, match=rf"'{model_type}'.*not a known family.*FAMILIES.*families\.md"):
        describe(AutoModelForCausalLM.from_config(config))


def test_model_without_a_head_is_refused() -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"LlamaModel has no 'model\.layers'.*AutoModelForCausalLM"):
        describe(AutoModel.from_config(tiny("llama").config))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([], "at least one channel"),
        ([0.0, 1.0], "at least one channel index, found torch.float32"),
        (torch.ones(WIDTH, dtype=torch.bool), "found torch.bool"),
        ([0, 1, 2, 24], "from 0 to 23"),
        ([-1, 1, 2, 3], "from 0 to 23"),
        ([1, 1, 2, 3], "from 0 to 23"),
        (range(10), "10 channels, but LlamaConfig wants hidden_size to be a multiple of num_attention_heads = 4"),
    ],
)
def test_bad_channels_are_refused_and_change_nothing(keep: object, message: str) -> None:
    model = tiny("llama")
    expected = logits(model)
    with pytest.raises(ValueError, match=message):
        slice_hidden(model, keep)
    assert torch.equal(logits(model), expected)


def test_width_multiple_is_what_stock_configs_demand() -> None:
    """The table's claim against the config classes themselves: width 18 with 4 heads and an explicit head_dim."""
    for family in FAMILY_NAMES:
        model = tiny(family)
        fields = model.config.to_dict() | {"hidden_size": 18, "head_dim": 8}
        if describe(model).width_multiple == 1:
            assert type(model.config).from_dict(fields).head_dim == 8
        else:
            with pytest.raises(Exception, match="multiple of the number of attention heads"):
                type(model.config).from_dict(fields)


def test_phi3_longrope_is_refused_with_the_stock_configs_reason() -> None:
    model = tiny("phi3")
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
    model.config.rope_parameters = model.config.rope_parameters | rope | {"partial_rotary_factor": 1.0}
    with pytest.raises(ValueError, match=r"(?s)Phi3Config does not accept hidden_size 16 .*short_factor"):
        slice_hidden(model, KEEP)


def test_adapters_have_to_be_folded_first(tmp_path: object) -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    for refuse in (lambda: slice_hidden(model, KEEP), lambda: export(model, None, f"{tmp_path}/small")):
        with pytest.raises(ValueError, match="fold_adapters"):
            refuse()
    for refuse in (lambda: merge_hsm(describe(model), {}), lambda: settle_config(model)):
        with pytest.raises(ValueError, match="fold_adapters"):
            refuse()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_folding_adapters_keeps_the_function_and_a_tied_embedding(dora: bool) -> None:
    """An adapter on a tied head changes the head only."""
    targets = [*describe(tiny("llama")).linear_names(), "lm_head"]
    model = get_peft_model(tiny("llama", tied=True), LoraConfig(r=2, target_modules=targets, use_dora=dora)).double()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    expected, embedding = logits(model), describe(model).embedding.weight.detach().clone()
    stock = fold_adapters(model)
    assert type(stock).__name__ == "LlamaForCausalLM" and not stock.config.tie_word_embeddings
    assert torch.equal(describe(stock).embedding.weight, embedding)
    assert float((logits(stock) - expected).abs().max()) < 1e-12 * float(expected.abs().max())
    assert fold_adapters(stock) is stock


def test_quantised_layers_are_refused() -> None:
    model = tiny("llama")
    model.lm_head.weight = nn.Parameter(torch.zeros(61, WIDTH, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="floating-point weights, found Linear; load the model unquantised"):
        slice_hidden(model, KEEP)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_merged_hsms_equal_hsms_behind_the_writers(family: str) -> None:
    model = tiny(family, tied=True)
    decoder = describe(model)
    torch.manual_seed(2)
    matrices = {n: torch.eye(WIDTH) + 0.2 * torch.randn(WIDTH, WIDTH, dtype=torch.float64) for n in decoder.writers()}
    handles = [
        writer.register_forward_hook(lambda module, args, output, d=matrices[name]: output @ d.T)
        for name, writer in decoder.writers().items()
    ]
    expected = logits(model)
    for handle in handles:
        handle.remove()
    merge_hsm(decoder, matrices)
    assert not decoder.tied
    assert float((logits(model) - expected).abs().max()) < 1e-12 * float(expected.abs().max())


def test_merge_hsm_refuses_wrong_names_and_shapes() -> None:
    decoder = describe(tiny("llama"))
    with pytest.raises(ValueError, match="no writer is called 'block9_mlp'; expected names like embedding"):
        merge_hsm(decoder, {"block9_mlp": torch.eye(WIDTH)})
    with pytest.raises(ValueError, match=r"hsms\['block0_mlp'\]: expected shape \[24, 24\].*found \[16, 24\]"):
        merge_hsm(decoder, {"block0_mlp": torch.eye(WIDTH)[:16]})
