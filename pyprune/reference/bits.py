"""One-bit masks: uint8 [..., ceil(columns / 8)]; bit j % 8, least significant first, of byte j // 8 is column j."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """bool [..., columns] -> uint8 [..., ceil(columns / 8)]; the bits past the last column are 0."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.unflatten(-1, (-1, 8)) << places).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, columns: int) -> Tensor:
    """uint8 [..., ceil(columns / 8)] -> bool [..., columns]."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[..., None] >> places & 1).flatten(-2)[..., :columns].bool()
