"""Linears whose weight is masked N:M while it is trained, and the low-rank part that can stand beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from pyprune import ops
from pyprune.patterns import parse
from pyprune.reference.bits import unpack_bits


@dataclass(frozen=True)
class MaskRule:
    """N:M: the n entries of largest score of every m consecutive ones along the input are kept.

    `transposable` (2:4 only): two of four along the input *and* along the output, in every 4 x 4 tile the choice of
    largest sum among all 90, so that the transposed weight of the backward pass is 2:4 too.
    """

    n: int
    m: int
    transposable: bool = False

    def __post_init__(self) -> None:
        if self.transposable and (self.n, self.m) != (2, 4):
            raise ValueError(f"pattern is {self.n}:{self.m}; transposable masks are 2:4")

    @classmethod
    def parse(cls, pattern: str, transposable: bool = False) -> MaskRule:
        """From "N:M"."""
        parsed = parse(pattern)
        if not parsed.grouped:
            raise ValueError(f"pattern is {pattern!r}; expected N:M, N of every M stay, such as 2:4")
        return cls(parsed.n, parsed.m, transposable)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}{' transposable' if self.transposable else ''}"

    def check(self, name: str, outputs: int, inputs: int) -> None:
        """Raises ValueError when a weight [outputs, inputs] cannot be divided into groups."""
        if inputs % self.m or (self.transposable and outputs % self.m):
            sides = "both to be multiples" if self.transposable else "the inputs to be a multiple"
            raise ValueError(
                f"{name} has {inputs} inputs and {outputs} outputs; the pattern {self} needs {sides} of {self.m}: "
                "choose another pattern"
            )

    def mask(self, scores: Tensor, previous: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One-bit masks of the largest scores [out, in], and how many bits differ from `previous`."""
        if self.transposable:
            return ops.transposable_prune(scores, previous)
        return ops.nm_prune(scores, self.n, self.m, previous)

    def fits(self, bits: Tensor, inputs: int) -> bool:
        """Whether a one-bit mask of that many inputs keeps n of every m."""
        kept = unpack_bits(bits, inputs)
        along_inputs = bool((kept.unflatten(1, (-1, self.m)).sum(-1) == self.n).all())
        return along_inputs and (
            not self.transposable or bool((kept.unflatten(0, (-1, self.m)).sum(1) == self.n).all())
        )


class SLoRB(nn.Module):
    """Sparse low-rank boosting (AST, section 3.4): y = (x X^T) S^T, beside the masked product.

    X [in / k, in] sums blocks of k inputs; frozen, it is not stored but computed as a sum. S [out, in / k] starts as
    the mean of the pruned weights of each block, so that a row's sum over each block is what it was.
    """

    x: nn.Parameter | None

    def __init__(self, pruned: Tensor, block: int, trained: bool) -> None:
        """`pruned` [out, in]: the weights that the mask drops, zero elsewhere."""
        super().__init__()
        self.block = block
        self.s = nn.Parameter(pruned.unflatten(1, (-1, block)).mean(-1))
        self.x = None
        if trained:
            blocks = torch.eye(self.s.shape[1], dtype=pruned.dtype, device=pruned.device)
            self.x = nn.Parameter(blocks.repeat_interleave(block, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        sums = x.unflatten(-1, (-1, self.block)).sum(-1) if self.x is None else F.linear(x, self.x)
        return F.linear(sums, self.s)

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """S X [out, in], which a dense weight would absorb."""
        return self.s.repeat_interleave(self.block, dim=1) if self.x is None else self.s @ self.x

    def extra_repr(self) -> str:
        return f"block={self.block}, projection={'frozen' if self.x is None else 'trained'}"


class MaskedLinear(nn.Linear):
    """y = x (m * W)^T + b, plus SLoRB's part. The gradient of m * W goes to all of W (straight-through).

    m * W exists only inside a product: the forward pass saves x, and the backward pass masks again. A mask that changes
    between the two is an error of autograd's.

    Attributes:
        weight: W [out, in], a Parameter of whoever trains it; masked entries have values of their own.
        mask: uint8 [out, ceil(in / 8)], one bit a weight, 1 = kept. first_mask: the mask at the start.
        input_norm: [in] fp32, Wanda's ||x_j||, or None: then scores are |W|.
        transposed: whether it stands for a layer that stores [in, out], transformers' Conv1D.
    """

    mask: Tensor
    first_mask: Tensor
    input_norm: Tensor | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        rule: MaskRule,
        input_norm: Tensor | None = None,
        transposed: bool = False,
    ) -> None:
        """Takes over the parameters of a linear, weight [out, in] and bias [out], and masks them."""
        super().__init__(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        self.weight = weight
        self.register_parameter("bias", bias)
        self.slorb: SLoRB | None = None
        self.transposed = transposed
        self.register_buffer("input_norm", input_norm)
        bits, _ = rule.mask(self.scores())
        self.register_buffer("mask", bits)
        self.register_buffer("first_mask", bits.clone())

    def boost(self, block: int, trained: bool) -> None:
        """Adds a SLoRB part for the weights that are masked now."""
        with torch.no_grad():
            self.slorb = SLoRB(self.weight - self.masked_weight(), block, trained)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]; under autocast in its dtype."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = _MaskedProduct.apply(x, self.weight, self.mask)
        y = y if bias is None else y + bias
        return y if self.slorb is None else y + self.slorb(x)

    @torch.no_grad()
    def scores(self) -> Tensor:
        """What the mask keeps the largest of: |W|, or Wanda's |W| ||x||; of a sharded weight, of all of it."""
        magnitude = full(self.weight).abs()
        return magnitude if self.input_norm is None else magnitude * self.input_norm.to(magnitude.dtype)

    @torch.no_grad()
    def masked_weight(self) -> Tensor:
        """m * W."""
        return ops.masked_weight(full(self.weight), self.mask)


class _MaskedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bits: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bits)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, ops.masked_weight(weight, bits, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, bits = ctx.saved_tensors
        wants_x, wants_weight, _ = ctx.needs_input_grad
        grad_x = grad @ ops.masked_weight(weight, bits, grad.dtype) if wants_x else None
        grad_weight = (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype) if wants_weight else None
        return grad_x, grad_weight, None


# ----------------------------------------------------------------------------------------------- sharded parameters


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds some rows only (FSDP2)."""
    return isinstance(tensor, DTensor)


def full(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP2 may have sharded; then every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_mask(layer: MaskedLinear) -> Tensor:
    """The rows of a layer's mask that belong to the rows of its weight that this process holds."""
    if not isinstance(layer.weight, DTensor):
        return layer.mask
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    weight = layer.weight
    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return layer.mask[offset[0] : offset[0] + shape[0]]
