"""Linear layers whose weight is packed, masked, or used in part: y = x W^T + bias.

Gradients reach x and bias through all of them, and the weight through `masked_linear` and `gathered_linear`. A packed
weight is a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyprune._ops import bitmap as bitmap_checks
from pyprune._ops import nm as nm_checks
from pyprune._ops import nm_adamw  # noqa: F401  (has masked_weight, which backward calls)
from pyprune._ops.dispatch import define, expect_float, expect_like, expect_shape, run

# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _check_x(op: str, x: Tensor, in_features: int, out_features: int, bias: Tensor | None) -> None:
    expect_float(op, "x", x)
    if x.dim() != 2 or x.shape[1] != in_features:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, expected [tokens, {in_features}]")
    if bias is not None:
        expect_like(op, x, x.dtype, bias=bias)
        expect_shape(op, "bias", bias, out_features)


def _check_nm_linear(x: Tensor, values: Tensor, metadata: Tensor, n: int, m: int, bias: Tensor | None) -> None:
    op = "nm_linear"
    nm_checks.check_packed(op, values, metadata, n, m)
    expect_like(op, x, x.dtype, values=values)
    _check_x(op, x, values.shape[1] // n * m, values.shape[0], bias)


def _check_bitmap_linear(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    out_features: int,
    in_features: int,
    bias: Tensor | None,
) -> None:
    op = "bitmap_linear"
    bitmap_checks.check_packed(op, values, bitmap, offsets, out_features, in_features)
    expect_like(op, x, x.dtype, values=values)
    _check_x(op, x, in_features, out_features, bias)


def _check_weight(op: str, x: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}, expected two dimensions")
    expect_like(op, x, x.dtype, weight=weight)


def _check_masked_linear(x: Tensor, weight: Tensor, mask_bits: Tensor, bias: Tensor | None) -> None:
    op = "masked_linear"
    _check_weight(op, x, weight)
    _check_x(op, x, weight.shape[1], weight.shape[0], bias)
    expect_like(op, x, torch.uint8, mask_bits=mask_bits)
    expect_shape(op, "mask_bits", mask_bits, weight.shape[0], -(-weight.shape[1] // 8))


def _check_gathered_linear(
    x: Tensor, weight: Tensor, in_index: Tensor | None, out_index: Tensor | None, bias: Tensor | None
) -> None:
    op = "gathered_linear"
    _check_weight(op, x, weight)
    for name, index in {"in_index": in_index, "out_index": out_index}.items():
        if index is not None:
            expect_like(op, x, torch.int64, **{name: index})
            if index.dim() != 1:
                raise ValueError(f"{op}: {name} has shape {list(index.shape)}, expected one dimension")
    _check_x(op, x, weight.shape[1] if in_index is None else len(in_index), weight.shape[0], bias)


def _check_indices(name: str, index: Tensor | None, size: int) -> None:
    """Raises for indices that do not rise (ValueError) or leave a dimension of `size` (IndexError).

    Not while a CUDA graph is captured, when the host may not wait for an element; what is captured has run before.
    """
    if index is None or index.numel() == 0 or (index.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    first, last = int(index[0]), int(index[-1])
    if not bool((index.diff() > 0).all()):
        raise ValueError(f"gathered_linear: {name} does not rise; sort it and leave out repetitions")
    if first < 0 or last >= size:
        raise IndexError(f"gathered_linear: {name} spans {first} to {last}, expected 0 to {size - 1}")


# ---------------------------------------------------------------------------------------------------------------------
# The ops and their fake kernels. Implementations take the optional bias before the numbers, as `run` passes it.


def _nm_linear(x: Tensor, values: Tensor, metadata: Tensor, n: int, m: int, bias: Tensor | None = None) -> Tensor:
    _check_nm_linear(x, values, metadata, n, m, bias)
    return run("nm_linear", x, (x, values, metadata, bias), n, m)


def _nm_linear_fake(x: Tensor, values: Tensor, metadata: Tensor, n: int, m: int, bias: Tensor | None = None) -> Tensor:
    _check_nm_linear(x, values, metadata, n, m, bias)
    return x.new_empty(x.shape[0], values.shape[0])


def _bitmap_linear(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    out_features: int,
    in_features: int,
    bias: Tensor | None = None,
) -> Tensor:
    _check_bitmap_linear(x, values, bitmap, offsets, out_features, in_features, bias)
    return run("bitmap_linear", x, (x, values, bitmap, offsets, bias), out_features, in_features)


def _bitmap_linear_fake(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    out_features: int,
    in_features: int,
    bias: Tensor | None = None,
) -> Tensor:
    _check_bitmap_linear(x, values, bitmap, offsets, out_features, in_features, bias)
    return x.new_empty(x.shape[0], out_features)


def _masked_linear(x: Tensor, weight: Tensor, mask_bits: Tensor, bias: Tensor | None = None) -> Tensor:
    _check_masked_linear(x, weight, mask_bits, bias)
    return run("masked_linear", x, (x, weight, mask_bits, bias))


def _masked_linear_fake(x: Tensor, weight: Tensor, mask_bits: Tensor, bias: Tensor | None = None) -> Tensor:
    _check_masked_linear(x, weight, mask_bits, bias)
    return x.new_empty(x.shape[0], weight.shape[0])


def _gathered_linear(
    x: Tensor, weight: Tensor, in_index: Tensor | None, out_index: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    _check_gathered_linear(x, weight, in_index, out_index, bias)
    _check_indices("in_index", in_index, weight.shape[1])
    _check_indices("out_index", out_index, weight.shape[0])
    return run("gathered_linear", x, (x, weight, in_index, out_index, bias))


def _gathered_linear_fake(
    x: Tensor, weight: Tensor, in_index: Tensor | None, out_index: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    _check_gathered_linear(x, weight, in_index, out_index, bias)
    return x.new_empty(x.shape[0], weight.shape[0] if out_index is None else out_index.shape[0])


define(
    "nm_linear(Tensor x, Tensor values, Tensor metadata, int n, int m, Tensor? bias=None) -> Tensor",
    _nm_linear,
    _nm_linear_fake,
)
define(
    "bitmap_linear(Tensor x, Tensor values, Tensor bitmap, Tensor offsets, SymInt out_features, SymInt in_features,"
    " Tensor? bias=None) -> Tensor",
    _bitmap_linear,
    _bitmap_linear_fake,
)
define(
    "masked_linear(Tensor x, Tensor weight, Tensor mask_bits, Tensor? bias=None) -> Tensor",
    _masked_linear,
    _masked_linear_fake,
)
define(
    "gathered_linear(Tensor x, Tensor weight, Tensor? in_index, Tensor? out_index, Tensor? bias=None) -> Tensor",
    _gathered_linear,
    _gathered_linear_fake,
)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients. Training has many tokens, so backward multiplies by the dense weight, made for the moment. It consists of
# torch's own operations on what has a gradient, so that it can be differentiated again; that of `masked_linear` cannot.


def _bias_gradient(ctx: Any, place: int, grad_y: Tensor) -> Tensor | None:
    return grad_y.sum(0) if ctx.needs_input_grad[place] else None


class _NmLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
        return torch.ops.pyprune.nm_linear(x, values, metadata, n, m, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, values, metadata, _, *ctx.pattern = inputs
        ctx.save_for_backward(values, metadata)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ torch.ops.pyprune.nm_decompress(*ctx.saved_tensors, *ctx.pattern)
        return grad_x, None, None, _bias_gradient(ctx, 3, grad_y), None, None


class _BitmapLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        values: Tensor,
        bitmap: Tensor,
        offsets: Tensor,
        bias: Tensor | None,
        out_features: int,
        in_features: int,
    ) -> Tensor:
        return torch.ops.pyprune.bitmap_linear(x, values, bitmap, offsets, out_features, in_features, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, values, bitmap, offsets, _, *ctx.features = inputs
        ctx.save_for_backward(values, bitmap, offsets)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ torch.ops.pyprune.bitmap_unpack(*ctx.saved_tensors, *ctx.features)
        return grad_x, None, None, None, _bias_gradient(ctx, 4, grad_y), None, None


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, mask_bits: Tensor, bias: Tensor | None, dense_gradient: bool) -> Tensor:
        return torch.ops.pyprune.masked_linear(x, weight, mask_bits, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, mask_bits, _, ctx.dense_gradient = inputs
        ctx.save_for_backward(x, weight, mask_bits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask_bits = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ torch.ops.pyprune.masked_weight(weight, mask_bits, weight.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = grad_y.T @ x
            if not ctx.dense_gradient:
                grad_weight = torch.ops.pyprune.masked_weight(grad_weight, mask_bits, weight.dtype)
        return grad_x, grad_weight, None, _bias_gradient(ctx, 3, grad_y), None


def _select(weight: Tensor, in_index: Tensor | None, out_index: Tensor | None) -> Tensor:
    """The rows and columns of weight that are used."""
    rows = weight if out_index is None else weight.index_select(0, out_index)
    return rows if in_index is None else rows.index_select(1, in_index)


def _spread(part: Tensor, dim: int, index: Tensor | None, size: int) -> Tensor:
    """The gradient of `index_select`: zeros of `size` along `dim`, with `part` at the indices."""
    if index is None:
        return part
    shape = [*part.shape]
    shape[dim] = size
    return part.new_zeros(shape).index_copy(dim, index, part)


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, in_index: Tensor | None, out_index: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        return torch.ops.pyprune.gathered_linear(x, weight, in_index, out_index, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, in_index, out_index = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ _select(weight, in_index, out_index)
        if ctx.needs_input_grad[1]:
            rows = _spread(grad_y.T @ x, 1, in_index, weight.shape[1])
            grad_weight = _spread(rows, 0, out_index, weight.shape[0])
        if ctx.needs_input_grad[4]:
            grad_bias = _spread(grad_y.sum(0), 0, out_index, weight.shape[0])
        return grad_x, grad_weight, None, None, grad_bias


# ---------------------------------------------------------------------------------------------------------------------
# The functional API


def _linear(function: type[torch.autograd.Function], x: Tensor, *arguments: Any) -> Tensor:
    """Applies a Function to the rows of x [..., in]; without gradients its forward alone, as `apply` costs 25 us."""
    call: Callable[..., Tensor] = function.apply if torch.is_grad_enabled() else function.forward
    y = call(x.reshape(prod(x.shape[:-1]), x.shape[-1]), *arguments)
    return y.view(*x.shape[:-1], y.shape[-1])


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, the tensors in its dtype, as `torch.nn.functional.linear` takes them."""
    first = tensors[0]
    assert first is not None
    device = first.device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def _like_values(values: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, the tensors in the dtype of the packed values, which is not changed at every call."""
    if not torch.is_autocast_enabled(values.device.type):
        return tensors
    return tuple(None if tensor is None else tensor.to(values.dtype) for tensor in tensors)


def nm_linear(x: Tensor, values: Tensor, metadata: Tensor, n: int, m: int, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias with an N:M weight, packed by `nm_compress`.

    Args:
        x: [..., in]; bf16, fp16, fp32 or fp64. Under autocast it takes the dtype of values.
        values: [out, in n/m] in x's dtype, and metadata: a constant weight; indices are trusted (see `check_nm`).
        n, m: its pattern.
        bias: [out] in x's dtype, or None.

    Returns:
        [..., out] in x's dtype; sums are in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument's dtype, device or shape is not the above.
    """
    x_, bias = _like_values(values, x, bias)
    assert x_ is not None
    return _linear(_NmLinear, x_, values, metadata, bias, n, m)


def bitmap_linear(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    out_features: int,
    in_features: int,
    bias: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias with a weight of any sparsity, packed by `bitmap_pack`.

    Args:
        x: [..., in_features]; bf16, fp16, fp32 or fp64. Under autocast it takes the dtype of values.
        values: in x's dtype, bitmap and offsets: a constant weight; bits and offsets are trusted (see `check_bitmap`).
        out_features, in_features: its shape.
        bias: [out_features] in x's dtype, or None.

    Returns:
        [..., out_features] in x's dtype; sums are in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument's dtype, device or shape is not the above.
    """
    x_, bias = _like_values(values, x, bias)
    assert x_ is not None
    return _linear(_BitmapLinear, x_, values, bitmap, offsets, bias, out_features, in_features)


def masked_linear(
    x: Tensor, weight: Tensor, mask_bits: Tensor, bias: Tensor | None = None, dense_gradient: bool = False
) -> Tensor:
    """y = x (W * mask)^T + bias, with the mask applied as the weight is read. Takes part in autocast.

    Args:
        x: [..., in]; bf16, fp16, fp32 or fp64.
        weight: [out, in] in x's dtype. Where the mask is 0 it does not count, whatever it is.
        mask_bits: uint8 [out, ceil(in / 8)] as `nm_prune` returns it.
        bias: [out] in x's dtype, or None.
        dense_gradient: the weight's gradient is that of the masked weight, masked if False, whole if True (the
            straight-through estimator: what is masked out learns too).

    Returns:
        [..., out] in x's dtype; sums are in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument's dtype, device or shape is not the above.
    """
    x_, weight_, bias = _autocast(x, weight, bias)
    assert x_ is not None
    return _linear(_MaskedLinear, x_, weight_, mask_bits, bias, dense_gradient)


def gathered_linear(
    x: Tensor,
    weight: Tensor,
    in_index: Tensor | None = None,
    out_index: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`y = x W[out_index][:, in_index]^T + bias[out_index]`: a linear with channels removed.

    x has the kept inputs alone, and y the kept outputs. For few tokens nothing of the weight is copied, for many what
    is kept. Takes part in autocast.

    Args:
        x: [..., kept inputs]; bf16, fp16, fp32 or fp64.
        weight: [out, in] in x's dtype; with few tokens its left-out columns are read too, and must be finite.
        in_index, out_index: int64 [kept], rising: columns and rows of weight; None for all of them.
        bias: [out] in x's dtype, or None.

    Returns:
        [..., kept outputs] in x's dtype; sums are in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument's dtype, device or shape is not the above, or indices do not rise.
        IndexError: an index is out of range.
    """
    x_, weight_, bias = _autocast(x, weight, bias)
    assert x_ is not None
    return _linear(_GatheredLinear, x_, weight_, in_index, out_index, bias)
