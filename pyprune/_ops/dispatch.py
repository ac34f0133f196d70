"""How an op is registered, checked and run: what every family of ops shares.

Each op is one schema registered with the torch dispatcher, whatever was compiled. When it runs, it checks its
arguments, makes them contiguous, and hands them to the best implementation for their device and dtype: the compiled CPU
or CUDA kernels, or `pyprune.reference`, which has all of them. Gradients are `torch.autograd.Function`s around the ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from pyprune import _native, reference
from pyprune._cpu import CpuKernels
from pyprune._cuda import CudaKernels, runs_on

OPS: list[str] = []
"""The names of all ops, in the order of their definition."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_library = torch.library.Library("pyprune", "DEF")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers an op: its schema, what runs it on every device, and its results' shapes without their values."""
    op = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(op, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyprune::{op}", fake, lib=_library)
    OPS.append(op)


# ---------------------------------------------------------------------------------------------------------------------
# Which implementation runs


class Implementation(Protocol):
    """Something that computes ops, by methods of their names, on checked and contiguous tensors, flattened to the
    shapes of the schemas. One that lacks an op leaves it to the reference."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...


_REFERENCE = cast(Implementation, reference)
_CPU = CpuKernels(_native.cpu) if _native.cpu else None
_CUDA = CudaKernels(_native.cuda) if _native.cuda else None
_forced: Implementation | None = None


@contextmanager
def using(implementation: Implementation | ModuleType | str) -> Iterator[None]:
    """Runs every op on one implementation: "reference", or an object with methods of the ops' names.

    For tests and measurements. It holds for the whole process, because backward may run on another thread.
    """
    global _forced
    if isinstance(implementation, str) and implementation != "reference":
        raise ValueError(f'implementation is {implementation!r}; pass "reference" or an object that has the ops')
    before = _forced
    _forced = _REFERENCE if implementation == "reference" else cast(Implementation, implementation)
    try:
        yield
    finally:
        _forced = before


def choose(op: str, device: torch.device, dtype: torch.dtype) -> tuple[Implementation, str]:
    """The implementation that runs an op for this device and dtype, and why. Raises ValueError for an unknown op."""
    if op not in OPS:
        raise ValueError(f"op is {op!r}; expected one of {', '.join(OPS)}")
    if device.type == "cuda" and not torch.cuda.is_available():
        return _REFERENCE, "torch sees no CUDA device"
    return _choose(op, device, dtype)


def _choose(op: str, device: torch.device, dtype: torch.dtype) -> tuple[Implementation, str]:
    """At every call of an op, so nothing is checked."""
    implementation, why = _choose_any(device, dtype)
    if hasattr(implementation, op):
        return implementation, why
    return _REFERENCE, f"{implementation.name} has no {op}"


def _choose_any(device: torch.device, dtype: torch.dtype) -> tuple[Implementation, str]:
    if _forced is not None:
        return _forced, "chosen by ops.using"
    if dtype == torch.float64:
        return _REFERENCE, "fp64 is the reference's"
    if device.type == "cpu":
        return _choose_cpu()
    if device.type == "cuda":
        return _choose_cuda(device.index if device.index is not None else torch.cuda.current_device())
    return _REFERENCE, f"no kernels for {device.type} devices"


def _choose_cpu() -> tuple[Implementation, str]:
    if _CPU is None:
        return _REFERENCE, f"no compiled module: {_native.why_missing}"
    return _CPU, "compiled"


@cache
def _choose_cuda(index: int) -> tuple[Implementation, str]:
    if _CUDA is None:
        reason = f"no compiled module: {_native.why_missing}" if _native.why_missing else "built without CUDA"
        return _REFERENCE, reason
    capability = torch.cuda.get_device_capability(index)
    archs = _native.build_info["cuda_archs"]
    if not runs_on(capability, archs):
        return _REFERENCE, f"sm_{capability[0]}{capability[1]} is none of the built {', '.join(archs)}"
    return _CUDA, "compiled"


def run(op: str, x: Tensor, tensors: tuple[Tensor | None, ...], *options: Any) -> Any:
    """Runs `op` on the implementation for x; an optional tensor may be None. Autograd and autocast end here:
    gradients are each family's Functions."""
    implementation, _ = _choose(op, x.device, x.dtype)
    device = x.device.type
    autocast = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    with torch.no_grad(), autocast:
        arguments = (None if tensor is None else tensor.contiguous() for tensor in tensors)
        return getattr(implementation, op)(*arguments, *options)


# ---------------------------------------------------------------------------------------------------------------------
# Checks and gradients


def expect_float(op: str, name: str, tensor: Tensor) -> None:
    """Raises TypeError for a tensor that is not of one of `FLOATS`."""
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} is {tensor.dtype}, expected one of {', '.join(map(str, FLOATS))}")


def expect_shape(op: str, name: str, tensor: Tensor, *shape: int) -> None:
    """Raises ValueError for another shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected {list(shape)}")


def expect_like(op: str, x: Tensor, dtype: torch.dtype, **tensors: Tensor) -> None:
    """Raises ValueError for a tensor on another device than x, TypeError for one of another dtype than `dtype`."""
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, x is on {x.device}; move one to the other's device")
        if tensor.dtype == torch.bool and dtype == torch.uint8:
            raise TypeError(f"{op}: {name} is torch.bool, expected its bits, eight a byte; use ops.pack_bits")
        if tensor.dtype != dtype:
            matching = f" for x in {x.dtype}" if dtype.is_floating_point else ""
            raise TypeError(f"{op}: {name} is {tensor.dtype}, expected {dtype}{matching}; cast it first")


def wanted_like(tensors: tuple[Tensor, ...], output_mask: list[bool]) -> tuple[Tensor, ...]:
    """Uninitialised gradients of `tensors`, empty where not wanted."""
    return tuple(
        tensor.new_empty(tensor.shape if wanted else (0,)) for tensor, wanted in zip(tensors, output_mask, strict=True)
    )


def only(wanted: list[bool], gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The gradients that autograd asked for, None in place of the others."""
    return tuple(gradient if want else None for want, gradient in zip(wanted, gradients, strict=True))
