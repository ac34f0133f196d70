"""The `nm_adamw` family in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune.reference.bits import unpack_bits


def nm_adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mask: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    masked_decay: float,
    step: int,
    seed: int,
) -> None:
    """One step in place; see `pyprune.ops.nm_adamw_`."""
    wide = exp_avg.dtype
    w, g = param.to(wide), grad.to(wide)
    exp_avg.mul_(beta1).add_(g, alpha=1 - beta1)
    u, s = exp_avg, g
    if mask is not None:
        s = u = exp_avg + masked_decay * w.masked_fill(unpack_bits(mask, w.shape[1]), 0)
    exp_avg_sq.mul_(beta2).add_(s * s, alpha=1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
    w = w * (1 - lr * weight_decay) - (lr / (1 - beta1**step)) * u / denominator
    param.copy_(round_stochastically(w, seed) if param.dtype == torch.bfloat16 else w)


def masked_weight(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """m * W [rows, columns] in `dtype`."""
    return weight.masked_fill(~unpack_bits(mask, weight.shape[1]), 0).to(dtype)


def round_stochastically(values: Tensor, seed: int) -> Tensor:
    """fp32 -> bf16, up or down with the probabilities that make the mean right; element i takes 16 bits of
    hash32(i + seed). NaN and infinity stay."""
    index = torch.arange(values.numel(), device=values.device).view_as(values)
    noise = hash32(index + seed) >> 16
    bits = values.contiguous().view(torch.int32).to(torch.int64)
    magnitude = (bits & 0x7FFFFFFF) + noise & ~0xFFFF
    rounded = (magnitude | (bits & 0x80000000)).to(torch.int32).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def hash32(x: Tensor) -> Tensor:
    """A hash of 32-bit integers, in int64: x ^= x >> 16; x *= 0x7feb352d; x ^= x >> 15; x *= 0x846ca68b;
    x ^= x >> 16 (C. Wellons' lowbias32)."""
    x = x & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16
