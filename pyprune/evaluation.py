"""How good, how large and how fast a model is: perplexity, parameter counts, latency, peak memory.

Every figure carries what it was measured with. Speed is only ever measured side by side: `latency` takes all models
at once and interleaves them, so that a busy machine slows all of them.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pyprune import timing
from pyprune.console import track

# -------------------------------------------------------------------------------------------------------- perplexity


@dataclass(frozen=True)
class Perplexity:
    """`value` = exp(`nll`), `nll` the mean negative log-likelihood in nats of `tokens` scored tokens."""

    value: float
    nll: float
    tokens: int
    window: int
    stride: int


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    token_ids: torch.Tensor,
    window: int = 512,
    stride: int | None = None,
    *,
    labels: torch.Tensor | None = None,
    bos: int | None = None,
    progress: bool = False,
) -> Perplexity:
    """Perplexity of a causal language model on one stream of tokens.

    A window reads `window` tokens and predicts, for each, the one behind it; windows begin `stride` tokens apart
    (default: `window`, no overlap) and score only what no earlier window has scored. So every token but the stream's
    first counts exactly once, seen from at least `window - stride + 1` tokens of context, save at the stream's begin.

    token_ids [N]; labels [N]: only tokens whose label is not negative count; bos: the token that opens every window,
    for models that expect one (the stream's first token is then scored too). Logits are scored in fp32 and summed
    in fp64.
    """
    if window < 1:
        raise ValueError(f"window is {window}; expected at least 1")
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"stride is {stride}; expected 1 to the window of {window}, so that no token is skipped")
    if token_ids.dim() != 1 or len(token_ids) < 2:
        raise ValueError(f"token_ids has shape {list(token_ids.shape)}; expected [N] with at least 2 tokens")
    skipped = 0 if bos is not None else 1
    targets = token_ids[skipped:].cpu()
    counted = torch.ones_like(targets, dtype=torch.bool) if labels is None else labels[skipped:].cpu() >= 0
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    with _evaluating(model):
        for begin, scored, end in track(_spans(len(targets), window, stride), progress, "perplexity"):
            first = token_ids[begin].item() if bos is None else bos
            inputs = torch.cat([targets.new_tensor([first]), targets[begin : end - 1]])
            logits = model(input_ids=inputs[None].to(device), use_cache=False).logits[0, scored - begin :]
            nll = F.cross_entropy(logits.float(), targets[scored:end].to(device), reduction="none").cpu()
            total += nll[counted[scored:end]].double().sum().item()
            tokens += int(counted[scored:end].sum())
    if tokens == 0:
        raise ValueError("labels leave no token to score; give a text with trained tokens")
    if math.isnan(total):
        raise ValueError("the model's logits are not numbers (NaN); check its weights, or load it in float32")
    nll_mean = total / tokens
    value = math.exp(nll_mean) if nll_mean < 700 else math.inf
    return Perplexity(value, nll_mean, tokens, window, stride)


def check_recipe(recipe: Any, **least: int) -> None:
    """Raises ValueError when a recipe cannot be measured with its `eval_window`, `eval_tokens`, `prompt_tokens` and
    `new_tokens`, or another field is below its `least`. None stands for a default."""
    for name, value in {**least, "eval_window": 2, "eval_tokens": 2, "prompt_tokens": 1, "new_tokens": 1}.items():
        if getattr(recipe, name) is not None and getattr(recipe, name) < value:
            raise ValueError(f"{name} is {getattr(recipe, name)}; expected at least {value}")
    if recipe.eval_tokens is not None and recipe.eval_tokens < recipe.eval_window:
        raise ValueError(
            f"eval_tokens is {recipe.eval_tokens}, fewer than one eval_window of {recipe.eval_window}; give more "
            "tokens or a smaller window"
        )


def _spans(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, first scored, end) of the windows over `length` targets."""
    spans: list[tuple[int, int, int]] = []
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        spans.append((begin, spans[-1][2] if spans else 0, end))
        if end == length:
            break
    return spans


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


# ----------------------------------------------------------------------------------------------------------- latency


@dataclass(frozen=True)
class Latency:
    """Medians in seconds: `prefill` for the whole prompt, `decode` for one token; every repeat in `*_all`."""

    prefill: float
    decode: float
    prefill_all: list[float] = field(repr=False)
    decode_all: list[float] = field(repr=False)


def latency(
    models: Mapping[str, nn.Module],
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    repeats: int = 5,
    *,
    batch: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Latency]:
    """Prefill and greedy decoding with a KV cache, all models in turn within every repeat, after one warm-up each.

    Prefill is one forward pass over `prompt_tokens` random tokens with the logits of the last one only, as
    `generate` does it; decoding is a plain loop, so that no part of `generate` itself is timed.
    """
    vocabulary = min(model.get_input_embeddings().num_embeddings for model in models.values())  # type: ignore[operator]
    prompt = torch.randint(vocabulary, (batch, prompt_tokens), generator=torch.Generator().manual_seed(seed))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with contextlib.ExitStack() as stack:
        for model in models.values():
            stack.enter_context(_evaluating(model))
        for repeat in track(range(repeats + 1), progress, "latency"):
            for name, model in models.items():
                measured = _generate(model, prompt, new_tokens)
                if repeat:  # the first round warms up
                    times[name].append(measured)
    return {name: _summary(measured) for name, measured in times.items()}


def _summary(measured: list[tuple[float, float]]) -> Latency:
    prefill, decode = [p for p, _ in measured], [d for _, d in measured]
    return Latency(statistics.median(prefill), statistics.median(decode), prefill, decode)


@torch.inference_mode()
def _generate(model: nn.Module, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """(seconds of the prefill, seconds per decoded token)."""
    from transformers import DynamicCache

    device = next(model.parameters()).device
    cache = DynamicCache()
    tokens = prompt.to(device)
    start = timing.now(device)
    logits = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    filled = timing.now(device)
    for _ in range(new_tokens):
        tokens = logits[:, -1:].argmax(-1)
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits
    return filled - start, (timing.now(device) - filled) / new_tokens


@dataclass(frozen=True)
class Speedup:
    """Dense over pruned time, and what the smaller weights alone would give: for a prefill, bound by arithmetic, the
    ratio of the blocks' parameters; for decoding, bound by reading weights, that of the bytes of blocks and head."""

    prefill: float
    decode: float
    prefill_limit: float
    decode_limit: float


def speedup(dense: nn.Module, pruned: nn.Module, measured: Mapping[str, Latency]) -> Speedup:
    """From `latency({"dense": dense, "pruned": pruned})`."""
    (parameters, nbytes), (parameters_pruned, nbytes_pruned) = work(dense), work(pruned)
    return Speedup(
        prefill=measured["dense"].prefill / measured["pruned"].prefill,
        decode=measured["dense"].decode / measured["pruned"].decode,
        prefill_limit=parameters / parameters_pruned,
        decode_limit=nbytes / nbytes_pruned,
    )


def work(model: nn.Module) -> tuple[int, int]:
    """(parameters of the blocks, bytes of blocks and head): what one token multiplies with, and what it reads. A packed
    weight is expanded for the many tokens of a prefill, so it counts as the dense one."""
    from pyprune.architectures import describe_blocks

    modules = [block.module for block in describe_blocks(model).blocks]
    read = [p for module in (*modules, model.get_output_embeddings()) for p in module.parameters()]  # type: ignore[operator]
    parts = [part for module in modules for part in module.modules()]
    return sum(map(_multiplied, parts)), sum(p.numel() * p.element_size() for p in read)


def _multiplied(part: nn.Module) -> int:
    """Parameters of a module itself, without its submodules'."""
    if isinstance(part, nn.Linear) and part.weight is None:  # packed
        return part.in_features * part.out_features + (0 if part.bias is None else part.bias.numel())
    return sum(p.numel() for p in part.parameters(recurse=False))


# ------------------------------------------------------------------------------------------------------------ memory


@dataclass
class PeakMemory:
    """Largest memory in use while the context was open, in bytes; None where the system does not tell."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[PeakMemory]:
    """The peak of the allocator on a CUDA device; on a CPU the peak resident set of the process (Linux)."""
    device = torch.device(device)
    peak = PeakMemory()
    gc.collect()  # what earlier work has left in cycles is none of this one's
    if device.type == "cuda":
        torch.cuda.init()  # else torch has no statistics to reset
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of the resident set
    yield peak
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        peak.bytes = 1024 * int(status.split("VmHWM:")[1].split()[0])
