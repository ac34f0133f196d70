"""Prune, then tune: the same basis cut at once, then LoRA. What PAT has to beat.

In the pca basis this is SliceGPT (arXiv 2401.15024) with one global rotation, so that the result is a stock checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pyprune import basis, surgery
from pyprune.architectures import describe
from pyprune.methods import option
from pyprune.methods.pat import Pruning, kept_channels


@dataclass
class PruneThenTune(Pruning):
    """Cut the hidden size before training; satisfies `Method`."""

    basis: str = option(
        "pca",
        "identity: the channels of most variance stay; pca: those of the principal axes (so too for learned)",
        choices=["identity", "pca", "learned"],
    )

    def prepare(
        self, model: nn.Module, calibration: Sequence[torch.Tensor] | None = None, resume: str | Path | None = None
    ) -> nn.Module:
        """The cut model with LoRA. A resumed run makes the same cut again from the same calibration."""
        self.check(model)
        kept = kept_channels(describe(model), self.ratio, self.round_to)
        if self.basis == "identity":
            if not calibration:
                raise ValueError("calibration: pass token ids, each [batch, tokens], to find the channels of variance")
            variance = basis.covariance(model, calibration).diagonal()
            keep = variance.topk(kept).indices.sort().values
        else:
            basis.to_principal_axes(model, calibration, self.untie)
            keep = torch.arange(kept)
        return self.adapt(surgery.slice_hidden(model, keep))
