"""What the tests of packed weights share: weights with everything that packing must survive, and their bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from pyprune import _native
from pyprune.reference.bits import INTEGERS, is_nonzero

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = _native.cpu.isas() if _native.cpu else ()
needs_kernels = pytest.mark.skipif(_native.cpu is None, reason=f"no compiled module: {_native.why_missing}")


@contextmanager
def using_isa(name: str) -> Iterator[None]:
    """Runs the CPU kernels on one instruction set."""
    assert _native.cpu is not None
    before = _native.cpu.isa()
    _native.cpu.set_isa(name)
    try:
        yield
    finally:
        _native.cpu.set_isa(before)


def odd_values(dtype: torch.dtype) -> Tensor:
    """One, both zeros, the smallest denormals, the largest numbers, infinities, and NaNs with other bits."""
    integer = INTEGERS[dtype.itemsize]
    finite = torch.tensor([1.0, 0.0, -0.0, torch.finfo(dtype).max, -torch.finfo(dtype).max], dtype=dtype)
    special = torch.tensor([float("inf"), -float("inf"), float("nan")], dtype=dtype).view(integer)
    bits = torch.cat([special, special[2:] + 1, special[2:] | -1 - torch.iinfo(integer).max])
    denormals = torch.tensor([1, -torch.iinfo(integer).max], dtype=integer)
    return torch.cat([finite, bits.view(dtype), denormals.view(dtype)])


def random_weight(rows: int, columns: int, dtype: torch.dtype, sparsity: float, seed: int = 0) -> Tensor:
    """Normal weights, of which a part is +0 or -0 and a part one of `odd_values`; the last row is empty."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    odd = odd_values(dtype)
    pick = torch.randint(len(odd), weight.shape, generator=generator)
    weight = torch.where(torch.rand(weight.shape, generator=generator) < 0.1, odd[pick], weight)
    zeros = torch.where(torch.rand(weight.shape, generator=generator) < 0.5, 0.0, -0.0).to(dtype)
    weight = torch.where(torch.rand(weight.shape, generator=generator) < sparsity, zeros, weight)
    weight[-1:] = 0
    return weight


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shapes, dtypes and bits."""
    integer = INTEGERS[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def without_negative_zero(weight: Tensor) -> Tensor:
    """The weight as packing gives it back."""
    integer = INTEGERS[weight.element_size()]
    return weight.view(integer).masked_fill(~is_nonzero(weight), 0).view(weight.dtype)
