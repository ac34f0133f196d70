"""Benchmarks of training steps on a GPU, as far as that shows without one: what they measure by default, and that all
of a step is where the setting says. Tensors of the meta device stand for a GPU's."""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from pyprune.methods.lora import LoRA

META = torch.device("meta")


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices, as a GPU does; a copy, and scalars, may come from elsewhere."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [part for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor) and part.dim()]
        assert len({tensor.device for tensor in tensors}) <= 1 or "copy" in str(func), func
        return func(*args, **(kwargs or {}))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bench_pat_step, which the others take theirs from; a mask of packed sequences would be read back."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda *arguments, **more: None)
    module = importlib.import_module("bench_pat_step")
    arguments = module.TrainingArguments
    monkeypatch.setattr(module, "TrainingArguments", lambda *a, **more: arguments(*a, **more | {"use_cpu": True}))
    return module


def titles(steps: Any, device: str, *options: str) -> list[str]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    steps.step_options(parser)
    session = SimpleNamespace(device=torch.device(device))
    return [str(setting) for setting in steps.settings(parser.parse_args(options), session, "smollm2-135m")]


def test_a_gpu_gets_the_whole_shape_and_many_tokens(steps: Any) -> None:
    assert titles(steps, "cuda") == ["llama-2048 22 blocks bfloat16 batch=16x512"]
    assert titles(steps, "cuda", "--shapes", "smollm2-135m", "--window", "512") == [
        "smollm2-135m bfloat16 batch=16x512"
    ]
    assert titles(steps, "cpu") == [f"smollm2-135m {dtype} batch=4x256" for dtype in ("bfloat16", "float32")]
    assert titles(steps, "cpu", "--layers", "3", "--dtypes", "float32") == ["smollm2-135m 3 blocks float32 batch=4x256"]


def test_all_of_a_step_is_on_the_device(steps: Any) -> None:
    setting = steps.Setting("toy", "bfloat16", 32, 16, device=META)
    tuning = steps.Tuning(setting.model(), LoRA(lora_rank=4), setting.ids(), 100)
    assert {tensor.device for tensor in (*tuning.model.parameters(), *tuning.model.buffers(), tuning.ids)} == {META}
    with OneDevice():
        assert tuning.step().device == META
    for parameter in tuning.trained:
        state = tuning.optimizer.state[parameter]
        assert state["exp_avg"].device == META


def test_the_mask_of_pat_is_on_the_device(steps: Any) -> None:
    tuning = steps.contender(steps.PatSetting("toy", "bfloat16", 32, 16, device=META), "before", 0)
    with OneDevice():
        tuning.events.on_step_begin(*tuning.context)
        loss = tuning.model(input_ids=tuning.ids, labels=tuning.ids, use_cache=False).loss
        loss.backward()
    assert loss.device == tuning.method._prepared("test").selection.value.grad.device == META


def test_products_of_ast_are_on_the_device(steps: Any) -> None:
    run = importlib.import_module("bench_ast_step").products(steps.Setting("toy", "bfloat16", 32, 16, device=META))
    with OneDevice():
        run()


def test_attention_on_a_gpu_is_counted_as_whole_products(steps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six of them, instead of 2 and 5 of which the mask leaves half."""
    setting = steps.Setting("toy", "float32", 64, 16)
    tuning = steps.Tuning(setting.model(), LoRA(lora_rank=4), setting.ids(), 100)
    fused, plain = tuning.operations(), steps.plain_attention
    monkeypatch.setattr(steps, "plain_attention", lambda device: plain(META))
    blocks, product = 2, 2 * 64 * 16 * 64  # of tokens, window and heads
    assert tuning.operations() - fused == blocks * (6 - 7 / 2) * product


def test_a_gpu_is_asked_for_its_peak_in_this_process(steps: Any) -> None:
    for device, same in (("cuda", True), ("cpu", False)):
        setting = steps.Setting("toy", "float32", 32, 16, device=torch.device(device))
        assert (steps.alone(setting, process) == os.getpid()) == same


def process(setting: Any) -> int:
    return os.getpid()
