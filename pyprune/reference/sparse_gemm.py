"""The `sparse_gemm` family in plain torch: products with a weight of which parts are left out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyprune.reference.bitmap import bitmap_unpack
from pyprune.reference.bits import unpack_bits
from pyprune.reference.nm import nm_decompress


def nm_linear(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    """y [T, out] = x W^T + bias for the packed W."""
    return linear(x, nm_decompress(values, metadata, n, m), bias)


def bitmap_linear(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
) -> Tensor:
    """y [T, out] = x W^T + bias for the packed W."""
    return linear(x, bitmap_unpack(values, bitmap, offsets, out_features, in_features), bias)


def masked_linear(x: Tensor, weight: Tensor, mask_bits: Tensor, bias: Tensor | None) -> Tensor:
    """y [T, out] = x (W * mask)^T + bias; a weight that is masked out does not count, even if it is not finite."""
    return linear(x, torch.where(unpack_bits(mask_bits, weight.shape[1]), weight, 0), bias)


def gathered_linear(
    x: Tensor, weight: Tensor, in_index: Tensor | None, out_index: Tensor | None, bias: Tensor | None
) -> Tensor:
    """y [T, kept outputs] = x W[out_index][:, in_index]^T + bias[out_index] for x [T, kept inputs]."""
    if out_index is not None:
        weight = weight[out_index]
        bias = None if bias is None else bias[out_index]
    return linear(x, weight if in_index is None else weight[:, in_index], bias)
