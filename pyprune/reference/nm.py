"""The `nm` family in plain torch: masks that keep n of every m weights, and weights packed by them."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune.reference.bits import INTEGERS, is_nonzero, pack_bits, unpack_bits


def index_bits(m: int) -> int:
    """Bits of an index within a group of m in the packed metadata: 2, 4 or 8."""
    return 2 if m <= 4 else 4 if m <= 16 else 8


def first_true(groups: Tensor) -> Tensor:
    """The flat index of the first True, -1 if there is none; int64, a scalar tensor."""
    flat = groups.flatten()
    if flat.numel() == 0:
        return torch.full((), -1, dtype=torch.int64, device=groups.device)
    return torch.where(flat.any(), flat.to(torch.uint8).argmax(), -1)


def pack_indices(indices: Tensor, m: int) -> Tensor:
    """[rows, count] below m -> uint8 [rows, ceil(count * index_bits / 8)], the first index in the lowest bits."""
    bits = index_bits(m)
    padded = torch.nn.functional.pad(indices.to(torch.uint8), (0, -indices.shape[1] % (8 // bits)))
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=indices.device)
    return (padded.unflatten(1, (padded.shape[1] * bits // 8, 8 // bits)) << places).sum(-1, dtype=torch.uint8)


def unpack_indices(metadata: Tensor, count: int, m: int) -> Tensor:
    """uint8 [rows, bytes] -> int64 [rows, count]; the inverse of `pack_indices`."""
    bits = index_bits(m)
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=metadata.device)
    return (metadata[..., None] >> places & (1 << bits) - 1).flatten(1)[:, :count].long()


def nm_prune(scores: Tensor, n: int, m: int, previous_bits: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Bits of the n largest of every m scores, how many bits differ from `previous_bits`, the first group with NaN."""
    rows, columns = scores.shape
    groups = scores.view(rows, columns // m, m)
    best = groups.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).view(rows, columns)
    flips = torch.zeros((), dtype=torch.int64, device=scores.device)
    if previous_bits is not None:
        flips = (unpack_bits(previous_bits, columns) != mask).sum()
    return pack_bits(mask), flips, first_true(groups.isnan().any(-1))


def nm_compress(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values [out, in n/m], metadata, and the first group with more than n nonzeros (its flat index, or -1).

    A group with fewer takes its zeros of lowest index along, as +0.
    """
    rows, columns = weight.shape
    # As integers: torch changes the bits of some NaNs when it gathers 16-bit floats.
    groups = weight.view(INTEGERS[weight.element_size()]).view(rows, columns // m, m)
    nonzero = is_nonzero(weight).view(groups.shape)
    chosen = (~nonzero).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :n].sort(-1).values
    values = groups.gather(-1, chosen).masked_fill(~nonzero.gather(-1, chosen), 0)
    metadata = pack_indices(chosen.flatten(1), m)
    return values.flatten(1).view(weight.dtype), metadata, first_true(nonzero.sum(-1) > n)


def nm_decompress(values: Tensor, metadata: Tensor, n: int, m: int) -> Tensor:
    """The dense weight [out, in], +0 where nothing was kept."""
    rows, kept = values.shape
    indices = unpack_indices(metadata, kept, m).view(rows, kept // n, n)
    bits = values.view(INTEGERS[values.element_size()]).view(rows, kept // n, n)
    dense = bits.new_zeros(rows, kept // n, m).scatter_(-1, indices, bits)
    return dense.flatten(1).view(values.dtype)
