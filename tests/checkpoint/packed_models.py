"""Small models with zeros, and what their packed checkpoints are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 72,  # more than one tile, and no multiple of one
    "intermediate_size": 136,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """All linears but the head."""
    named = model.named_modules()
    return {name: module for name, module in named if isinstance(module, (nn.Linear, Conv1D)) and "lm_head" not in name}


def matrix(module: nn.Module) -> Tensor:
    """The weight as [out, in], a view."""
    weight = module.get_parameter("weight").data
    return weight if isinstance(module, nn.Linear) else weight.T


@torch.no_grad()
def zero(model: nn.Module, pattern: str, only: str = "") -> nn.Module:
    """Zeroes the smallest weights: a share such as "0.5", or "2:4" along the input."""
    for name, module in linears(model).items():
        if only in name:
            weight = matrix(module)
            if ":" in pattern:
                n, m = map(int, pattern.split(":"))
                groups = weight.reshape(weight.shape[0], -1, m)
                small = groups.abs().argsort(-1)[..., : m - n]
                weight.copy_(groups.scatter(-1, small, 0).reshape(weight.shape))
            else:
                bound = weight.abs().flatten().float().quantile(float(pattern))
                weight[weight.abs() <= bound] = 0
    return model


def llama(pattern: str = "0.5", dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A random Llama with zeros and biases."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "attention_bias": True, **changes}))
    return zero(model, pattern).to(dtype).eval()


def gpt2(pattern: str = "0.5") -> nn.Module:
    """A random GPT-2 with zeros: its linears are Conv1D, its head is tied."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_embd=72, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    return zero(GPT2LMHeadModel(config), pattern).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """For eight tokens of two sequences."""
    ids = torch.randint(3, 61, (2, 8), generator=torch.Generator().manual_seed(1))
    return model(ids).logits
