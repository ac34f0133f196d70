"""First-token latency and tokens/s of whole models, dense against pruned; on a GPU at full 7B shapes, else at 1.1 B.

    python benchmarks/bench_serving.py --device cuda --save
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
from harness import Case, Contender, Session, options
from models import SHAPES, build, check_equal, floating_point_operations, logits, masked
from results import Row
from torch import Tensor, nn
from transformers import StaticCache

import pyprune
from pyprune import checkpoint, ops, surgery, timing
from pyprune.evaluation import latency, peak_memory, work
from pyprune.models import fast_dtype, open_model
from pyprune.timing import Samples

HIDDEN = {"-25% hidden": 0.25, "-30% hidden": 0.30, "-20% hidden": 0.20, "-50% hidden": 0.50}
VARIANTS = ("2:4", "50%", *HIDDEN, "70%")
MULTIPLE = 16  # of the channels that stay
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
    for batch, right in zip(ids, expected, strict=True):
        what = f"{variant} against the dense model with the same zeros, {batch.shape[1]} tokens"
        check_equal(what, logits(model, batch), right, model.dtype, model.config.num_hidden_layers)
    return model


def zero(model: nn.Module, variant: str) -> None:
    """Zeroes weights of all linears but the head: two of four, or a share."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            weight = module.weight.data
            if variant == "2:4":
                weight.copy_(ops.masked_weight(weight, ops.nm_prune(weight.abs(), 2, 4)[0]))
            else:
                weight.masked_fill_(torch.rand_like(weight, dtype=torch.float32) < float(variant[:-1]) / 100, 0)


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
    contenders = {side: Contender(decoding.step) for side, decoding in steps.items()}
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
    contenders = {side: Contender(lambda model=model: prompt_step(model, ids)) for side, model in sides.items()}
    label = f"{title} batch={batch} prompt={tokens}"
    return Case("first token", label, contenders, work(model)[1], least, dense.dtype), most / least


def compare(session: Session, case: Case, limit: float, tokens: int, aim: str) -> str:
    """Measures, prints the gain beside its limit, keeps the rows, and returns both; `tokens` of a call. The floor is
    one of the clock, so processor time has none."""
    found = session.measure(case)
    if "dense" not in found:
        raise SystemExit(f"{case.op}, {case.label}: the dense model: {case.skipped['dense']}")
    dense, mine = found["dense"], found["pyprune"]
    found["limit"] = Samples(tuple(seconds / limit for seconds in dense.seconds))
    if session.clock is time.perf_counter:
        least = timing.floor(case.bytes, case.operations, session.device, case.dtype)
        found["floor"] = Samples((least,))
    session.report(case, found)
    gain, beside = dense.p50 / mine.p50, f"limit {limit:.2f}x, {aim}" if aim else f"limit {limit:.2f}x"
    print(f"  {gain:.2f}x dense ({beside}), {tokens / dense.p50:.2f} -> {tokens / mine.p50:.2f} tokens/s")
    return f"{gain:.2f}x ({limit:.2f}x)"


def table(gains: dict[str, dict[str, str]]) -> str:
    """Markdown, of variant -> load -> gain."""
    columns = list(next(iter(gains.values()), {}))
    lines = [f"| gain over dense (limit) | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    return "\n".join([*lines, *(f"| {variant} | {' | '.join(cells.values())} |" for variant, cells in gains.items())])


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
    return [Row("generate memory", title, who, "MB", *[value / 1e6] * 3) for who, value in values.items()]


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
    """Runs all variants. One that computes something else is left out and named at the end, with an exit status; rows
    are kept at once, so that what was measured stays when a later variant crashes."""
    loads: dict[str, Any] = {"type": load, "nargs": "*", "metavar": "BATCHxTOKENS"}
    parser = options(__doc__, rounds=7)
    parser.add_argument("--shape", choices=SHAPES, help="default: llama-7b on a GPU, else llama-2048 with 22 layers")
    parser.add_argument("--layers", type=int, help="default: all of the shape's")
    parser.add_argument("--dtype", default=fast_dtype(), help="default: the one that is fastest here, %(default)s")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--prompts", help="default: 1x128, and on a GPU 1x2048 8x128", **loads)
    parser.add_argument("--decode", help="default: 1x128 8x128 1x1024, on a GPU 1x512 8x512 32x512 1x2048", **loads)
    parser.add_argument("--memory", action="store_true", help="measure it too (checkpoints in a temporary folder)")
    arguments = parser.parse_args()
    session = Session(arguments)
    gpu = session.device.type == "cuda"
    prompts = [(1, 128), (1, 2048), (8, 128)] if gpu else [(1, 128)]
    decoding = [(1, 512), (8, 512), (32, 512), (1, 2048)] if gpu else [(1, 128), (8, 128), (1, 1024)]
    prompts, decoding = (
        default if given is None else given
        for given, default in ((arguments.prompts, prompts), (arguments.decode, decoding))
    )
    shape = arguments.shape or ("llama-7b" if gpu else "llama-2048")
    layers = arguments.layers or (SHAPES[shape]["num_hidden_layers"] if gpu or arguments.shape else 22)
    with session.device:
        dense = build(shape, getattr(torch, arguments.dtype), num_hidden_layers=layers).eval()
    title = f"{shape} {layers} layers {arguments.dtype}"
    gains: dict[str, dict[str, str]] = {}
    wrong: list[str] = []
    if arguments.memory:
        session.keep(memory(dense, title, "dense"))
    for variant in arguments.variants:
        print(f"\n{title} {variant}", flush=True)
        try:
            model = pruned(dense, variant)
        except SystemExit as refusal:
            print(f"  left out: {refusal}", flush=True)
            wrong.append(str(refusal))
            continue
        cells = gains[variant] = {}
        sides = {"dense": dense, "pyprune": model}
        for make, wanted in ((decode, decoding), (first_token, prompts)):
            for batch, length in wanted:
                case, limit = make(sides, f"{title} {variant}", batch, length)
                aim = AIMS.get((case.op, variant), "") if batch == 1 else ""
                tokens = batch if make is decode else batch * length
                cells[f"{case.op}, {batch}x{length}"] = compare(session, case, limit, tokens, aim)
                del case  # with its caches
        if arguments.memory:
            session.keep(memory(model, f"{title} {variant}", "pyprune"))
        del model, sides
    print(f"\n{table(gains)}")
    if wrong:
        raise SystemExit("left out: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
