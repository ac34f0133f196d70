"""Tiny random decoders of every family that the engine takes, calibration for them, and what their blocks read."""

from __future__ import annotations

import torch
from surgery.tiny_decoders import FAMILY_NAMES, VOCABULARY, tiny
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from pyprune.architectures import describe_blocks

LAYER_NORM = {
    "gpt2": {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "opt": {
        **{"hidden_size": 24, "ffn_dim": 40, "word_embed_proj_dim": 24, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "max_position_embeddings": 64},
    },
}
FAMILIES = (*FAMILY_NAMES, *LAYER_NORM)


def decoder(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A random model in eval mode."""
    if family in FAMILY_NAMES:
        return tiny(family, dtype=dtype, seed=seed)
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](
        vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0, **LAYER_NORM[family]
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def calibration(batches: int = 3, rows: int = 2, length: int = 12, seed: int = 1) -> list[Tensor]:
    """Token ids, one batch shorter than the others."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (rows, length - 3 * (i == 1)), generator=generator) for i in range(batches)]


@torch.no_grad()
def block_inputs(model: nn.Module, batches: list[Tensor]) -> list[list[Tensor]]:
    """[block][batch]: the hidden states that each block reads when the model itself runs, and behind the last one what
    it returns."""
    blocks = [block.module for block in describe_blocks(model).blocks]
    found: list[list[Tensor]] = [[] for _ in range(len(blocks) + 1)]
    handles = [
        block.register_forward_pre_hook(lambda module, args, i=i: found[i].append(args[0].clone()))
        for i, block in enumerate(blocks)
    ]
    handles.append(blocks[-1].register_forward_hook(lambda module, args, output: found[-1].append(output.clone())))
    for ids in batches:
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found
