"""Small random decoders of every family, and the masked model that surgery must equal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from pyprune.architectures import Decoder, describe, weight_of

VOCABULARY, WIDTH, HEADS = 61, 24, 4
KEEP = torch.tensor([0, 1, 3, 4, 5, 8, 9, 10, 13, 14, 15, 17, 19, 20, 22, 23])
EPSILON = 0.05  # large, so that an epsilon which is not rescaled shows

COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=2, num_attention_heads=HEADS,
    num_key_value_heads=2, rms_norm_eps=EPSILON, max_position_embeddings=64, initializer_range=0.3,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
SPECIAL: dict[str, dict[str, object]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {"head_dim": 10, "attention_bias": True},
    "gemma": {"head_dim": 8},
    "phi3": {
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    },
}
FAMILY_NAMES = tuple(SPECIAL)


def tiny(family: str, tied: bool = False, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A random model of a family in eval mode, with random biases and norm gains."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**(COMMON | SPECIAL[family]), tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    if dtype == torch.float64:
        compute_norms_in_fp64(model)
    return model


def compute_norms_in_fp64(model: nn.Module) -> None:
    """Stock RMSNorms round to fp32 inside; recompute them in fp64 from their live weight and epsilon."""
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.register_forward_hook(_fp64_norm)


def _fp64_norm(norm: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    gemma = "Gemma" in type(norm).__name__
    x, epsilon = args[0], norm.eps if gemma else norm.variance_epsilon
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * (norm.weight + gemma)


def token_ids(batch: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    """Random token ids [batch, length] without the padding token."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module) -> torch.Tensor:
    """Logits of `token_ids()` in fp64."""
    with torch.no_grad():
        return model(token_ids()).logits.double()


@contextmanager
def masked(model: nn.Module, keep: torch.Tensor = KEEP) -> Iterator[Decoder]:
    """Zero all channels but `keep` of what the embedding and each branch add to the residual stream."""
    decoder = describe(model)
    mask = torch.zeros(WIDTH, dtype=weight_of(decoder.final_norm).dtype)
    mask[keep] = 1
    handles = [
        module.register_forward_hook(lambda module, args, output: output * mask)
        for module in decoder.writers().values()
    ]
    yield decoder
    for handle in handles:
        handle.remove()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())
