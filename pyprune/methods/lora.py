"""LoRA and DoRA on every linear of the blocks, without pruning: the dense baseline, and the others' tuning.

Hu et al., LoRA, arXiv 2106.09685; Liu et al., DoRA, arXiv 2402.09353; both by PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

from pyprune import surgery
from pyprune.architectures import describe
from pyprune.methods import option


@dataclass
class LoRA:
    """Low-rank tuning; satisfies `Method`. The adapters are fp32 whatever the model's dtype."""

    lora_rank: int = option(20, "rank of the LoRA matrices")
    lora_alpha: float = option(4.0, "LoRA's scale: the update is multiplied by alpha / rank")
    lora_dropout: float = option(0.05, "dropout on the input of the LoRA matrices")
    dora: bool = option(False, "weight-decomposed adaptation (DoRA) instead of LoRA")

    def __post_init__(self) -> None:
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank is {self.lora_rank}; expected at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; expected 0 up to, not including, 1")

    def refuse_adapters(self, model: nn.Module) -> None:
        """Raises ValueError when the model has some."""
        if hasattr(model, "peft_config"):
            raise ValueError(
                "model: it has adapters already; leave out get_peft_model, prepare adds LoRA itself (lora_rank, "
                "lora_alpha), or fold them first with pyprune.surgery.fold_adapters"
            )

    def adapt(self, model: nn.Module) -> nn.Module:
        """A PeftModel with adapters on all linears of the blocks; only they are trained. Raises ValueError when the
        model has adapters."""
        self.refuse_adapters(model)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora_rank,
            lora_alpha=cast(int, self.lora_alpha),  # PEFT only divides by the rank
            lora_dropout=self.lora_dropout,
            use_dora=self.dora,
            target_modules=list(describe(model).linear_names()),
        )
        return get_peft_model(model, config)

    def prepare(
        self, model: nn.Module, calibration: Sequence[torch.Tensor] | None = None, resume: str | Path | None = None
    ) -> nn.Module:
        """The model with adapters; neither calibration nor a checkpoint changes what they look like."""
        return self.adapt(model)

    def callbacks(self) -> list[TrainerCallback]:
        """None: LoRA needs no schedule."""
        return []

    def finalize(self, model: nn.Module) -> nn.Module:
        """The model with the adapters merged into its weights."""
        return surgery.fold_adapters(model)
