"""BESA's ops beside their byte floor, and SparseGPT's solve beside plain torch.

    python benchmarks/bench_besa_ops.py --threads 2 --save

`rank_mask` and `rank_bucket_grad` move 6 bytes a 16-bit weight (10 an fp32 one); the floor is that at the bandwidth of
torch's copy of the same weight into memory that is already mapped. The kernels are timed likewise, into mapped memory;
"op" is `ops.rank_mask` with the allocation of its result, and "clone" what torch needs for a copy with one. The solve
is timed against the reference. The contenders take turns, and every result is checked before it is timed.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from statistics import median, quantiles

import torch
from results import Row, append

from pyprune import _native, ops
from pyprune._cpu.common import DTYPE_CODES

STEPS = 100  # candidate rates of BESA, less one

Contenders = dict[str, Callable[[], object]]


def measure(contenders: Contenders, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Milliseconds per call, sorted; the contenders take turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, step in contenders.items():
            start = clock()
            step()
            if turn:
                times[name].append((clock() - start) * 1e3)
    return {name: sorted(values) for name, values in times.items()}


def report(name: str, case: str, times: dict[str, list[float]], base: str, unit: str) -> list[Row]:
    """Prints a table of ratios to `base` and returns its rows."""
    print(f"\n{name}, {case}")
    rows = []
    for provider, values in times.items():
        p20, p80, p50 = quantiles(values, n=5)[0], quantiles(values, n=5)[3], median(values)
        print(f"  {provider:10} {p50:9.2f} ms   {p50 / median(times[base]):5.2f} of {base}   ({p20:.2f} to {p80:.2f})")
        rows.append(Row(name, case, provider, unit, p20, p50, p80))
    return rows


def rank_ops(rows: int, columns: int, dtype: torch.dtype, rounds: int, clock: Callable, unit: str) -> list[Row]:
    """Both ops at half of the weights."""
    weight, grad = torch.randn(rows, columns).to(dtype), torch.randn(rows, columns).to(dtype)
    rank = torch.rand(rows, columns).argsort(1).to(torch.uint16)
    threshold = torch.full((rows,), columns // 2, dtype=torch.int32)
    masked, sums = torch.zeros_like(weight), torch.zeros(rows, STEPS + 1)
    shape, threads, code = (rows, columns), torch.get_num_threads(), DTYPE_CODES[dtype]

    def mask() -> None:
        addresses = [t.data_ptr() for t in (weight, rank, threshold, masked)]
        _native.cpu.rank_mask(code, *shape, *addresses, threads)

    def gradient() -> None:
        addresses = [t.data_ptr() for t in (grad, weight, rank, sums)]
        _native.cpu.rank_bucket_grad(code, *shape, STEPS, *addresses, threads)

    mask(), gradient()
    with ops.using("reference"):
        assert torch.equal(masked, ops.rank_mask(weight, rank, threshold))
        few = slice(0, 64)
        exact = ops.rank_bucket_grad(grad[few].double(), weight[few].double(), rank[few], STEPS)
        assert (sums[few] - exact).norm() < 1e-5 * exact.norm()
    target, case = torch.zeros_like(weight), f"{rows}x{columns} {str(dtype).removeprefix('torch.')}"
    moved = (2 * dtype.itemsize + 2) / (2 * dtype.itemsize)  # by either op, in copies of the weight
    copy: Contenders = {"copy": lambda: target.copy_(weight)}
    allocating: Contenders = {"op": lambda: ops.rank_mask(weight, rank, threshold), "clone": weight.clone}
    saved = []
    for name, contenders in {
        "rank_mask": {"kernel": mask} | copy | allocating,
        "rank_bucket_grad": {"kernel": gradient} | copy,
    }.items():
        times = measure(contenders, rounds, clock)
        times["floor"] = [value * moved for value in times["copy"]]
        saved += report(name, case, times, "floor", unit)
    return saved


def solve(size: int, rounds: int, clock: Callable, unit: str) -> list[Row]:
    """SparseGPT's solve of a square linear at 50 % and 2:4, fp32."""
    x = torch.randn(2 * size, size) * (torch.rand(size) + 0.1)
    hessian = x.T @ x / size
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    weight, drop = torch.randn(size, size), size * size // 2
    saved = []
    for name, pattern in {"50 %": {}, "2:4": {"n": 2, "m": 4}}.items():

        def run(pattern: dict[str, int] = pattern) -> tuple[torch.Tensor, ...]:
            return ops.sparsegpt_solve(weight, factor, drop, **pattern)

        def reference(run: Callable = run) -> object:
            with ops.using("reference"):
                return run()

        losses = [float(result()[2]) for result in (run, reference)]  # type: ignore[index]
        assert abs(losses[0] - losses[1]) < 1e-4 * losses[1], losses
        times = measure({"kernel": run, "reference": reference}, rounds, clock)
        saved += report("sparsegpt_solve", f"{size}x{size} {name} float32", times, "reference", unit)
    return saved


def main() -> None:
    """Runs all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=11008)
    parser.add_argument("--size", type=int, default=2048, help="of the linear that SparseGPT solves")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for one thread on a busy machine")
    parser.add_argument("--save", action="store_true", help="append to results.csv")
    arguments = parser.parse_args()
    if _native.cpu is None:
        raise SystemExit(f"no compiled module: {_native.why_missing}")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    unit = "ms CPU time" if arguments.cpu_time else "ms"
    print(f"{arguments.threads} threads, load {os.getloadavg()[0]:.1f}, {unit}")
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        rows += rank_ops(arguments.rows, arguments.columns, dtype, arguments.rounds, clock, unit)
    rows += solve(arguments.size, max(2, arguments.rounds // 3), clock, unit)
    if arguments.save:
        append(rows)


if __name__ == "__main__":
    main()
