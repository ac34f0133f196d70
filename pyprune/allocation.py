"""How much every linear loses: the same share everywhere, or by OWL's share of outliers; counted out exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NAMES = ("uniform", "owl")


def apportion(rates: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Whole numbers near rate * size whose sum is the rounded sum: the running total is rounded, and each entry gets
    what it adds, so that none is more than one off."""
    counts, total, given = [], 0.0, 0
    for rate, size in zip(rates, sizes, strict=True):
        total += rate * size
        count = min(max(round(total) - given, 0), size)
        counts.append(count)
        given += count
    return counts


def outlier_ratio(scores: Sequence[Tensor], times: float) -> float:
    """Share of a block's scores |W| ||x|| that exceed `times` their mean, over all its linears together (OWL's D)."""
    total = sum(score.numel() for score in scores)
    mean = sum(float(score.double().sum()) for score in scores) / total
    return sum(int((score > times * mean).sum()) for score in scores) / total


def owl_rates(outliers: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float) -> list[float]:
    """Sparsity of each block from its share of outliers, arXiv 2310.05175: the kept shares lie in a range of
    2 `spread`, growing with the outliers, and are shifted so that the model as a whole has `sparsity`.

    Raises ValueError when the spread takes a block's rate out of (0, 1).
    """
    ratio, weight = torch.tensor(outliers).double(), torch.tensor(sizes).double()
    width = float(ratio.max() - ratio.min())
    kept = (ratio - ratio.min()) / width * 2 * spread if width > 0 else torch.zeros_like(ratio)
    rates = sparsity + (kept * weight).sum() / weight.sum() - kept
    if not bool(((rates > 0) & (rates < 1)).all()):
        raise ValueError(
            f"owl_spread is {spread}: at sparsity {sparsity} it takes a block's rate to {float(rates.min()):.3f} ... "
            f"{float(rates.max()):.3f}, outside of 0 to 1; lower it"
        )
    return [float(rate) for rate in rates]
