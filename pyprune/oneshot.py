"""One-shot runs: from text and a dense checkpoint to calibration batches and a pruned model.

What `pyprune prune`, `pyprune compare` and the benchmarks share.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyprune.data import DataError, Document, encode
from pyprune.methods import option


@dataclass
class Recipe:
    """What is the same for all methods that are compared."""

    calibration_windows: int = option(128, "windows of calibration text")
    calibration_window: int = option(2048, "tokens in one of them")
    batch_size: int = option(1, "windows in one forward pass")
    keep: str = option("host", "where hidden states lie meanwhile", choices=["device", "host", "disk"])
    dtype: str = option("auto", "dtype of the model's weights", choices=["auto", "float32", "bfloat16", "float16"])
    seed: int = option(0, "seed of everything that is random")
    eval_window: int = option(2048, "tokens in a window that measures perplexity")
    eval_tokens: int | None = option(None, "held-out tokens to measure on (default: all)")

    def __post_init__(self) -> None:
        for name, least in (
            ("calibration_windows", 1),
            ("calibration_window", 2),
            ("batch_size", 1),
            ("eval_window", 2),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {least}")


def calibration_batches(documents: Iterable[Document], tokenizer: Any, recipe: Recipe) -> tuple[Tensor, ...]:
    """Token ids [B, T] of windows drawn by the seed. Raises DataError when the text has fewer than were asked for."""
    wanted = recipe.calibration_windows
    windows = encode(documents, tokenizer).windows(recipe.calibration_window)
    if len(windows) < wanted:
        raise DataError(
            f"the calibration text has {len(windows)} windows of {recipe.calibration_window} tokens, fewer than "
            f"calibration_windows={wanted}; give more text, or ask for fewer or shorter windows"
        )
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(recipe.seed))[:wanted]
    return windows.ids[chosen].split(recipe.batch_size)
