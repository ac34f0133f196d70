"""Perplexity against a brute-force fp64 count, latency against a scripted clock, limits against counts by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pyprune import evaluation, oneshot, runs, timing
from pyprune.evaluation import latency, peak_memory, perplexity, speedup

RECIPES = (oneshot.Recipe, runs.Recipe)


def llama(hidden: int = 16, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "vocab_size": 23,
        "hidden_size": hidden,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "initializer_range": 0.7,  # wide, so that contexts matter
    }
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **options}))


def tokens(count: int) -> torch.Tensor:
    return torch.randint(23, (count,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def negative_log_likelihood(model: nn.Module, context: list[int], token: int) -> float:
    logits = model(input_ids=torch.tensor([context])).logits[0, -1]
    return -torch.log_softmax(logits, -1)[token].item()


@pytest.mark.parametrize(("count", "window", "stride"), [(40, 8, 8), (41, 8, 3), (37, 8, 1), (7, 8, 8), (33, 32, 5)])
@pytest.mark.parametrize("bos", [None, 5])
def test_perplexity_is_the_documented_sum(count: int, window: int, stride: int, bos: int | None) -> None:
    """Token t is scored by the first window that predicts it: the one that begins at the smallest multiple of stride
    from which it is at most `window` predictions away."""
    model, ids = llama().double().eval(), tokens(count)
    first = 1 if bos is None else 0
    losses = []
    for token in range(first, count):
        begin = 0
        while begin + window - 1 + first < token:
            begin += stride
        context = ids[begin:token].tolist() if bos is None else [bos, *ids[begin:token].tolist()]
        losses.append(negative_log_likelihood(model, context, int(ids[token])))
    found = perplexity(model, ids, window, stride, bos=bos)
    assert found.tokens == len(losses) == count - first
    # The sum runs over fp32 logits of an fp64 model: one rounding of about 6e-8 of each.
    assert found.nll == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert found.value == pytest.approx(math.exp(found.nll))


def test_only_labelled_tokens_count() -> None:
    model, ids = llama().double().eval(), tokens(30)
    labels = torch.where(torch.arange(30) % 3 == 0, ids, -100)
    expected = [negative_log_likelihood(model, ids[:t].tolist(), int(ids[t])) for t in range(3, 30, 3)]
    found = perplexity(model, ids, 30, labels=labels)
    assert found.tokens == len(expected)
    assert found.nll == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    with pytest.raises(ValueError, match="no token to score"):
        perplexity(model, ids, 30, labels=torch.full_like(ids, -100))


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    model = llama()
    nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, tokens(50), 16, 4).value == pytest.approx(23, rel=1e-6)


def test_perplexity_leaves_the_mode_of_the_model() -> None:
    model = llama(attention_dropout=0.5).train()
    again = [perplexity(model, tokens(20), 8).value for _ in range(2)]
    assert again[0] == again[1]  # dropout was off
    assert model.training


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_a_stride_that_skips_tokens_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match=f"stride is {stride}; expected 1 to the window of 8"):
        perplexity(llama(), tokens(20), 8, stride)
    with pytest.raises(ValueError, match="window is 0; expected at least 1"):
        perplexity(llama(), tokens(20), 0)


def test_a_model_that_computes_nan_is_refused() -> None:
    model = llama()
    next(model.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not numbers"):
        perplexity(model, tokens(20), 8)


@pytest.mark.parametrize(
    ("recipe", "field", "wrong", "message"),
    [
        *((recipe, field, 0, "expected at least 1") for recipe in RECIPES for field in ("prompt_tokens", "new_tokens")),
        *((recipe, field, 1, "expected at least 2") for recipe in RECIPES for field in ("eval_window", "eval_tokens")),
        *((recipe, "eval_tokens", 511, "511, fewer than one eval_window of 512; give more") for recipe in RECIPES),
        *((recipe, "batch_size", 0, "expected at least 1") for recipe in RECIPES),
        (oneshot.Recipe, "calibration_window", 1, "expected at least 2"),
        (runs.Recipe, "window", 1, "expected at least 2"),
        (runs.Recipe, "eval_stride", 0, "expected 1 to the eval_window of 512, so that no token is skipped"),
        (runs.Recipe, "eval_stride", 513, "expected 1 to the eval_window of 512"),
        *((runs.Recipe, field, -1, "expected at least 0") for field in ("warmup", "save_every", "seed", "repeats")),
    ],
)
def test_a_recipe_that_would_fail_late_is_refused(recipe: Any, field: str, wrong: int, message: str) -> None:
    recipe(**{"eval_window": 512, "eval_tokens": 512})
    with pytest.raises(ValueError, match=f"^{field} is {wrong}.*{message.removeprefix(f'{wrong}')}"):
        recipe(**{"eval_window": 512, field: wrong})


# ---- latency


class Scripted(nn.Module):
    """Stands for a model: every forward pass moves the clock by the next of its times."""

    def __init__(self, name: str, clock: Clock, prefill: list[float], decode: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.name, self.clock, self.prefill, self.decode = name, clock, iter(prefill), decode

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(num_embeddings=11)

    def forward(self, input_ids: torch.Tensor, past_key_values: Any, **options: Any) -> Any:
        prompt = input_ids.shape[1] > 1
        self.clock.now += next(self.prefill) if prompt else self.decode
        self.clock.calls.append((self.name, "prefill" if prompt else "decode"))
        return SimpleNamespace(logits=torch.zeros(1, 1, 11))


class Clock:
    def __init__(self) -> None:
        self.now, self.calls = 0.0, list[tuple[str, str]]()


def test_latency_interleaves_warms_up_and_takes_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timing, "now", lambda device: clock.now)
    dense = Scripted("dense", clock, [100.0, 4.0, 8.0, 5.0], 0.5)
    pruned = Scripted("pruned", clock, [100.0, 2.0, 1.0, 3.0], 0.25)
    found = latency({"dense": dense, "pruned": pruned}, prompt_tokens=4, new_tokens=2, repeats=3)
    assert clock.calls == [
        (name, kind) for _ in range(4) for name in ("dense", "pruned") for kind in ("prefill", "decode", "decode")
    ]
    assert found["dense"].prefill_all == [4.0, 8.0, 5.0]  # without the warm-up
    assert (found["dense"].prefill, found["dense"].decode) == (5.0, 0.5)
    assert (found["pruned"].prefill, found["pruned"].decode) == (2.0, 0.25)


def test_decoding_continues_the_prompt_through_its_cache() -> None:
    """The tokens that the timed loop decodes are those of generate()."""
    model, seen = llama().eval(), []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    latency({"model": model}, prompt_tokens=6, new_tokens=5, repeats=1)
    handle.remove()
    timed = torch.cat(seen[6:], dim=1)  # behind the warm-up: the prompt, then what was decoded
    expected = model.generate(timed[:, :6], max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(timed, expected)


def test_limits_are_ratios_of_weights() -> None:
    dense, pruned = llama(16), llama(12)
    measured = {
        "dense": evaluation.Latency(3.0, 0.3, [], []),
        "pruned": evaluation.Latency(2.0, 0.1, [], []),
    }
    found = speedup(dense, pruned, measured)
    block = {d: 2 * d * 16 + 2 * d * 8 + 3 * d * 24 + 2 * d for d in (16, 12)}  # q, o; k, v; gate, up, down; norms
    assert (found.prefill, found.decode) == (pytest.approx(1.5), pytest.approx(3.0))
    assert found.prefill_limit == pytest.approx(block[16] / block[12])
    assert found.decode_limit == pytest.approx((2 * block[16] + 23 * 16) / (2 * block[12] + 23 * 12))


def test_packed_weights_save_bytes_and_no_multiplications() -> None:
    """For a prefill they are expanded."""
    import pyprune

    dense, packed = llama(64, intermediate_size=128), llama(64, intermediate_size=128)
    with torch.no_grad():
        for linear in (module for module in packed.model.layers.modules() if isinstance(module, nn.Linear)):
            linear.weight[:, ::2] = 0
    pyprune.sparsify(packed, measure=False)
    (operations, nbytes), (operations_packed, nbytes_packed) = map(evaluation.work, (dense, packed))
    assert operations_packed == operations and 1.1 < nbytes / nbytes_packed < 2


def test_peak_memory_sees_what_is_gone_again() -> None:
    size = 256 << 20
    with peak_memory() as nothing:
        pass
    with peak_memory() as peak:
        torch.ones(size // 4)
    if peak.bytes is None or nothing.bytes is None:
        pytest.skip("this system does not report the peak")
    assert peak.bytes - nothing.bytes > 0.8 * size
