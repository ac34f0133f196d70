"""SliceGPT: the cut is the projection on the leading principal axes; the target counts an untied head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from methods.test_llm_pruner import tuned_in_two_parts
from methods.test_loraprune import FP32, logits, wide, windows
from surgery.tiny_decoders import relative_error, tiny

from pyprune import PruneThenTune, SliceGPT, basis
from pyprune.architectures import describe
from pyprune.surgery import parameter_counts
from pyprune.training import tune

CALIBRATION = list(windows().ids[:12].split(4))


def slicegpt(**options: Any) -> SliceGPT:
    return SliceGPT(**{"target": "hidden=16", "round_to": 4, "lora_rank": 3, "lora_dropout": 0.0} | options)


def cut_then_tuned(**options: Any) -> PruneThenTune:
    return PruneThenTune(**{"ratio": 1 / 3, "round_to": 8, "lora_rank": 3, "lora_dropout": 0.0} | options)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_cut_is_a_projection_on_the_leading_axes(family: str, tied: bool) -> None:
    """Every writer's output projected on Q's first 16 axes in the dense model whose gains are folded: same logits. A
    tied model's axes are those within channels of one gain, once nearly equal gains are equal."""
    model, dense = tiny(family, tied), tiny(family, tied)
    basis.level(dense)
    q = basis.pca(basis.covariance(dense, CALIBRATION), basis.mixable(dense))
    basis.rotate(dense, torch.eye(24, dtype=torch.float64))
    projection = q[:, :16] @ q[:, :16].T
    for writer in describe(dense).writers().values():
        writer.register_forward_hook(lambda module, args, output: output @ projection)
    assert relative_error(logits(slicegpt().cut(model, CALIBRATION)), logits(dense)) < 1e-10


@pytest.mark.parametrize("untie", [False, True])
def test_target_counts_an_untied_head(untie: bool) -> None:
    for target, share in (("params=0.8", 0.8), ("params=0.5", 0.5)):
        model = wide()
        model.config.tie_word_embeddings = True
        model.tie_weights()
        before = parameter_counts(model)["total"]
        pruned = slicegpt(target=target, untie=untie).cut(model, CALIBRATION)
        after = parameter_counts(pruned)["total"]
        assert describe(pruned).tied is not untie
        step = after / pruned.config.hidden_size * 8  # a multiple of 8 heads
        assert 0 <= share * before - after < step


def test_tuned_as_prune_then_tune(tmp_path: Path) -> None:
    """The same cut and the same LoRA as prune-then-tune at that hidden size."""
    results = []
    for method in (slicegpt(), cut_then_tuned()):
        torch.manual_seed(1)
        model = method.prepare(tiny("llama", False, torch.float32), CALIBRATION)
        folder = tmp_path / type(method).__name__
        tune(model, windows(), folder, steps=3, callbacks=method.callbacks(), learning_rate=1e-2, save_every=100)
        trained = logits(model)
        results.append(method.finalize(model))
        torch.testing.assert_close(logits(results[-1]), trained, **FP32)
    assert results[0].config.hidden_size == 16
    assert torch.equal(logits(results[0]), logits(results[1]))


@pytest.mark.parametrize("make", [slicegpt, cut_then_tuned, lambda: cut_then_tuned(basis="identity")])
def test_tuned_and_resumed_bit_for_bit(make: Any, tmp_path: Path) -> None:
    """Resumed without calibration: the checkpoint has the axes."""
    tuned_in_two_parts(make, None, tmp_path)
    checkpoint = tmp_path / "True" / "checkpoint-3"
    other = "pca" if make().basis == "identity" else "identity"
    with pytest.raises(ValueError, match=r"another basis or of another model: its axes are \[24"):
        cut_then_tuned(basis=other).prepare(tiny("llama"), CALIBRATION, resume=checkpoint)
    (checkpoint / "axes.safetensors").unlink()
    with pytest.raises(ValueError, match="checkpoint-3 does not say which channels were cut"):
        make().prepare(tiny("llama"), CALIBRATION, resume=checkpoint)


def test_bad_input() -> None:
    for options, message in (
        ({"target": "channels=12"}, "SliceGPT cuts the hidden size"),
        ({"target": "latency=0.5"}, "SliceGPT cuts the hidden size"),
        ({"round_to": 0}, "round_to is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            slicegpt(**options)
    with pytest.raises(ValueError, match="does not accept hidden_size 18"):
        slicegpt(target="hidden=18").check(tiny("llama"))
    with pytest.raises(ValueError, match="calibration"):
        slicegpt().prepare(tiny("llama"))
    with pytest.raises(ValueError, match="not within reach of hidden"):
        slicegpt(target="params=0.01").prepare(tiny("llama"), CALIBRATION)
