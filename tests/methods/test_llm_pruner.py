"""LLM-Pruner: what goes is what the criterion says, then LoRA; a resumed run makes the same cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.test_loraprune import FP32, At, logits, wide, windows
from surgery.tiny_decoders import tiny
from torch import Tensor

from pyprune import LLMPruner
from pyprune.architectures import describe
from pyprune.criteria import score
from pyprune.surgery import parameter_counts
from pyprune.training import InterruptedTraining, tune

CALIBRATION = list(windows().ids[:12].split(4))


def llm_pruner(**options: Any) -> LLMPruner:
    return LLMPruner(**{"target": "heads=1,channels=12", "lora_rank": 3, "lora_dropout": 0.0, "samples": 6} | options)


@pytest.mark.parametrize("calibration", [None, CALIBRATION])
def test_own_function_chooses(calibration: Any) -> None:
    """With text or without; what it scores highest stays."""
    read: list[int] = []

    def last_best(model: Any, batches: Any) -> dict[str, Tensor]:
        read.append(sum(len(batch) for batch in batches))
        return {g.name: torch.arange(g.count).float() for g in describe(model).groups()}

    model = tiny("qwen3")
    gates = [layer.mlp.gate_proj.weight[12:].clone() for layer in model.model.layers]
    method = llm_pruner(target="channels=28", criterion=last_best)
    assert not method.reads_text
    cut = method.cut(model, calibration)
    assert read == [0 if calibration is None else 6]
    for layer, left in zip(cut.model.layers, gates, strict=True):
        assert torch.equal(layer.mlp.gate_proj.weight, left)


@pytest.mark.parametrize("criterion", ["taylor", "taylor-mixed", "activation", "magnitude"])
def test_the_best_by_the_criterion_stay(criterion: str) -> None:
    model = tiny("qwen3")
    scores = score(tiny("qwen3"), [torch.cat(CALIBRATION)[:6]], criterion)
    kept = scores["block1_channels"].topk(12).indices.sort().values
    rows = model.model.layers[1].mlp.gate_proj.weight[kept].clone()
    pruned = llm_pruner(criterion=criterion).prepare(model, CALIBRATION)
    assert torch.equal(describe(pruned).blocks[1].reads[1].linears[0].base_layer.weight, rows)
    assert [group.count for group in describe(pruned).groups()] == [1, 12, 1, 12]


def tuned_in_two_parts(make: Callable[[], Any], calibration: list[Tensor] | None, tmp_path: Path) -> None:
    """A run that is stopped, and resumed by a fresh method and `calibration`, ends bit for bit as one that was not; and
    what was tuned is what is exported."""
    options: dict[str, Any] = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "save_every": 100}
    results = []
    for stopped in (False, True):
        method = make()
        model = method.prepare(tiny("llama", False, torch.float32), CALIBRATION)
        folder = tmp_path / str(stopped)
        if stopped:
            with pytest.raises(InterruptedTraining):
                tune(model, windows(), folder, callbacks=[*method.callbacks(), At(3)], **options)
            method = make()
            model = method.prepare(tiny("llama", False, torch.float32), calibration, resume=folder / "checkpoint-3")
        tune(model, windows(), folder, callbacks=method.callbacks(), **options)
        trained = logits(model)
        final = method.finalize(model)
        torch.testing.assert_close(logits(final), trained, **FP32)
        results.append(final.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_tuned_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    """Resumed without calibration: the checkpoint has the plan."""
    tuned_in_two_parts(lambda: llm_pruner(lora_dropout=0.1), None, tmp_path)
    for other, target in ((tiny("llama"), "heads=1,channels=16"), (wide(), "heads=1,channels=12")):
        with pytest.raises(ValueError, match="of a run with another target"):
            llm_pruner(target=target).prepare(other, resume=tmp_path / "True" / "checkpoint-3")


def test_target_of_parameters() -> None:
    model = wide()
    dense = parameter_counts(model)["total"]
    method = llm_pruner(target="params=0.6", round_to=4)
    final = method.finalize(method.prepare(model, CALIBRATION))
    assert 0 <= 0.6 * dense - parameter_counts(final)["total"] < 4 * 3 * 64 * 3


def test_bad_input() -> None:
    for options, message in (
        ({"criterion": "best"}, "criterion is 'best'"),
        ({"samples": 0}, "samples is 0"),
        ({"target": "layers=1"}, "expected heads and channels"),
    ):
        with pytest.raises(ValueError, match=message):
            llm_pruner(**options)
    with pytest.raises(ValueError, match="it reads text, and there is none"):
        llm_pruner().prepare(tiny("llama"))
    ids = CALIBRATION[0]
    for calibration, message in (
        ([ids, ids[:, :5]], r"calibration: batches of \[5, \d+\] tokens; expected one length"),
        ([ids[0]], r"calibration: expected int64 or int32 token ids \[B, T\]"),
        ([ids + 61], "calibration: .* from 0 to 60, "),
    ):
        with pytest.raises(ValueError, match=message):
            llm_pruner().prepare(tiny("llama"), calibration)
