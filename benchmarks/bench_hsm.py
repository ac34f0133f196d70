"""`hsm` and `hsm_residual_rmsnorm`, forward and backward, against eager torch and torch.compile, with the limit beside.

    python benchmarks/bench_hsm.py --threads 2 --save            or, on a GPU: --device cuda

The contenders take turns within one process, and every result is checked against fp64 before it is timed. The limit is
the time of torch's matrix products alone plus that of moving the op's large inputs and outputs once, both measured here
(where products and copies overlap, on a GPU, the longer of the two). On a GPU every contender is a CUDA graph, so that
its kernels are timed and not their launches; what fits the second-level cache is found there.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from results import Row, append
from torch import Tensor

from pyprune import ops
from pyprune._cpu.hsm import _product

EPS = 1e-6
Step = Callable[[], object]


def eager_hsm(x: Tensor, l0: Tensor, v: Tensor, l1: Tensor, mask: Tensor) -> Tensor:
    """The op as one writes it in torch."""
    return mask.to(x.dtype) * (x + ((x @ l0.T) * v.to(x.dtype)) @ l1.T)


def eager_hsm_residual_rmsnorm(
    x: Tensor, l0: Tensor, v: Tensor, l1: Tensor, mask: Tensor, residual: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The op as a transformers decoder computes it: an addition, then its RMSNorm module's code."""
    residual_out = residual + eager_hsm(x, l0, v, l1, mask)
    wide = residual_out.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return residual_out, weight * wide.to(x.dtype)


def fused_hsm_residual_rmsnorm(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    return ops.hsm_residual_rmsnorm(*tensors, EPS)


@dataclass
class Problem:
    """One op at one size and dtype: its inputs, what arrives in backward, and how many T x d matrices move at least."""

    name: str
    eager: Callable[..., object]
    fused: Callable[..., object]
    inputs: list[Tensor]
    grads: list[Tensor]
    moved_forward: int
    moved_backward: int


def problems(tokens: int, hidden: int, rank: int, dtype: torch.dtype, device: str = "cpu") -> list[Problem]:
    """Both ops on random inputs of unit scale."""
    normal = lambda *shape: torch.randn(shape, device=device).to(dtype)  # noqa: E731
    x, residual, weight = normal(tokens, hidden), normal(tokens, hidden), normal(hidden)
    l0, l1 = normal(rank, hidden) / hidden**0.5, normal(hidden, rank) / rank**0.5
    mixing = [l0, torch.randn(rank, device=device), l1, torch.rand(hidden, device=device)]
    grads = [normal(tokens, hidden), normal(tokens, hidden)]
    norm = [x, *mixing, residual, weight]
    return [
        Problem("hsm", eager_hsm, ops.hsm, [x, *mixing], grads[:1], 2, 3),
        Problem("hsm_residual_rmsnorm", eager_hsm_residual_rmsnorm, fused_hsm_residual_rmsnorm, norm, grads, 4, 6),
    ]


def forward_step(function: Callable[..., object], problem: Problem) -> Step:
    """Runs a function on the inputs as inference does."""

    def step() -> object:
        with torch.no_grad():
            return function(*problem.inputs)

    return step


def backward_step(function: Callable[..., object], problem: Problem) -> Step:
    """The backward pass alone, for every input, over a graph that is built once."""
    leaves = [tensor.clone().requires_grad_() for tensor in problem.inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return lambda: torch.autograd.grad(outputs, leaves, problem.grads, retain_graph=True)


def check(problem: Problem, steps: dict[str, Step], exact: Step) -> None:
    """Every contender is within a few roundings of fp64, in the norm of each result."""
    as_tuple = lambda result: result if isinstance(result, tuple) else (result,)  # noqa: E731
    expected = as_tuple(exact())
    for name, step in steps.items():
        for result, reference in zip(as_tuple(step()), expected, strict=True):
            error = ((result.double() - reference).norm() / reference.norm()).item()
            allowed = 16 * torch.finfo(problem.inputs[0].dtype).eps
            if not error < allowed:
                raise SystemExit(f"{problem.name}: {name} is off by {error:.1e}, more than {allowed:.1e}")


def products_step(problem: Problem, backward: bool) -> Step:
    """The matrix products that the op cannot do without, each at full size, by torch's faster library."""
    x, l0, _, l1, _ = problem.inputs[:5]
    product = _product if x.device.type == "cpu" else lambda a, b: a @ b.T
    h, grad = product(x, l0), problem.grads[0]
    if backward:
        return lambda: [product(*pair) for pair in ((grad, l1.T), (h.T, x.T), (h.T, grad.T), (h, l0.T))]
    return lambda: [product(*pair) for pair in ((x, l0), (h, l1))]


def measure(steps: dict[str, Step], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Milliseconds per call, sorted; the contenders take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            start = clock()
            step()
            if turn >= 2:
                times[name].append((clock() - start) * 1e3)
    return {name: sorted(values) for name, values in times.items()}


def measure_graphs(steps: dict[str, Step], rounds: int, stream: torch.cuda.Stream) -> dict[str, list[float]]:
    """`measure` for steps that were made on `stream`: milliseconds on the GPU, of ten replays of each step's graph."""
    graphs = {}
    for name, step in steps.items():
        for _ in range(3):  # compiles, and allocates what it needs once
            step()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name], stream=stream):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(10):
                graph.replay()
            end.record()
            end.synchronize()
            if turn >= 2:
                times[name].append(start.elapsed_time(end) / 10)
    return {name: sorted(values) for name, values in times.items()}


def run(
    problem: Problem, backward: bool, compiled: Callable[..., object] | None, rounds: int, clock: Callable
) -> list[Row]:
    """Measures one direction of one op, prints its lines, and returns them."""
    make = backward_step if backward else forward_step
    functions = {"eager": problem.eager, "pyprune": problem.fused} | ({"compile": compiled} if compiled else {})
    steps = {name: make(function, problem) for name, function in functions.items()}
    exact = Problem(**{**vars(problem), "inputs": [t.double() for t in problem.inputs]})
    exact.grads = [grad.double() for grad in problem.grads]
    check(problem, steps, make(problem.fused, exact))
    x = problem.inputs[0]
    target = torch.empty_like(x)
    bounds = {"products": products_step(problem, backward), "copy": lambda: target.copy_(x)}
    on_gpu = x.device.type == "cuda"
    times = (
        measure_graphs(steps | bounds, rounds, torch.cuda.current_stream())
        if on_gpu
        else measure(steps | bounds, rounds, clock)
    )
    copies = (problem.moved_backward if backward else problem.moved_forward) / 2
    both = max if on_gpu else sum
    times["limit"] = [both((p, copies * c)) for p, c in zip(times["products"], times["copy"], strict=True)]

    tokens, hidden = x.shape
    name = f"{problem.name} {'backward' if backward else 'forward'}"
    case = f"T={tokens} d={hidden} r={len(problem.inputs[1])} {str(x.dtype).removeprefix('torch.')}"
    print(f"\n{name}, {case}")
    unit = "ms GPU time" if on_gpu else "ms CPU time" if clock is time.process_time else "ms"
    rows = []
    for provider in (*functions, "products", "limit"):
        p20, p80 = quantiles(times[provider], n=5)[0], quantiles(times[provider], n=5)[3]
        p50 = median(times[provider])
        print(f"  {provider:9} {p50:8.3f} ms   {median(times['eager']) / p50:5.2f}x eager   ({p20:.3f} to {p80:.3f})")
        rows.append(Row(name, case, provider, unit, p20, p50, p80))
    return rows


def main() -> None:
    """Runs all combinations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=104)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes most of the time"
    )
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for one thread on a busy machine")
    parser.add_argument("--save", action="store_true", help="append to results.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    print(f"{arguments.threads} threads, load {os.getloadavg()[0]:.1f}, {'CPU' if arguments.cpu_time else 'wall'} time")
    stream = torch.cuda.stream(torch.cuda.Stream()) if arguments.device == "cuda" else nullcontext()
    with stream:  # a graph's backward runs on the stream of its forward, which has to be the one that is captured
        for dtype in arguments.dtypes:
            for tokens in arguments.tokens:
                sizes = (tokens, arguments.hidden, arguments.rank)
                for problem in problems(*sizes, getattr(torch, dtype), arguments.device):
                    torch._dynamo.reset()
                    compiled = None if arguments.no_compile else torch.compile(problem.eager)
                    for backward in (False, True):
                        rows = run(problem, backward, compiled, arguments.rounds, clock)
                        if arguments.save:
                            append(rows, arguments.device)


if __name__ == "__main__":
    main()
