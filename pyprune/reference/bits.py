"""One-bit masks: uint8 [..., ceil(columns / 8)]; bit j % 8, least significant first, of byte j // 8 is column j."""

from __future__ import annotations

import torch
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""An integer dtype for each size of an element, to look at its bits."""


def pack_bits(mask: Tensor) -> Tensor:
    """A mask as bits: bool [..., columns] -> uint8 [..., ceil(columns / 8)], column j in bit j % 8 of byte j // 8; the
    bits past the last column are 0."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.unflatten(-1, (-1, 8)) << places).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 [..., ceil(columns / 8)] -> bool [..., columns]."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[..., None] >> places & 1).flatten(-2)[..., :columns].bool()


def is_nonzero(weight: Tensor) -> Tensor:
    """bool: everything but +0 and -0. Reads the bits, so that NaN and denormals count whatever the processor's mode."""
    return (weight.view(INTEGERS[weight.element_size()]) << 1) != 0


def count_flips(bits: Tensor, others: Tensor) -> Tensor:
    """How many bits of two masks differ, an int64 scalar."""
    counts = torch.tensor([bin(byte).count("1") for byte in range(256)], device=bits.device)
    return counts[(bits ^ others).long()].sum()
