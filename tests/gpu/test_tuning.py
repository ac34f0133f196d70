"""PAT, LoRAPrune and AST on a GPU: trained there and exported, as on the CPU; and packed models that generate there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from checkpoint.packed_models import llama
from methods import test_ast, test_loraprune, test_pat
from methods.test_pat import calibration, logits
from surgery.tiny_decoders import tiny
from torch import nn
from transformers import AutoModelForCausalLM

import pyprune
from pyprune.checkpoint import save, save_dense
from pyprune.models import open_model
from pyprune.surgery import export

pytestmark = pytest.mark.gpu

Trained = tuple[list[float], torch.Tensor]


class Method(NamedTuple):
    """A method of tests/methods, and how it is trained there."""

    make: Callable[[], Any]
    train: Callable[..., list[dict[str, Any]]]

    def prepared(self, device: str) -> tuple[Any, nn.Module]:
        """The method, and a small model on its device."""
        method = self.make()
        return method, method.prepare(tiny("llama", False, torch.float32).to(device), calibration())


METHODS = {
    "PAT": Method(lambda: test_pat.pat("pca"), test_pat.train),
    "LoRAPrune": Method(lambda: test_loraprune.loraprune(milestones=2), test_loraprune.train),
    "AST": Method(test_ast.ast, test_ast.train),
}

# The identity loss is a norm, whose gradient at the orthonormal start is a direction that rounding chooses: on a CPU
# too the logits of two starts that differ by 6e-8 end 0.03 apart with it, 6e-6 without.
COMPARED = METHODS | {"PAT": Method(lambda: test_pat.pat("pca", identity_weight=0.0), test_pat.train)}


def trained(name: str, device: str, folder: Path) -> Trained:
    """Losses of all steps and the logits of what was exported. The model begins on the CPU; the trainer moves it."""
    folder.mkdir()
    method, model = COMPARED[name].prepared("cpu")
    metrics = COMPARED[name].train(method, model, folder / "run", steps=12, use_cpu=device == "cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    final = method.finalize(model)
    found = logits(final.cpu())
    (save_dense if name == "AST" else export)(final, None, folder / "model")
    torch.testing.assert_close(logits(open_model(folder / "model").cpu()), found, rtol=1e-5, atol=1e-5)
    return [line["loss"] for line in metrics], found


@pytest.mark.parametrize("name", METHODS)
def test_ends_as_on_the_cpu(name: str, device: torch.device, tmp_path: Path) -> None:
    """In fp32, whose sums the GPU takes in another order, of which Adam makes more: the first loss, before any step,
    holds what a wrong kernel would change; the others drift apart, by 1.5e-4 after
    eleven steps of PAT on an H100, its identity loss included; allowed is twice that."""
    losses, ours = trained(name, "cuda", tmp_path / "gpu")
    right, theirs = trained(name, "cpu", tmp_path / "cpu")
    assert losses[0] == pytest.approx(right[0], rel=1e-5)
    assert losses == pytest.approx(right, rel=3e-4) and losses[-1] != losses[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3)


@pytest.mark.parametrize("name", METHODS)
def test_trains_under_autocast_from_a_model_on_the_gpu(name: str, device: torch.device, tmp_path: Path) -> None:
    """bf16; in two dozen steps the loss falls, and what is exported has one."""
    method, model = METHODS[name].prepared("cuda")
    losses = [line["loss"] for line in METHODS[name].train(method, model, tmp_path / "run", steps=24, bf16=True)]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert logits(method.finalize(model).cpu()).isfinite().all()


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_a_packed_model_generates_the_dense_ones_tokens(pattern: str, device: torch.device, tmp_path: Path) -> None:
    """Greedy, in fp32: one token at a time through the kernels for few tokens, the prompt through those for more."""
    model = llama(pattern, torch.float32)
    save(model, None, tmp_path / "packed")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map=device)
    sparsified = copy.deepcopy(model).to(device)
    pyprune.sparsify(sparsified, measure=False)
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1)).to(device)

    def tokens(found: Any) -> torch.Tensor:
        return found.generate(ids, max_new_tokens=16, do_sample=False, attention_mask=torch.ones_like(ids))

    right = tokens(model.to(device))
    assert torch.equal(tokens(packed), right) and torch.equal(tokens(sparsified), right)
