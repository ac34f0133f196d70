"""Models of known shapes with random weights, the work that a step of one does, and what a benchmark checks them by."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import pyprune.ops  # noqa: F401  (registers torch.ops.pyprune)
from pyprune import data, timing
from pyprune.models import open_model, open_tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama-2048": {  # TinyLlama-1.1B, of whose 22 blocks these are 4
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "toy": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "tie_word_embeddings": True,
    },
}


def build(shape: str, dtype: torch.dtype, **changes: Any) -> LlamaForCausalLM:
    """A stock Llama of a shape in `SHAPES`, the same weights at every call; `changes` are config fields."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**SHAPES[shape], "max_position_embeddings": 8192, **changes})
    return LlamaForCausalLM(config).to(dtype)


def batch_of(shape: str, tokens: int, window: int) -> Tensor:
    """Random ids [tokens / window, window] of a model in `SHAPES`, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(SHAPES[shape]["vocab_size"], (tokens // window, window), generator=generator)


def real_model(folder: Path | None, window: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The demo's model, or that of a checkpoint, in fp32, with the demo's text: ids to train on and ids held out, each
    [windows, window], on the model's device."""
    with TemporaryDirectory() as scratch:
        folder = folder or data.demo_model(Path(scratch, "model"))
        model, tokenizer = open_model(folder, "float32").eval(), open_tokenizer(folder)
    corpus = data.demo_text()
    train, held_out = (data.encode(text, tokenizer).windows(window).ids for text in (corpus.train, corpus.held_out))
    device = next(model.parameters()).device
    return model, train.to(device), held_out.to(device)


def conditions(threads: int) -> str:
    """What a reader must know of the machine, as it is now."""
    busy = "; others are at work here, so wall times are not to be trusted" if timing.busy(threads) else ""
    return f"{threads} threads, {os.cpu_count()} cores, load {timing.load():.1f}, torch {torch.__version__}{busy}"


# ------------------------------------------------------------------------------------------------------------- limits


def floating_point_operations(step: Callable[[], object]) -> int:
    """How many a step's matrix products and attention do, counted while it runs. All else costs bytes, not products."""
    ours, aten = torch.ops.pyprune, torch.ops.aten
    forward = (
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention,
    )
    counts = {
        ours.hsm: lambda x, l0, v, l1, *_, **__: 2 * x[0] * l0[0] * (x[1] + l1[0]),
        ours.hsm_backward: lambda grad, x, h, l0, v, l1, *_, **__: 4 * x[0] * l0[0] * (x[1] + l1[0]),
        aten.addmm_: lambda total, left, right, *_, **__: 2 * left[0] * left[1] * right[1],
        **dict.fromkeys(forward, lambda q, k, *_, **__: _attention(q, k)),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, *_, **__: (
            2.5 * _attention(q, k)  # five products instead of two
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=counts) as counter:
        step()
    return int(counter.get_total_flops())


def _attention(query: torch.Size, key: torch.Size) -> float:
    """Two products, q k^T and the weighted sum of the values, of which the causal mask leaves half."""
    return 2 * prod(query) * key[-2]


# ------------------------------------------------------------------------------------------------------- verification


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Without dropout, in fp64."""
    training = model.training
    found = model.eval()(input_ids=ids, use_cache=False).logits.double()
    model.train(training)
    return found


def check_equal(what: str, found: Tensor, expected: Tensor, dtype: torch.dtype, layers: int) -> None:
    """Ends the benchmark when logits differ by more than roundings, in the norm: 1e-4 in fp32, in bf16 eight units in
    the last place, or 2.5 times the root of the layers, whose roundings add up like the steps of a random walk (32
    layers of a 7B shape: 10.5 measured, 14 allowed). A fault in a cut (a channel, a gain, a sign) is of the order of
    one."""
    error = ((found - expected).norm() / expected.norm()).item()
    allowed = 1e-4 if dtype == torch.float32 else max(8.0, 2.5 * layers**0.5) * torch.finfo(dtype).eps
    if not error < allowed:
        raise SystemExit(f"{what}: the logits differ by {error:.1e}, more than {allowed:.1e}: nothing was measured")
    print(f"  checked: {what}, logits within {error:.1e} (allowed {allowed:.1e})")


@contextmanager
def masked(model: nn.Module, keep: Tensor) -> Iterator[nn.Module]:
    """The model with all channels but `keep` of its residual stream set to zero."""
    from pyprune.architectures import describe

    decoder = describe(model)
    like = next(model.parameters())
    mask = torch.zeros(decoder.hidden_size, dtype=like.dtype, device=like.device)
    mask[keep] = 1
    hooks = [
        writer.register_forward_hook(lambda module, args, output: output * mask)
        for writer in decoder.writers().values()
    ]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()
