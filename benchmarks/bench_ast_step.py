"""AST's parts and its whole step: the fused optimiser, the mask refresh, a training step, peak memory.

    python benchmarks/bench_ast_step.py --threads 2 --save
    python benchmarks/bench_ast_step.py --threads 1 --cpu-time --save     on a machine where others are at work

The contenders take turns within one process, and results are checked before they are timed.

op       one step of `nm_adamw_` on one weight, against the same step in plain torch operations ("unfused"), torch's
         dense AdamW ("fused AdamW") and a copy of as many bytes ("copy"), which is what memory allows.
refresh  |W| and `nm_prune` with the count of flips over all linears, beside a step; masks are refreshed every ten.
step     student and teacher forward, backward, clipping, update and, every tenth step, masks; against the same with
         dense linears and torch's AdamW ("dense"), and against its matrix products alone plus that AdamW
         ("products + AdamW"). The batch is random, which changes no time.
memory   the peak of a step in a fresh process, above what the process holds without a model.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from bench_hsm import measure
from bench_ops import ADAMW, unfused
from models import SHAPES, build, conditions, percentiles
from results import Row, append
from torch import Tensor, nn

from pyprune import AST, ops
from pyprune.architectures import describe_blocks
from pyprune.distillation import Distillation, Weights
from pyprune.evaluation import peak_memory
from pyprune.optim import MaskedAdamW
from pyprune.reference.bits import pack_bits, unpack_bits

GOALS = {"bandwidth": 0.8, "unfused": 3.0, "refresh": 0.02, "step": 1.1}
MEBIBYTE = 1 << 20
REFRESH = 10
Clock = Callable[[], float]


# ------------------------------------------------------------------------------------------------------------- the op


def bench_op(shape: tuple[int, int], dtype: torch.dtype, rounds: int, clock: Clock) -> list[Row]:
    """One weight of a size that no cache holds."""
    case = f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}"
    weight, grad, kept = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.rand(shape) < 0.5
    m, v = torch.zeros(shape), torch.zeros(shape)
    ours, theirs = ([weight.clone(), grad, m.clone(), v.clone()] for _ in range(2))
    ops.nm_adamw_(*ours, pack_bits(kept), **ADAMW)
    unfused(*theirs, ~kept)
    torch.testing.assert_close(ours[0], theirs[0], rtol=2**-7, atol=1e-5)
    moved = weight.numel() * (3 * weight.element_size() + 16.125)
    source, target = (torch.ones(int(moved / 8)) for _ in range(2))
    dense = nn.Parameter(weight.clone())
    dense.grad = grad
    adamw = torch.optim.AdamW([dense], lr=1e-4, betas=(0.9, 0.95), fused=True)
    bits, pruned = pack_bits(kept), ~kept
    steps = {
        "copy": lambda: target.copy_(source),
        "pyprune": lambda: ops.nm_adamw_(*ours, bits, **ADAMW),
        "unfused": lambda: unfused(*theirs, pruned),
        "fused AdamW": adamw.step,
    }
    found = {name: percentiles(times) for name, times in measure(steps, rounds, clock).items()}
    rate = {name: moved / p50 / 1e6 for name, (_, p50, _) in found.items()}
    share, gain = found["copy"][1] / found["pyprune"][1], found["unfused"][1] / found["pyprune"][1]
    print(
        f"\nnm_adamw_ {case}: {found['pyprune'][1]:.2f} ms, {rate['pyprune']:.1f} GB/s, {share:.0%} of a copy's "
        f"{rate['copy']:.1f} (goal {GOALS['bandwidth']:.0%}); {gain:.1f}x plain torch (goal {GOALS['unfused']:.0f}x), "
        f"{found['fused AdamW'][1] / found['pyprune'][1]:.2f}x torch's fused dense AdamW"
    )
    return [Row("nm_adamw step", case, name, "ms", *values) for name, values in found.items()]


# ----------------------------------------------------------------------------------------------------------- the step


@dataclass(frozen=True)
class Case:
    """One model and batch."""

    shape: str
    layers: int | None
    dtype: str
    tokens: int
    window: int

    def __str__(self) -> str:
        layers = f" {self.layers} blocks" if self.layers else ""
        return f"{self.shape}{layers} {self.dtype} batch={self.tokens // self.window}x{self.window}"

    def model(self) -> nn.Module:
        """A stock model."""
        changes = {"num_hidden_layers": self.layers} if self.layers else {}
        return build(self.shape, getattr(torch, self.dtype), **changes)

    def ids(self) -> Tensor:
        """The batch."""
        vocabulary = SHAPES[self.shape]["vocab_size"]
        generator = torch.Generator().manual_seed(1)
        return torch.randint(vocabulary, (self.tokens // self.window, self.window), generator=generator)


class Tuning:
    """A model in training; `masked` or dense, with the same teacher and loss."""

    def __init__(self, case: Case, masked: bool) -> None:
        self.model, self.ids, self.masked, self.done = case.model(), case.ids(), masked, 0
        if masked:
            method = AST(refresh=REFRESH)
            self.model = method.prepare(self.model)
            self.tuning = method._prepared("bench")
            self.tuning.plan(1000)
            self.optimizer: torch.optim.Optimizer = MaskedAdamW(self.model.parameters(), self.tuning.masked(), lr=1e-5)
        else:
            teacher = copy.deepcopy(self.model)
            stacks = [describe_blocks(model).stack for model in (self.model, teacher)]
            self.distillation = Distillation(self.model, stacks[0], teacher, stacks[1], Weights(0.67, 0.33, 2.0))
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.model.train()

    def step(self) -> float:
        """One optimiser step; returns the loss."""
        if self.masked:
            self.tuning.begin(self.done, self.optimizer)
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        return loss.item()


def products(case: Case) -> Callable[[], None]:
    """The matrix products of a step, without anything around them: student forward, both of backward, teacher."""
    model, dtype = case.model(), getattr(torch, case.dtype)
    linears = [m for block in describe_blocks(model).blocks for m in block.module.modules() if isinstance(m, nn.Linear)]
    shapes = [tuple(linear.weight.shape) for linear in (*linears, model.get_output_embeddings())]
    weights = {shape: torch.randn(shape).to(dtype) for shape in shapes}
    inputs = {width: torch.randn(case.tokens, width).to(dtype) for shape in shapes for width in shape}

    def run() -> None:
        for out, into in shapes:
            weight, x, grad = weights[out, into], inputs[into], inputs[out]
            for _ in range(2):
                x @ weight.T
            grad @ weight
            grad.T @ x

    return run


def bench_step(case: Case, rounds: int, clock: Clock) -> list[Row]:
    """Time of the step and of the refresh within it."""
    print(f"\nAST step, {case}")
    tunings = {"AST": Tuning(case, True), "dense": Tuning(case, False)}
    fresh = AST(kl_weight=0.0)
    masked = fresh.prepare(case.model())
    with torch.no_grad():  # masked products are dense products with masked weights
        found = masked.eval()(tunings["AST"].ids[:1]).logits
        for layer in fresh._prepared("bench").masked():
            layer.weight.masked_fill_(~unpack_bits(layer.mask, layer.in_features), 0)
        stock = fresh.finalize(masked)
        torch.testing.assert_close(found, stock(tunings["AST"].ids[:1]).logits)
    del masked, stock
    tuning, adamw = tunings["AST"].tuning, tunings["dense"].optimizer
    parameters = list(tunings["dense"].model.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    gemms = products(case)

    def bound() -> None:
        gemms()
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        adamw.step()

    steps = {
        "AST": tunings["AST"].step,
        "dense": tunings["dense"].step,
        "products + AdamW": bound,
        "mask refresh": lambda: tuning.refresh(REFRESH),
    }
    times = {name: percentiles(values) for name, values in measure(steps, rounds, clock).items()}
    for name, (p20, p50, p80) in times.items():
        print(f"  {name:17} {p50:9.1f} ms   ({p20:.1f} to {p80:.1f})")
    step = times["AST"][1]
    share = times["mask refresh"][1] / REFRESH / step
    print(
        f"  AST takes {step / times['products + AdamW'][1]:.2f}x its products and a dense AdamW (goal "
        f"{GOALS['step']:.2f}x), {step / times['dense'][1]:.2f}x the same step on dense linears; masks, every "
        f"{REFRESH} steps, are {share:.1%} of it (goal {GOALS['refresh']:.0%})"
    )
    return [Row("ast step", str(case), name, "ms", *values) for name, values in times.items()]


# --------------------------------------------------------------------------------------------------------- its memory


def peak(case: Case, masked: bool, threads: int) -> tuple[float, float]:
    """MiB at most in a step, and of parameters, gradients, moments, masks and teacher; call it in a fresh process."""
    torch.set_num_threads(threads)
    with peak_memory() as empty:
        pass
    tuning = Tuning(case, masked)
    tuning.step()
    with peak_memory() as full:
        tuning.step()
    parameters = list(tuning.model.parameters())
    held = sum(p.numel() * (3 * p.element_size()) for p in parameters)  # with gradients and the teacher
    held += sum(x.nbytes for state in tuning.optimizer.state.values() for x in state.values() if isinstance(x, Tensor))
    held += sum(buffer.nbytes for name, buffer in tuning.model.named_buffers() if name.endswith("mask"))
    assert full.bytes is not None and empty.bytes is not None
    return (full.bytes - empty.bytes) / MEBIBYTE, held / MEBIBYTE


def bench_memory(case: Case, threads: int) -> list[Row]:
    """AST beside the dense step."""
    rows = []
    for name, masked in (("AST", True), ("dense", False)):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            total, held = pool.submit(peak, case, masked, threads).result()
        print(f"  {name:6} {total:8.0f} MiB at most, {held:.0f} of it parameters, gradients, moments, masks, teacher")
        rows += [Row("ast step memory", str(case), f"{name}{what}", "MiB", *[value] * 3) for what, value in
                 (("", total), (" held", held))]  # fmt: skip
    return rows


def main() -> None:
    """Runs all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2048", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="blocks of it (default: all)")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--tokens", type=int, default=1024, help="in a step")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--parts", nargs="+", default=["op", "step", "memory"], choices=["op", "step", "memory"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for one thread on a busy machine")
    parser.add_argument("--save", action="store_true", help="append to results.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    print(conditions(arguments.threads) + (", CPU time" if arguments.cpu_time else ", wall time"))
    rows: list[Row] = []
    for dtype in arguments.dtypes:
        case = Case(arguments.shape, arguments.layers, dtype, arguments.tokens, arguments.window)
        if "op" in arguments.parts:
            rows += bench_op((5632, 2048), getattr(torch, dtype), arguments.rounds, clock)
        if "step" in arguments.parts:
            rows += bench_step(case, arguments.rounds, clock)
        if "memory" in arguments.parts:
            rows += bench_memory(case, arguments.threads)
    if arguments.save:
        append(rows)


if __name__ == "__main__":
    main()
