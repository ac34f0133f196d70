"""The `transposable` family in plain torch."""

from __future__ import annotations

from functools import cache
from itertools import combinations, product

import torch
from torch import Tensor

from pyprune.reference.bits import count_flips, pack_bits

PAIRS = tuple(combinations(range(4), 2))
TILES_AT_ONCE = 1 << 18


@cache
def patterns() -> tuple[tuple[int, ...], ...]:
    """All 90 masks of a 4 x 4 tile with two ones in every row and column: for each row, which of `PAIRS` is kept."""

    def columns(choice: tuple[int, ...]) -> list[int]:
        return sorted(column for pair in choice for column in PAIRS[pair])

    rows = product(range(6), repeat=4)
    return tuple(choice for choice in rows if columns(choice) == [0, 0, 1, 1, 2, 2, 3, 3])


def transposable_prune(scores: Tensor, previous_bits: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """See `pyprune.ops.transposable_prune`; the third is how many scores are NaN."""
    rows, columns = scores.shape
    wide = scores if scores.dtype == torch.float64 else scores.float()
    tiles = wide.view(rows // 4, 4, columns // 4, 4).transpose(1, 2).reshape(-1, 4, 4)
    kept = torch.cat([_best(part) for part in tiles.split(TILES_AT_ONCE)]) if len(tiles) else tiles.bool()
    mask = kept.view(rows // 4, columns // 4, 4, 4).transpose(1, 2).reshape(rows, columns)
    bits = pack_bits(mask)
    flips = count_flips(bits, bits if previous_bits is None else previous_bits)
    return bits, flips, scores.isnan().sum()


def _best(tiles: Tensor) -> Tensor:
    """bool [tiles, 4, 4]: the pattern of largest sum, the first of equal ones, sums taken as the kernels do."""
    choice = torch.tensor(patterns(), device=tiles.device)
    first, second = torch.tensor(PAIRS, device=tiles.device).T
    pairs = tiles[..., first] + tiles[..., second]  # [tiles, 4, 6]
    row = [pairs[:, i, choice[:, i]] for i in range(4)]
    best = ((row[0] + row[1]) + (row[2] + row[3])).argmax(-1)  # argmax takes the first of equal ones
    kept_pair = choice[best]  # [tiles, 4]
    kept = torch.zeros(tiles.shape, dtype=torch.bool, device=tiles.device)
    for ends in (first, second):
        kept.scatter_(2, ends[kept_pair][..., None], True)
    return kept
