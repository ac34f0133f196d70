"""The loss from hidden states against the formula on all logits at once, and transformers' own in its models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from surgery.tiny_decoders import FAMILY_NAMES, VOCABULARY, tiny
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pyprune import head_loss
from pyprune.data import TokenWindows
from pyprune.head_loss import HeadLoss, applies
from pyprune.methods.lora import LoRA
from pyprune.training import tune

TOKENS, WIDTH = 23, 12


def drawn(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for n in (TOKENS, VOCABULARY))
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    labels[::5] = -100
    return hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), labels


@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY, 1 << 20], ids=["a token", "three tokens", "all"])
@pytest.mark.parametrize("items", [None, 40])
def test_loss_and_gradients(monkeypatch: pytest.MonkeyPatch, chunk: int, items: int | None) -> None:
    monkeypatch.setattr(head_loss, "CHUNK", chunk)
    hidden, head, labels = drawn(torch.float64)
    (found,) = head_loss.head_loss(hidden, head, labels, items)
    right = F.cross_entropy(hidden @ head.T, labels, reduction="sum") / (items or int((labels != -100).sum()))
    torch.testing.assert_close(found, right, rtol=1e-12, atol=0)
    for ours, theirs in zip(*(torch.autograd.grad(3 * x, (hidden, head)) for x in (found, right)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_bf16_is_as_exact_as_fp32_logits_of_bf16_products() -> None:
    """Both round the products once and the gradient of the logits once; sums of 61 and 23 products differ in order."""
    hidden, head, labels = drawn(torch.bfloat16)
    (found,) = head_loss.head_loss(hidden, head, labels)
    stock = F.cross_entropy((hidden @ head.T).float(), labels)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(stock.item(), rel=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(x, (hidden, head)) for x in (found, stock)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-9 * float(theirs.abs().max()))


def test_no_label_that_counts_gives_no_gradient() -> None:
    hidden, head, labels = drawn(torch.float32)
    (found,) = head_loss.head_loss(hidden, head, torch.full_like(labels, -100), items=7)
    found.backward()
    assert found.item() == 0 and not hidden.grad.any() and not head.grad.any()


def test_numbers_of_tokens_that_differ_are_refused() -> None:
    hidden, head, labels = drawn(torch.float32)
    with pytest.raises(ValueError, match="hidden has 23 tokens, labels 22"):
        head_loss.head_loss(hidden, head, labels[1:])


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0,
                        embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    return GPT2LMHeadModel(config).double()


def opt() -> nn.Module:
    """With projections between the embedding's width and the blocks', which the head sees through."""
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=VOCABULARY, hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4,
                       max_position_embeddings=64, word_embed_proj_dim=12, dropout=0.0)  # fmt: skip
    return OPTForCausalLM(config).double()


MODELS = {family: lambda family=family: tiny(family) for family in FAMILY_NAMES} | {"gpt2": gpt2, "opt": opt}


def text() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 4:7] = labels[2, 0] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize(
    ("family", "adapted"), [*((family, False) for family in MODELS), *((family, True) for family in FAMILY_NAMES)]
)
def test_every_family_has_the_loss_and_gradients_that_transformers_gives(family: str, adapted: bool) -> None:
    """All in fp64, but stock losses are made fp32: 2^-24 of a loss near 5, and of the gradients that it passes back."""
    model: Any = MODELS[family]()
    if adapted:
        model = LoRA(lora_dropout=0.0).prepare(model)
    model.train()
    assert applies(model)
    results = []
    for ours in (False, True):
        loss = HeadLoss(model) if ours else None
        model.zero_grad()
        out = model(**text(), num_items_in_batch=40)
        out.loss.backward()
        results.append((out.loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
        if loss:
            assert out.logits.shape[1] == 1
            assert model.eval()(**text()).logits.shape[1] == 11, "an evaluation must have its logits"
            loss.remove()
    assert model.train()(**text()).logits.shape[1] == 11
    (stock, theirs), (found, ours) = results
    assert found == pytest.approx(stock, rel=1e-6)
    for name, gradient in theirs.items():
        if gradient is not None:
            scale = float(gradient.abs().max())
            torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-6 * scale + 1e-12, msg=name)


def test_applies_only_where_it_is_the_same() -> None:
    model: Any = tiny("llama")
    model.loss_function = lambda logits, **_: logits.sum()
    assert not applies(model)
    small = dict(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=8)
    capped = Gemma2ForCausalLM(Gemma2Config(**small, num_attention_heads=2, num_key_value_heads=1))
    assert capped.config.final_logit_softcapping and not applies(capped)
    biased: Any = tiny("llama")
    biased.lm_head.bias = nn.Parameter(torch.ones(VOCABULARY))
    assert not applies(biased)
    special: Any = tiny("llama")
    special.lm_head.__class__ = type("Packed", (nn.Linear,), {})  # as SparseLinear and those of bitsandbytes are
    assert not applies(special)
    assert not applies(nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------------------------ in `tune`


def windows() -> TokenWindows:
    ids = torch.randint(3, VOCABULARY, (16, 12), generator=torch.Generator().manual_seed(3))
    return TokenWindows(ids, ids.clone())


class Seen(TrainerCallback):
    """Dtypes of the activations between LoRA's factors, and of the logits' shapes, in every forward pass."""

    def __init__(self, model: Any) -> None:
        self.dtypes: set[torch.dtype] = set()
        self.tokens: set[int] = set()
        for name, module in model.named_modules():
            if name.endswith("lora_A.default"):
                module.register_forward_hook(lambda module, args, output: self.dtypes.add(output.dtype))
        model.register_forward_hook(lambda module, args, output: self.tokens.add(output.logits.shape[1]))


def adapted(dtype: torch.dtype) -> tuple[Any, Seen]:
    model = LoRA(lora_rank=4, lora_dropout=0.0).prepare(tiny("llama", dtype=dtype))
    return model, Seen(model)


def test_tune_trains_as_a_trainer_does(tmp_path: Path) -> None:
    """fp32: after ten steps the adapters agree to the rounding of a few hundred sums, though no logits were made."""
    (ours, seen), (theirs, _) = adapted(torch.float32), adapted(torch.float32)
    options = {"learning_rate": 1e-3, "gradient_accumulation_steps": 2}
    tune(ours, windows(), tmp_path / "ours", steps=10, batch_size=2, **options)  # type: ignore[arg-type]
    Trainer(
        model=theirs,
        args=TrainingArguments(
            str(tmp_path / "theirs"), max_steps=10, per_device_train_batch_size=2, lr_scheduler_type="cosine",
            seed=0, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, **options,
        ),
        train_dataset=windows(),
    ).train()  # fmt: skip
    assert seen.tokens == {1} and seen.dtypes == {torch.float32}
    moved = 0.0
    other = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, other[name], rtol=1e-4, atol=1e-5)
        if "lora_B" in name:
            moved += parameter.abs().sum().item()
    assert moved > 1, "the adapters started at zero and were to move"


def test_adapters_on_bf16_weights_multiply_in_bf16_and_stay_fp32(tmp_path: Path) -> None:
    model, seen = adapted(torch.bfloat16)
    tune(model, windows(), tmp_path, steps=2, batch_size=2)
    assert seen.dtypes == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    seen.dtypes.clear()
    assert model.eval()(windows().ids[:1]).logits.dtype == torch.bfloat16, "autocast is to end with the training"
    assert seen.dtypes == {torch.float32}
    seen.dtypes.clear()
    tune(model, windows(), tmp_path / "asked", steps=1, batch_size=2, bf16=False)
    assert seen.dtypes == {torch.float32}
