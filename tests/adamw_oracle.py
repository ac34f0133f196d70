"""The step of `nm_adamw_` written out from its definition, in fp64, for the tests of all implementations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyprune import ops
from pyprune.reference.bits import pack_bits

OPTIONS: dict[str, Any] = {
    "lr": 1e-2,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "masked_decay": 0.05,
    "step": 3,
    "seed": 123456789,
}


@dataclass
class Case:
    """Tensors of one step [rows, columns]; `kept` is the mask before it was packed, None for plain AdamW."""

    rows: int
    columns: int
    dtype: torch.dtype
    masked: bool = True
    tensors: list[Tensor] = field(init=False)  # weight, gradient, both moments
    kept: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (self.rows, self.columns)
        wide = torch.promote_types(self.dtype, torch.float32)
        weight, grad, exp_avg, square = (torch.randn(shape, generator=generator, dtype=wide) for _ in range(4))
        self.tensors = [weight.to(self.dtype), grad.to(self.dtype), exp_avg, square.square()]
        self.kept = torch.rand(shape, generator=generator) < 0.5 if self.masked else None

    @property
    def mask(self) -> Tensor | None:
        """One bit a weight."""
        return None if self.kept is None else pack_bits(self.kept)

    def exact(self) -> list[Tensor]:
        """Weight and moments after the step, in fp64, not rounded."""
        w, g, m, v = (tensor.double() for tensor in self.tensors)
        (b1, b2), lr, t = OPTIONS["betas"], OPTIONS["lr"], OPTIONS["step"]
        m = b1 * m + (1 - b1) * g
        u = m if self.kept is None else torch.where(self.kept, m, m + OPTIONS["masked_decay"] * w)
        v = b2 * v + (1 - b2) * (g if self.kept is None else u) ** 2
        w = w * (1 - lr * OPTIONS["weight_decay"])
        w = w - lr / (1 - b1**t) * u / ((v / (1 - b2**t)).sqrt() + OPTIONS["eps"])
        return [w, m, v]

    def step(self) -> list[Tensor]:
        """The same by the op."""
        weight, grad, exp_avg, exp_avg_sq = (tensor.clone() for tensor in self.tensors)
        ops.nm_adamw_(weight, grad, exp_avg, exp_avg_sq, self.mask, **OPTIONS)
        return [weight, exp_avg, exp_avg_sq]

    def check(self, found: list[Tensor]) -> None:
        """Against fp64. fp32: eight roundings of terms of the size of a weight. bf16: the neighbour below or above, and
        which one by the hash."""
        for result, right in zip(found, self.exact(), strict=True):
            if result.dtype == torch.bfloat16:
                slack = 2**-20 * (1 + right.abs())  # of fp32, which may cross the border between two cells
                found_at = result.double()
                assert bool(((floor(right - slack) <= found_at) & (found_at <= -floor(-right - slack))).all())
            elif result.dtype == torch.float32:
                torch.testing.assert_close(result.double(), right, rtol=2**-20, atol=2**-20)
            else:
                torch.testing.assert_close(result, right, rtol=1e-13, atol=1e-13)


def floor(values: Tensor) -> Tensor:
    """The largest bf16 number that is not above each value, in fp64."""
    exponent = torch.frexp(values).exponent
    place = torch.ldexp(torch.ones_like(values), exponent - 8)  # the unit in the last of bf16's eight places
    return (values / place).floor() * place
