"""First-token latency and tokens/s of whole models, dense against pruned; on a GPU at full 7B shapes, else at 1.1 B.

    python benchmarks/bench_serving.py --save
    python benchmarks/bench_serving.py --variants 2:4 "-30% hidden" --prompts 1x128 8x128 --decode 1x512 --memory

Pruned is a share of the hidden channels gone (what PAT and SliceGPT export), half of every four weights (2:4), or 50 or
70 % of all weights at random places (bitmaps). Weights are random, which changes no time. Each variant takes turns with
the dense model, and before anything is timed its logits must be those of the dense model with the same channels masked
or the same weights zero.

A decoded token is one forward pass of one position per sequence over a full cache of fixed size, on a GPU one CUDA
graph, as a server runs it; its floor and the limit of its gain are the bytes of weights and cache that it reads. Those
of a prompt are the operations of its products and its attention, counted, where a packed weight counts as dense: it is
expanded. Memory is the peak of a process of its own that loads the checkpoint and decodes, less what it had before.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from bench_ops import thinned, two_four
from harness import Case, Contender, run
from models import SHAPES, build, check_equal, conditions, floating_point_operations, logits, masked
from results import Row, append
from torch import Tensor, nn
from transformers import StaticCache

import pyprune
from pyprune import checkpoint, surgery
from pyprune.evaluation import latency, peak_memory, work
from pyprune.models import fast_dtype, open_model

HIDDEN = {"-25% hidden": 0.25, "-30% hidden": 0.30, "-20% hidden": 0.20, "-50% hidden": 0.50}
VARIANTS = ("2:4", "50%", *HIDDEN, "70%")
MULTIPLE = 16  # of the channels that stay
MEMORY = "generate memory"
CHECKED = (8, 80)  # tokens: a packed weight is multiplied as it is for few, and expanded for many
AIMS = {
    ("first token", "-25% hidden"): "goal 1.28x at hidden size 2048",
    ("first token", "-30% hidden"): "1.33x in PAT's Figure 6",
    ("decode a token", "2:4"): "1.33x to 1.83x in AST's Table 6",
    ("decode a token", "50%"): "goal 1.4x",
}
"""Of batch 1."""

Sides = dict[str, Any]
"""The models that take turns: "dense" and "pyprune"."""


# ------------------------------------------------------------------------------------------------------------- variants


@torch.no_grad()
def pruned(dense: nn.Module, variant: str) -> nn.Module:
    """One of `VARIANTS` of a dense model, checked against it."""
    model: Any = copy.deepcopy(dense)
    device, vocabulary = next(model.parameters()).device, model.config.vocab_size
    ids = [torch.randint(vocabulary, (1, tokens), device=device) for tokens in CHECKED]
    if variant in HIDDEN:
        hidden = model.config.hidden_size
        keep = torch.arange(round((1 - HIDDEN[variant]) * hidden / MULTIPLE) * MULTIPLE)
        with masked(dense, keep):
            expected = [logits(dense, batch) for batch in ids]
        surgery.slice_hidden(model, keep)
    else:
        zero(model, variant)
        expected = [logits(model, batch) for batch in ids]
        pyprune.sparsify(model, measure=False)
    for batch, logits_ in zip(ids, expected, strict=True):
        what = f"{variant} against the dense model with the same zeros, {batch.shape[1]} tokens"
        check_equal(what, logits(model, batch), logits_, model.dtype)
    return model


def zero(model: nn.Module, variant: str) -> None:
    """Zeroes weights of all linears but the head: two of four, or a share."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            weight = module.weight.data
            weight.copy_(two_four(weight) if variant == "2:4" else thinned(weight, float(variant[:-1]) / 100))


# ---------------------------------------------------------------------------------------------------------------- loads


class Decoding:
    """Sequences in a cache of `context` positions; each step writes the last one and attends to all."""

    def __init__(self, model: Any, batch: int, context: int) -> None:
        device = next(model.parameters()).device
        self.model, self.cache = model, StaticCache(config=model.config, max_cache_len=context)
        self.token = torch.ones(batch, 1, dtype=torch.long, device=device)
        self.positions = torch.full((batch, 1), context - 1, device=device)
        self.mask = torch.ones(batch, 1, 1, context, dtype=torch.bool, device=device)
        self.step()  # allocates the cache

    @torch.inference_mode()
    def step(self) -> Tensor:
        for layer in self.cache.layers:
            layer.cumulative_length.zero_()  # not `reset`, which would also write the whole cache
        return self.model(
            input_ids=self.token,
            position_ids=self.positions,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
        ).logits

    def bytes(self) -> int:
        """What a step reads: blocks, head and cache."""
        return work(self.model)[1] + sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


def decode(sides: Sides, title: str, batch: int, context: int) -> tuple[Case, float]:
    """The case, and the limit of the gain."""
    steps = {side: Decoding(model, batch, context) for side, model in sides.items()}
    dense, least = (steps[side].bytes() for side in ("dense", "pyprune"))
    contenders = {side: Contender(decoding.step, lambda: ()) for side, decoding in steps.items()}
    label = f"{title} batch={batch} context={context}"
    return Case("decode a token", label, contenders, least, dtype=sides["dense"].dtype), dense / least


@torch.inference_mode()
def prompt_step(model: nn.Module, ids: Tensor) -> Tensor:
    """The first token of prompts [batch, tokens]."""
    return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits


def first_token(sides: Sides, title: str, batch: int, tokens: int) -> tuple[Case, float]:
    """The case, and the limit of the gain."""
    dense, model = sides["dense"], sides["pyprune"]
    ids = torch.randint(dense.config.vocab_size, (batch, tokens), device=dense.device)
    most = floating_point_operations(lambda: prompt_step(dense, ids))
    smaller = model.config.hidden_size < dense.config.hidden_size
    least = floating_point_operations(lambda: prompt_step(model, ids)) if smaller else most
    contenders = {
        side: Contender(lambda model=model: prompt_step(model, ids), lambda: ()) for side, model in sides.items()
    }
    label = f"{title} batch={batch} prompt={tokens}"
    return Case("first token", label, contenders, work(model)[1], least, dense.dtype), most / least


def gain(dense: Row, mine: Row, limit: float, tokens: int, aim: str) -> str:
    """What a case gave; `tokens` in a call."""
    before, after = (1e6 * tokens / row.p50 for row in (dense, mine))
    beside = f"limit {limit:.2f}x, {aim}" if aim else f"limit {limit:.2f}x"
    return f"  {dense.p50 / mine.p50:.2f}x dense ({beside}), {before:.2f} -> {after:.2f} tokens/s"


def table(rows: list[Row], title: str) -> str:
    """Markdown: each variant's gain over dense at each load, and what limits it."""
    cells: dict[str, dict[str, str]] = {}
    by_case: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row.benchmark != MEMORY:
            by_case.setdefault((row.benchmark, row.case), {})[row.provider] = row.p50
    for (op, case), p50 in by_case.items():
        variant, _, load = case.removeprefix(title + " ").partition(" batch=")
        gain, limit = p50["dense"] / p50["pyprune"], p50["dense"] / p50["limit"]
        cells.setdefault(variant, {})[f"{op}, batch={load}"] = f"{gain:.2f}x ({limit:.2f}x)"
    columns = list(next(iter(cells.values()), {}))
    lines = [f"| gain over dense (limit) | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(found.values())} |" for name, found in cells.items())])


# --------------------------------------------------------------------------------------------------------------- memory


def memory(model: nn.Module, title: str, provider: str) -> list[Row]:
    """Peak of a process that loads the model from a checkpoint, beside the bytes of its tensors, in MB."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(model, None, Path(folder) / "model")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(peak, str(Path(folder) / "model")).result()
    tensors = sum(parameter.nbytes for parameter in model.parameters())
    print(f"  {provider}: peak memory {found / 1e6:.0f} MB above the start, tensors {tensors / 1e6:.0f} MB")
    values = {provider: found, f"{provider} computed" if provider == "dense" else "computed": tensors}
    return [Row(MEMORY, title, who, "MB", *[value / 1e6] * 3) for who, value in values.items()]


def peak(folder: str) -> int:
    """Bytes that loading and decoding takes at most, in this process; call it in a fresh one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with peak_memory(device) as before:
        pass
    with peak_memory(device) as after:
        latency({"": open_model(folder)}, prompt_tokens=16, new_tokens=4, repeats=1)
    if before.bytes is None or after.bytes is None:
        raise SystemExit("this system does not tell a process's memory")
    return after.bytes - before.bytes


# ----------------------------------------------------------------------------------------------------------------- main


def load(text: str) -> tuple[int, int]:
    """(batch, tokens) of "8x512"."""
    batch, _, tokens = text.partition("x")
    if not (batch.isdigit() and tokens.isdigit() and int(batch) and int(tokens)):
        raise argparse.ArgumentTypeError(f"{text!r} is no load; expected BATCHxTOKENS, such as 8x512")
    return int(batch), int(tokens)


def main() -> None:
    """Runs all variants; rows are kept at once, so that what was measured stays when a later variant fails."""
    gpu = torch.cuda.is_available()
    prompts, decoding = ("1x128 1x2048 8x128", "1x512 8x512 32x512 1x2048") if gpu else ("1x128", "1x128 1x1024 8x128")
    loads: dict[str, Any] = {"type": load, "nargs": "*", "metavar": "BATCHxTOKENS"}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="default: llama-7b on a GPU, else llama-2048 with 22 layers")
    parser.add_argument("--layers", type=int, help="default: all of the shape's")
    parser.add_argument("--dtype", default=fast_dtype(), help="default: the one that is fastest here, %(default)s")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--prompts", default=[load(one) for one in prompts.split()], **loads)
    parser.add_argument("--decode", default=[load(one) for one in decoding.split()], **loads)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for one thread on a busy machine")
    parser.add_argument(
        "--memory", action="store_true", help="measure it too (writes checkpoints to a temporary folder)"
    )
    parser.add_argument("--save", action="store_true", help="append to results.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(conditions(arguments.threads))
    shape = arguments.shape or ("llama-7b" if gpu else "llama-2048")
    layers = arguments.layers or (SHAPES[shape]["num_hidden_layers"] if gpu or arguments.shape else 22)
    device = torch.device("cuda" if gpu else "cpu")
    with device:
        dense = build(shape, getattr(torch, arguments.dtype), num_hidden_layers=layers).eval()
    title = f"{shape} {layers} layers {arguments.dtype}"
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    kept: list[Row] = []

    def keep(rows: list[Row]) -> None:
        kept.extend(rows)
        if arguments.save:
            append(rows, device.type)

    if arguments.memory:
        keep(memory(dense, title, "dense"))
    for variant in arguments.variants:
        print(f"\n{title} {variant}", flush=True)
        model = pruned(dense, variant)
        sides = {"dense": dense, "pyprune": model}
        for make, wanted in ((decode, arguments.decode), (first_token, arguments.prompts)):
            for batch, tokens in wanted:
                case, limit = make(sides, f"{title} {variant}", batch, tokens)
                dense_row, mine, floor = run(case, device, arguments.rounds, clock)
                aim = AIMS.get((case.op, variant), "") if batch == 1 else ""
                print(gain(dense_row, mine, limit, batch if make is decode else batch * tokens, aim))
                at_best = (value / limit for value in (dense_row.p20, dense_row.p50, dense_row.p80))
                keep([dense_row, mine, Row(case.op, case.label, "limit", mine.unit, *at_best), floor])
                del case
        if arguments.memory:
            keep(memory(model, f"{title} {variant}", "pyprune"))
        del model, sides
    print(f"\n{table(kept, title)}")


if __name__ == "__main__":
    main()
