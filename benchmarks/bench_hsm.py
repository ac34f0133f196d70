"""`hsm` and `hsm_residual_rmsnorm`, forward and backward, against eager torch and torch.compile, with the limit beside.

    python benchmarks/bench_hsm.py --threads 2 --save            or, on a GPU: --device cuda

The contenders take turns within one process, and every result is checked against fp64 before it is timed. The limit is
the time of torch's matrix products alone plus that of moving the op's large inputs and outputs once, both measured here
(where products and copies overlap, on a GPU, the longer of the two). On a GPU every contender is a CUDA graph, so that
its kernels are timed and not their launches; what fits the second-level cache is found there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from harness import Case, Contender, Samples, Session, options
from torch import Tensor

from pyprune import ops
from pyprune._cpu.hsm import _product
from pyprune.speed import hsm_inputs

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

    def wide(self) -> Problem:
        """The same in fp64."""
        inputs, grads = ([tensor.double() for tensor in tensors] for tensors in (self.inputs, self.grads))
        return replace(self, inputs=inputs, grads=grads)


def problems(tokens: int, hidden: int, rank: int, dtype: torch.dtype, device: str = "cpu") -> list[Problem]:
    """Both ops on random inputs of unit scale."""
    inputs = hsm_inputs(tokens, hidden, rank, dtype, torch.device(device))
    grads = [torch.randn_like(inputs[0]) for _ in range(2)]
    return [
        Problem("hsm", eager_hsm, ops.hsm, inputs[:5], grads[:1], 2, 3),
        Problem("hsm_residual_rmsnorm", eager_hsm_residual_rmsnorm, fused_hsm_residual_rmsnorm, inputs, grads, 4, 6),
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


def products_step(problem: Problem, backward: bool) -> Step:
    """The matrix products that the op cannot do without, each at full size, by torch's faster library."""
    x, l0, _, l1, _ = problem.inputs[:5]
    product = _product if x.device.type == "cpu" else lambda a, b: a @ b.T
    h, grad = product(x, l0), problem.grads[0]
    if backward:
        return lambda: [product(*pair) for pair in ((grad, l1.T), (h.T, x.T), (h.T, grad.T), (h, l0.T))]
    return lambda: [product(*pair) for pair in ((x, l0), (h, l1))]


def measure(problem: Problem, backward: bool, compiled: Callable[..., object] | None, session: Session) -> None:
    """One direction of one op."""
    make = backward_step if backward else forward_step
    functions = {"eager": problem.eager, "pyprune": problem.fused} | ({"compile": compiled} if compiled else {})
    x = problem.inputs[0]
    target = torch.empty_like(x)
    bounds = {"products": products_step(problem, backward), "copy": lambda: target.copy_(x)}
    case = Case(
        f"{problem.name} {'backward' if backward else 'forward'}",
        f"T={len(x)} d={x.shape[1]} r={len(problem.inputs[1])} {str(x.dtype).removeprefix('torch.')}",
        {name: Contender(make(function, problem)) for name, function in functions.items()},
        expected=make(problem.fused, problem.wide())(),  # type: ignore[arg-type]
        allowed=16 * torch.finfo(x.dtype).eps,
        bounds={name: Contender(step) for name, step in bounds.items()},
        unit="ms",
    )
    found = session.measure(case)
    copies = (problem.moved_backward if backward else problem.moved_forward) / 2
    both, pairs = max if x.is_cuda else sum, zip(found["products"].seconds, found.pop("copy").seconds, strict=True)
    found["limit"] = Samples(tuple(both((product, copies * copy)) for product, copy in pairs))
    session.report(case, found)


def main() -> None:
    """Runs all combinations."""
    parser = options(__doc__, rounds=25)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=104)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes most of the time"
    )
    arguments = parser.parse_args()
    session = Session(arguments)
    stream = torch.cuda.stream(torch.cuda.Stream()) if arguments.device == "cuda" else nullcontext()
    with stream:  # a graph's backward runs on the stream of its forward, which has to be the one that is captured
        for dtype in arguments.dtypes:
            for tokens in arguments.tokens:
                sizes = (tokens, arguments.hidden, arguments.rank)
                for problem in problems(*sizes, getattr(torch, dtype), arguments.device):
                    torch._dynamo.reset()
                    compiled = None if arguments.no_compile else torch.compile(problem.eager)
                    for backward in (False, True):
                        measure(problem, backward, compiled, session)


if __name__ == "__main__":
    main()
