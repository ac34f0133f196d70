"""`lora_group_score` against the same maths written in torch, with the time of reading the weight beside.

    python benchmarks/bench_lora_score.py --threads 2 --save
    python benchmarks/bench_lora_score.py --device cuda --save

Eager torch makes four temporaries of the weight's size in fp32, as the authors' code does; the reference makes them a
slab of rows at a time. The contenders take turns, and every result is checked against fp64 before it is timed.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles

import torch
from results import Row, append
from torch import Tensor

from pyprune import ops, reference

SCALE = 2.0
SHAPES = {"attention": (4096, 4096), "MLP": (11008, 4096)}  # of Llama-2-7B
Step = Callable[[], Tensor]


def eager(w: Tensor, a: Tensor, b: Tensor, ga: Tensor, gb: Tensor, dim: int) -> Tensor:
    """As the formula reads."""
    return ((gb @ a + b @ ga - gb @ ga) * (w.to(a.dtype) + SCALE * b @ a)).abs().sum(1 - dim)


def contenders(factors: list[Tensor], dim: int) -> dict[str, Step]:
    """What is timed; `limit` reads the weight once, as fast as torch can."""
    bits = factors[0].view(torch.int16 if factors[0].element_size() == 2 else torch.int32)
    return {
        "eager": lambda: eager(*factors, dim),
        "slabs": partial(reference.lora_group_score, *factors, SCALE, dim),
        "pyprune": partial(ops.lora_group_score, *factors, SCALE, dim),
        "limit": lambda: bits.max(),
    }


def check(steps: dict[str, Step], factors: list[Tensor], dim: int) -> None:
    """Every contender is right to 2^-12 of the largest score; on a GPU factors are split into bf16 pairs."""
    exact = eager(*(tensor.double() for tensor in factors), dim)
    for name, step in steps.items():
        if name != "limit":
            error = float((step() - exact).abs().max() / exact.max())
            if not error < 2**-12:
                raise SystemExit(f"{name} is off by {error:.1e} of the largest score")


def measure(steps: dict[str, Step], rounds: int, clock: Callable[[], float], device: str) -> dict[str, list[float]]:
    """Milliseconds per call; the contenders take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            start = clock()
            step()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn >= 2:
                times[name].append((clock() - start) * 1e3)
    return times


def main() -> None:
    """Measures what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="processor instead of wall time, on a busy machine")
    parser.add_argument("--save", action="store_true", help="append the rows to results.csv")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    clock, unit = (time.process_time, "ms CPU time") if a.cpu_time else (time.perf_counter, "ms")
    print(f"{a.device}, {a.threads} threads, load {os.getloadavg()[0]:.1f}")
    rows = []
    for name, (outputs, inputs) in SHAPES.items():
        shapes = ((a.rank, inputs), (outputs, a.rank), (a.rank, inputs), (outputs, a.rank))
        weight = (0.02 * torch.randn(outputs, inputs, device=a.device)).bfloat16()
        factors = [weight, *(0.1 * torch.randn(shape, device=a.device) for shape in shapes)]
        for dim in (0, 1):
            steps = contenders(factors, dim)
            check(steps, factors, dim)
            times = measure(steps, a.rounds, clock, a.device)
            case = f"{name} {outputs}x{inputs} r={a.rank} dim={dim} bfloat16"
            print(f"\n{case}")
            for provider, values in times.items():
                p20, p50, p80 = quantiles(values, n=5)[0], median(values), quantiles(values, n=5)[3]
                print(f"  {provider:8} {p50:9.2f} {unit}  {median(times['eager']) / p50:6.2f}x eager")
                rows.append(Row("lora_group_score", case, provider, unit, p20, p50, p80))
    if a.save:
        append(rows, a.device)


if __name__ == "__main__":
    main()
