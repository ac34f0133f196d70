"""What a call costs on the host: the ops at a size at which nothing but the call itself takes time.

    python benchmarks/bench_host.py --save          or: pytest benchmarks/bench_host.py

"direct" is the implementation without schema, checks, dispatch and autograd: the limit of what lies around it. Measured
by pytest-benchmark; every contender's result is checked before it is timed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_hsm import EPS, eager_hsm, eager_hsm_residual_rmsnorm, fused_hsm_residual_rmsnorm
from models import conditions, percentiles
from results import Row, append
from torch import Tensor

from pyprune import ops

TOKENS, HIDDEN, RANK = 1, 64, 4
EAGER = {"hsm": eager_hsm, "hsm_residual_rmsnorm": eager_hsm_residual_rmsnorm}
FUSED = {"hsm": ops.hsm, "hsm_residual_rmsnorm": fused_hsm_residual_rmsnorm}


def inputs(op: str) -> list[Tensor]:
    """Of unit scale, in fp32: x, l0, v, l1, mask, and for the longer op residual and weight."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, HIDDEN), (RANK, HIDDEN), (RANK,), (HIDDEN, RANK), (HIDDEN,), (TOKENS, HIDDEN), (HIDDEN,)]
    return [torch.randn(shape, generator=generator) for shape in shapes[: 5 if op == "hsm" else 7]]


def direct(op: str) -> Callable[..., object]:
    """The implementation's own function."""
    implementation, _ = ops.choose("hsm", torch.device("cpu"), torch.float32)
    function = getattr(implementation, op)
    return function if op == "hsm" else lambda *tensors: function(*tensors, EPS)


def first(result: Any) -> Tensor:
    """y, or the residual stream."""
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("provider", ["eager", "pyprune", "direct"])
@pytest.mark.parametrize("op", list(EAGER))
def test_forward(benchmark: Any, op: str, provider: str) -> None:
    """Without gradients, as inference calls it."""
    function = {"eager": EAGER[op], "pyprune": FUSED[op], "direct": direct(op)}[provider]
    tensors = inputs(op)
    with torch.no_grad():
        torch.testing.assert_close(first(function(*tensors)), first(EAGER[op](*tensors)))
        benchmark(function, *tensors)


@pytest.mark.parametrize("provider", ["eager", "pyprune"])
@pytest.mark.parametrize("op", list(EAGER))
def test_forward_and_backward(benchmark: Any, op: str, provider: str) -> None:
    """With the gradients of all inputs."""
    leaves = [tensor.requires_grad_() for tensor in inputs(op)]
    grad = torch.ones(TOKENS, HIDDEN)

    def step(function: Callable[..., object]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(first(function(*leaves)), leaves, grad, allow_unused=True)

    function = {"eager": EAGER[op], "pyprune": FUSED[op]}[provider]
    found, expected = step(function)[:5], step(EAGER[op])[:5]
    for result, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(result, reference)
    benchmark(step, function)


def main() -> None:
    """Runs the tests above, prints their medians, and keeps them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each measurement")
    parser.add_argument("--save", action="store_true", help="append to results.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(conditions(1))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["-q", "--no-header", "--benchmark-disable-gc", f"--benchmark-max-time={arguments.seconds}"]
        status = pytest.main([__file__, *options, "--benchmark-quiet", f"--benchmark-json={report}"])
        if status:
            raise SystemExit("a result is wrong, or a measurement failed: nothing was kept")
        found = json.loads(report.read_text())["benchmarks"]
    rows = []
    for entry in found:
        op, provider = entry["params"]["op"], entry["params"]["provider"]
        name = f"host {op} {entry['name'].removeprefix('test_').partition('[')[0].replace('_', ' ')}"
        p20, p50, p80 = percentiles([seconds * 1e6 for seconds in entry["stats"]["data"]])
        print(f"{name:46} {provider:8} {p50:8.1f} us   ({p20:.1f} to {p80:.1f})")
        rows.append(Row(name, f"T={TOKENS} d={HIDDEN} r={RANK} float32", provider, "us", p20, p50, p80))
    if arguments.save:
        append(rows)


if __name__ == "__main__":
    main()
