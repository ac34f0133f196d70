"""Where a decoder keeps its embedding, blocks, projections, norms and head.

This is the only file that knows model families. A family is one entry of `FAMILIES`; everything else in the package
works on the `Decoder` that `describe` returns. See docs/families.md for how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


class UnsupportedArchitecture(ValueError):
    """The model is of a family whose hidden size cannot be pruned, or not yet; the message says why and what to do."""


@dataclass(frozen=True)
class Family:
    """Attribute paths of one model family; the defaults are Llama's. Block paths are relative to a block.

    A family fits when every block computes `x += out(f(norm(x)))` twice (attention, then MLP) with an RMSNorm `norm`,
    and nothing else reads or writes the residual stream but the embedding, the final norm and the head.
    """

    embedding: str = "model.embed_tokens"
    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    attention_in: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_out: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_out: str = "mlp.down_proj"
    # (norm, linear) pairs inside a block: norms over head_dim that share config.rms_norm_eps with the residual norms.
    head_norms: tuple[tuple[str, str], ...] = ()
    norm_epsilon: str = "variance_epsilon"
    norm_offset: float = 0.0  # a norm's gain is its weight plus this
    embedding_scale: Callable[[int], float] | None = None  # what stock code multiplies embeddings with, of hidden_size
    width_multiple: str | None = None  # the config field that hidden_size must be a multiple of


FAMILIES: dict[str, Family] = {
    "llama": Family(width_multiple="num_attention_heads"),  # LlamaConfig.validate_architecture
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(
        head_norms=(("self_attn.q_norm", "self_attn.q_proj"), ("self_attn.k_norm", "self_attn.k_proj")),
    ),
    "gemma": Family(norm_epsilon="eps", norm_offset=1.0, embedding_scale=lambda width: width**0.5),
    "phi3": Family(attention_in=("self_attn.qkv_proj",), mlp_in=("mlp.gate_up_proj",)),
}


@dataclass(frozen=True)
class Reads:
    """One residual norm and the linears that read its output."""

    norm: nn.Module
    linears: tuple[nn.Module, ...]


@dataclass(frozen=True)
class Block:
    """One decoder block: `reads[i]` feeds the branch whose output `writes[i]` adds to the residual stream."""

    module: nn.Module
    reads: tuple[Reads, Reads]
    writes: tuple[nn.Module, nn.Module]
    head_norms: tuple[tuple[nn.Module, nn.Module], ...]


@dataclass(frozen=True)
class Decoder:
    """Handles to the live modules of a causal language model, the same for all families.

    Linears are the outermost modules, so with PEFT they are its LoRA layers (the place for hooks); `base` gives the
    layer that holds the weight.
    """

    model: nn.Module
    family: Family
    embedding: nn.Module
    blocks: tuple[Block, ...]
    final_norm: nn.Module
    head: nn.Module

    @property
    def config(self) -> Any:
        """The model's transformers config."""
        return self.model.config

    @property
    def stack(self) -> nn.Module:
        """The model without its head: call it to run the blocks only."""
        return self.model.get_submodule(self.family.blocks.rpartition(".")[0])

    @property
    def tied(self) -> bool:
        """Whether head and embedding are one parameter."""
        return base(self.head).weight is base(self.embedding).weight

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream as the modules have it; a compacted model's config may still say the old one."""
        return int(weight_of(self.final_norm).shape[0])

    @property
    def norm_offset(self) -> float:
        """What stock code adds to a norm's weight to get its gain: 1 for Gemma, else 0."""
        return self.family.norm_offset

    @property
    def width_multiple(self) -> int:
        """A number that stock `from_pretrained` wants hidden_size to be a multiple of."""
        field = self.family.width_multiple
        return int(getattr(self.config, field)) if field else 1

    @property
    def head_dim(self) -> int:
        """Width of one attention head, explicit in the config or following from it."""
        config = self.config
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def writers(self) -> dict[str, nn.Module]:
        """All modules that add to the residual stream, by names that stay the same with and without PEFT."""
        named = {"embedding": self.embedding}
        for i, block in enumerate(self.blocks):
            named[f"block{i}_attention"], named[f"block{i}_mlp"] = block.writes
        return named

    def reads(self) -> Iterator[Reads]:
        """All residual norms with their readers, from the first block to the final norm and the head."""
        for block in self.blocks:
            yield from block.reads
        yield Reads(self.final_norm, (self.head,))

    def linear_names(self) -> tuple[str, ...]:
        """The last part of the names of all linears inside the blocks, as PEFT's `target_modules` wants them."""
        f = self.family
        paths = (*f.attention_in, f.attention_out, *f.mlp_in, f.mlp_out)
        return tuple(path.rpartition(".")[2] for path in paths)

    def gain(self, norm: nn.Module) -> torch.Tensor:
        """A residual norm's gain [d] in fp64."""
        return weight_of(norm).detach().double() + self.norm_offset

    def set_gain(self, norm: nn.Module, gain: torch.Tensor) -> None:
        """Store a gain, of whatever width, in the way the family does; the Parameter object stays."""
        weight = weight_of(norm)
        weight.data = (gain - self.norm_offset).to(weight)

    def epsilon(self, norm: nn.Module) -> float:
        """A norm's epsilon."""
        return float(getattr(norm, self.family.norm_epsilon))

    def set_epsilon(self, norm: nn.Module, epsilon: float) -> None:
        """Set a norm's epsilon."""
        setattr(norm, self.family.norm_epsilon, epsilon)

    def embedding_scale(self) -> float:
        """What the embedding's output is multiplied with, rounded as the forward pass rounds it."""
        if self.family.embedding_scale is None:
            return 1.0
        embedding = base(self.embedding)
        scale: torch.Tensor = embedding.get_buffer("embed_scale")
        return float(scale.to(weight_of(embedding).dtype))

    def set_embedding_scale(self, width: int) -> None:
        """Set the embedding's factor to the one that stock code computes for a hidden size of `width`."""
        if self.family.embedding_scale is None:
            return
        embedding = base(self.embedding)
        scale = self.family.embedding_scale(width)
        embedding.scalar_embed_scale = scale  # type: ignore[assignment]
        embedding.get_buffer("embed_scale").fill_(scale)


def base(module: nn.Module) -> nn.Module:
    """The layer that holds the weight: looks through PEFT's adapter layers."""
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer  # type: ignore[assignment]
    return module


def weight_of(module: nn.Module) -> nn.Parameter:
    """The weight of a layer, looking through adapters."""
    return base(module).get_parameter("weight")


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel (its linears may still be LoRA layers), or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def describe(model: nn.Module) -> Decoder:
    """Find a causal language model's parts.

    Args:
        model: a transformers `...ForCausalLM` of a family in `FAMILIES`, as such or inside a PeftModel.

    Raises:
        UnsupportedArchitecture: an unknown family, a LayerNorm family, a model without a head, or a family entry
            that does not fit; the message names what is missing.
    """
    model = unwrap(model)
    family = _family(model)
    blocks = tuple(_block(model, family, block) for block in _part(model, model, family.blocks).children())
    if not blocks:
        raise UnsupportedArchitecture(f"{type(model).__name__}: '{family.blocks}' holds no blocks")
    return Decoder(
        model=model,
        family=family,
        embedding=_part(model, model, family.embedding),
        blocks=blocks,
        final_norm=_part(model, model, family.final_norm),
        head=_part(model, model, family.head),
    )


def _family(model: nn.Module) -> Family:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    name = f"{type(model).__name__} (model_type {model_type!r})"
    if any(isinstance(module, nn.LayerNorm) for module in model.modules()):
        raise UnsupportedArchitecture(
            f"{name} normalises with LayerNorm, which subtracts the mean over all channels: channels that were zeroed "
            "come out non-zero, so no smaller stock model computes the same. The hidden size can be pruned in RMSNorm "
            f"families only: {', '.join(FAMILIES)}."
        )
    raise UnsupportedArchitecture(
        f"{name} is not a known family; known: {', '.join(FAMILIES)}. What is missing is an entry {model_type!r} in "
        "pyprune.architectures.FAMILIES that names its embedding, blocks, norms, projections and head "
        "(docs/families.md says what a family must satisfy, e.g. no norm after a branch, and which tests to run)."
    )


def _block(model: nn.Module, family: Family, block: nn.Module) -> Block:
    def linears(paths: tuple[str, ...]) -> tuple[nn.Module, ...]:
        return tuple(_part(model, block, path) for path in paths)

    return Block(
        module=block,
        reads=(
            Reads(_part(model, block, family.attention_norm), linears(family.attention_in)),
            Reads(_part(model, block, family.mlp_norm), linears(family.mlp_in)),
        ),
        writes=(_part(model, block, family.attention_out), _part(model, block, family.mlp_out)),
        head_norms=tuple(
            (_part(model, block, norm), _part(model, block, linear)) for norm, linear in family.head_norms
        ),
    )


def _part(model: nn.Module, root: nn.Module, path: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError:
        raise UnsupportedArchitecture(
            f"{type(model).__name__} has no '{path}' in its {type(root).__name__}, which the entry of its family "
            f"(model_type {model.config.model_type!r}) names; load the model with AutoModelForCausalLM, or correct the "  # type: ignore[union-attr]
            "entry in pyprune.architectures.FAMILIES"
        ) from None
