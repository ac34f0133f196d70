"""Linears on packed weights against `torch.nn.functional.linear` on the dense one, and packing, with the limits beside.

    python benchmarks/bench_sparse_gemm.py --threads 2 --save

Weights are cold: every contender walks through copies of its own that exceed the last-level cache together. Contenders
take turns within one process and are checked against fp64 first. The limit is the ratio of the bytes of the weights; a
dense linear that does not reach the memory's bandwidth can be beaten by more. --cpu-time counts processor time, for one
thread on a busy machine.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from statistics import median, quantiles

import torch
from results import Row, append
from torch import Tensor
from torch.nn.functional import linear

from pyprune import ops

SHAPES = {
    "4096x11008": (4096, 11008),
    "llama-1b qkv": (3072, 2048),
    "llama-1b gate_up": (16384, 2048),
    "llama-1b down": (2048, 8192),
    "llama-8b o": (4096, 4096),
    "llama-8b down": (4096, 14336),
}
COLD_BYTES = 160 * 1024 * 1024
"""What a contender's copies hold together; five times the last-level cache of the machine this was written on."""

Run = Callable[[int], object]


def bytes_of(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def copies(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """As many copies as make the weight cold."""
    return [tuple(t.clone() for t in tensors) for _ in range(max(2, -(-COLD_BYTES // bytes_of(tensors))))]


def weights(outputs: int, inputs: int) -> dict[str, tuple[Tensor, list[tuple[Tensor, ...]]]]:
    """For each contender its dense weight and copies of its tensors."""
    dense = torch.randn(outputs, inputs).bfloat16()
    found = {"dense": (dense, copies((dense,)))}
    for sparsity in (0.5, 0.7):
        part = dense * (torch.rand(outputs, inputs) >= sparsity)
        found[f"bitmap {sparsity:.0%}"] = (part, copies(ops.bitmap_pack(part)))
    bits, _ = ops.nm_prune(dense.abs(), 2, 4)
    part = ops.masked_weight(dense, bits)
    found["nm 2:4"] = (part, copies(ops.nm_compress(part, 2, 4)))
    found["masked"] = (part, copies((dense, bits)))
    return found


def product(name: str, x: Tensor, tensors: tuple[Tensor, ...], shape: tuple[int, int]) -> Tensor:
    """One contender's linear."""
    if name == "dense":
        return linear(x, *tensors)
    if name == "masked":
        return ops.masked_linear(x, *tensors)
    return ops.nm_linear(x, *tensors, 2, 4) if name == "nm 2:4" else ops.bitmap_linear(x, *tensors, *shape)


def measure(runs: dict[str, tuple[Run, int]], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Milliseconds per call, sorted; in every round each contender goes once through its copies."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, (run, count) in runs.items():
            start = clock()
            for index in range(count):
                run(index)
            if turn:
                times[name].append((clock() - start) * 1e3 / count)
    return {name: sorted(values) for name, values in times.items()}


def check(name: str, y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Within a few roundings of fp64, in the norm."""
    exact = x.double() @ weight.double().T
    error = ((y.double() - exact).norm() / exact.norm()).item()
    if not error < 4 * torch.finfo(x.dtype).eps:
        raise SystemExit(f"{name} is off by {error:.1e}")


def report(benchmark: str, case: str, times: dict[str, list[float]], limits: dict[str, float], unit: str) -> list[Row]:
    """Prints and returns a row for each contender; ratios are against the first one."""
    base = next(iter(times))
    print(f"\n{benchmark}, {case}")
    rows = []
    for name, values in times.items():
        p20, _, _, p80 = quantiles(values, n=5)
        limit = f"   limit {limits[name]:.2f}x" if name in limits else ""
        print(
            f"  {name:11} {median(values):8.3f} ms   {median(times[base]) / median(values):5.2f}x {base}{limit}",
            flush=True,
        )
        rows.append(Row(benchmark, case, name, unit, p20, median(values), p80))
    return rows


def bench_linears(label: str, tokens: list[int], rounds: int, clock: Callable[[], float], unit: str) -> list[Row]:
    """All contenders at one shape."""
    shape, rows = SHAPES[label], []
    table = weights(*shape)
    sizes = {name: bytes_of(sets[0]) for name, (_, sets) in table.items()}
    for count in tokens:
        x = torch.randn(count, shape[1]).bfloat16()
        runs: dict[str, tuple[Run, int]] = {}
        with torch.inference_mode():
            for name, (weight, sets) in table.items():
                check(name, product(name, x, sets[0], shape), x, weight)
                runs[name] = (lambda i, name=name, x=x, sets=sets: product(name, x, sets[i], shape), len(sets))
            times = measure(runs, rounds, clock)
        limits = {name: sizes["dense"] / size for name, size in sizes.items() if name != "dense"}
        rows += report("sparse linear", f"{label} T={count} bfloat16", times, limits, unit)
    return rows


def bench_packing(rounds: int, clock: Callable[[], float], unit: str) -> list[Row]:
    """The packing ops on one 4096 x 11008 weight at 50 %, against cloning it, which
    allocates its result too; limits are by bytes read and written."""
    outputs, inputs = SHAPES["4096x11008"]
    weight = torch.randn(outputs, inputs).bfloat16()
    bits, _ = ops.nm_prune(weight.abs(), 2, 4)
    half = ops.masked_weight(weight, bits)
    nm, bitmap = ops.nm_compress(half, 2, 4), ops.bitmap_pack(half)
    dense = bytes_of((weight,))
    moved = {
        "clone": 2 * dense,
        "nm_prune": dense + bytes_of((bits,)),
        "nm_compress": dense + bytes_of(nm),
        "nm_decompress": dense + bytes_of(nm),
        "bitmap_pack": 2 * dense + bytes_of(bitmap),
        "bitmap_unpack": dense + bytes_of(bitmap),
    }
    calls: dict[str, Run] = {
        "clone": lambda _: weight.clone(),
        "nm_prune": lambda _: ops.nm_prune(weight, 2, 4),
        "nm_compress": lambda _: ops.nm_compress(half, 2, 4),
        "nm_decompress": lambda _: ops.nm_decompress(*nm, 2, 4),
        "bitmap_pack": lambda _: ops.bitmap_pack(half),
        "bitmap_unpack": lambda _: ops.bitmap_unpack(*bitmap, outputs, inputs),
    }
    times = measure({name: (call, 1) for name, call in calls.items()}, rounds, clock)
    limits = {name: moved["clone"] / size for name, size in moved.items() if name != "clone"}
    return report("packing", "4096x11008 bfloat16", times, limits, unit)


def main() -> None:
    """Runs all shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for one thread on a busy machine")
    parser.add_argument("--save", action="store_true", help="append to results.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    unit = "ms CPU time" if arguments.cpu_time else "ms"
    print(f"{arguments.threads} threads, load {os.getloadavg()[0]:.1f}, {'CPU' if arguments.cpu_time else 'wall'} time")
    rows = bench_packing(arguments.rounds, clock, unit)
    for label in arguments.shapes:
        rows += bench_linears(label, arguments.tokens, arguments.rounds, clock, unit)
    if arguments.save:
        append(rows)


if __name__ == "__main__":
    main()
