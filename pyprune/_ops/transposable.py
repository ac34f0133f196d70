"""Masks that are 2:4 along the input and along the output."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from pyprune._ops.dispatch import define, expect_float, expect_like, expect_shape, run


def _check(scores: Tensor, previous_bits: Tensor | None) -> None:
    op = "transposable_prune"
    expect_float(op, "scores", scores)
    if scores.dim() != 2 or scores.shape[0] % 4 or scores.shape[1] % 4:
        raise ValueError(f"{op}: scores have shape {list(scores.shape)}, expected two multiples of 4")
    if previous_bits is not None:
        expect_like(op, scores, torch.uint8, previous_bits=previous_bits)
        expect_shape(op, "previous_bits", previous_bits, scores.shape[0], -(-scores.shape[1] // 8))


def _transposable_prune(scores: Tensor, previous_bits: Tensor | None) -> tuple[Tensor, Tensor]:
    _check(scores, previous_bits)
    bits, flips, nans = cast(
        "tuple[Tensor, Tensor, Tensor]", run("transposable_prune", scores, (scores, previous_bits))
    )
    if int(nans) != 0:
        raise ValueError("transposable_prune: scores hold NaN, which has no rank; look for the step that made it")
    return bits, flips


def _transposable_prune_fake(scores: Tensor, previous_bits: Tensor | None) -> tuple[Tensor, Tensor]:
    _check(scores, previous_bits)
    bits = scores.new_empty(scores.shape[0], -(-scores.shape[1] // 8), dtype=torch.uint8)
    return bits, scores.new_empty((), dtype=torch.int64)


define(
    "transposable_prune(Tensor scores, Tensor? previous_bits) -> (Tensor bits, Tensor flips)",
    _transposable_prune,
    _transposable_prune_fake,
)


def transposable_prune(scores: Tensor, previous_bits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Keeps two of four in every row and every column of each 4 x 4 tile: exactly the choice of largest sum among the
    90 that exist (Hu et al., arXiv 2404.01847). W and W^T are then both 2:4. `nm_prune` has the same contract.

    Args:
        scores: [out, in], both multiples of 4. Sums are fp32 (fp64 for fp64), ((row 0 + row 1) + (row 2 + row 3)), each
            row's two scores added first; of equal sums the first pattern in lexicographic order stays.
        previous_bits: a mask to count differences from.

    Returns:
        bits, uint8 [out, ceil(in / 8)], one bit a weight, 1 = kept; and how many differ, an int64 scalar (0 without
        previous ones).

    Raises:
        ValueError: another shape, or NaN among the scores.
    """
    return torch.ops.pyprune.transposable_prune(scores, previous_bits)
