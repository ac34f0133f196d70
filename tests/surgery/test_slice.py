"""Slicing equals masking, for every family, tied and untied, in memory and after a round trip over disk."""

from __future__ import annotations

import pytest
import torch
from tiny_decoders import EPSILON, FAMILY_NAMES, HEADS, KEEP, VOCABULARY, WIDTH, logits, masked, relative_error, tiny

from pyprune.architectures import describe
from pyprune.surgery import parameter_counts, slice_hidden, untie

ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-4}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_slice_equals_masked_model(family: str, tied: bool, dtype: torch.dtype) -> None:
    model = tiny(family, tied, dtype)
    with masked(model):
        expected = logits(model)
    slice_hidden(model, KEEP)
    assert relative_error(logits(model), expected) < ROUNDING[dtype]
    assert describe(model).tied == tied


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_slice_in_bf16_errs_no_more_than_the_masked_model(family: str) -> None:
    """Both round to bf16, at different places; the fp64 model with the same (bf16) weights is the reference."""
    exact, model = tiny(family, tied=True), tiny(family, tied=True, dtype=torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    with masked(exact):
        expected = logits(exact)
    with masked(model):
        error_of_masking = relative_error(logits(model), expected)
    slice_hidden(model, KEEP)
    assert error_of_masking < 0.1
    assert relative_error(logits(model), expected) < 2 * error_of_masking


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_config_changes_only_where_it_must(family: str) -> None:
    model = tiny(family, tied=True)
    head_dim = describe(model).head_dim
    before = model.config.to_dict()
    slice_hidden(model, KEEP)
    after = model.config.to_dict()
    assert after.pop("hidden_size") == len(KEEP)
    assert after.pop("head_dim") == head_dim
    assert after.pop("rms_norm_eps") == pytest.approx(EPSILON * WIDTH / len(KEEP), rel=1e-12)
    assert after == {name: value for name, value in before.items() if name in after}
    assert set(before) - set(after) <= {"hidden_size", "head_dim", "rms_norm_eps"}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_slice_to_fewer_channels_twice(family: str) -> None:
    """Two cuts, the second of a model whose head_dim no longer follows from its hidden size, equal one."""
    model, once = tiny(family, tied=True), tiny(family, tied=True)
    slice_hidden(slice_hidden(model, KEEP), torch.arange(4, 12))
    slice_hidden(once, KEEP[4:12])
    assert relative_error(logits(model), logits(once)) < 1e-12
    assert model.config.rms_norm_eps == pytest.approx(EPSILON * WIDTH / 8, rel=1e-12)
    assert model.config.to_dict() | {"rms_norm_eps": 0} == once.config.to_dict() | {"rms_norm_eps": 0}


def test_order_of_kept_channels_does_not_matter() -> None:
    model, reversed_model = tiny("llama"), tiny("llama")
    slice_hidden(model, KEEP.tolist())
    slice_hidden(reversed_model, KEEP.flip(0))
    assert relative_error(logits(reversed_model), logits(model)) < 1e-12


def test_parameter_counts_follow_the_formula() -> None:
    model = tiny("mistral", tied=True)
    slice_hidden(model, KEEP)
    n, head_dim, kv, ffn = len(KEEP), WIDTH // HEADS, 2, 40
    per_block = n * head_dim * (HEADS + 2 * kv + HEADS) + 3 * n * ffn + 2 * n
    assert parameter_counts(model) == {"blocks": 2 * per_block + n, "total": 2 * per_block + n + VOCABULARY * n}
    untie(describe(model))
    assert parameter_counts(model) == {"blocks": 2 * per_block + n, "total": 2 * per_block + n + 2 * VOCABULARY * n}
