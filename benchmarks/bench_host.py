"""What a call costs on the host: the ops at a size at which nothing but the call itself takes time.

    python benchmarks/bench_host.py --save

"direct" is the implementation without schema, checks, dispatch and autograd: the limit of what lies around it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench_hsm import EPS, eager_hsm, eager_hsm_residual_rmsnorm, fused_hsm_residual_rmsnorm
from harness import Case, Contender, Session, options
from torch import Tensor

from pyprune import ops
from pyprune.speed import hsm_inputs

TOKENS, HIDDEN, RANK = 1, 64, 4
CALLS = 200
"""In a round, on as many inputs, which fit the caches together: it is not memory that is measured."""
EAGER = {"hsm": eager_hsm, "hsm_residual_rmsnorm": eager_hsm_residual_rmsnorm}
FUSED = {"hsm": ops.hsm, "hsm_residual_rmsnorm": fused_hsm_residual_rmsnorm}


def inputs(op: str, gradients: bool) -> tuple[Tensor, ...]:
    """In fp32, the same at every call."""
    torch.manual_seed(0)
    found = hsm_inputs(TOKENS, HIDDEN, RANK, torch.float32, torch.device("cpu"))
    return tuple(tensor.requires_grad_(gradients) for tensor in found[: 5 if op == "hsm" else 7])


def direct(op: str) -> Callable[..., object]:
    """The implementation's own function."""
    implementation, _ = ops.choose("hsm", torch.device("cpu"), torch.float32)
    function = getattr(implementation, op)
    return function if op == "hsm" else lambda *tensors: function(*tensors, EPS)


def forward(function: Callable[..., object], *tensors: Tensor) -> Tensor:
    """Without gradients, as inference calls it; y, or the residual stream."""
    with torch.no_grad():
        return first(function(*tensors))


def forward_and_backward(function: Callable[..., object], *tensors: Tensor) -> tuple[Any, ...]:
    """The gradients of x, l0, v, l1 and mask."""
    result = first(function(*tensors))
    return torch.autograd.grad(result, tensors[:5], torch.ones_like(result))


def first(result: Any) -> Tensor:
    """Of several results."""
    return result[0] if isinstance(result, tuple) else result


def main() -> None:
    """Both ops, without gradients and with them."""
    session = Session(options(__doc__, rounds=25).parse_args())
    for step in (forward, forward_and_backward):
        for op in EAGER:
            functions = {"eager": EAGER[op], "pyprune": FUSED[op]}
            gradients = step is forward_and_backward
            functions |= {} if gradients else {"direct": direct(op)}
            make = partial(inputs, op, gradients)
            wide = (tensor.detach().double().requires_grad_(gradients) for tensor in make())
            session.run(
                Case(
                    f"host {op} {step.__name__.replace('_', ' ')}",
                    f"T={TOKENS} d={HIDDEN} r={RANK} float32",
                    {name: Contender(partial(step, function), make) for name, function in functions.items()},
                    expected=step(EAGER[op], *wide),
                    allowed=1e-5,
                    copies=CALLS,
                )
            )


if __name__ == "__main__":
    main()
