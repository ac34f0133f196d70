"""Where a decoder keeps its embedding, blocks, projections, norms and head.

This is the only file that knows model families. A family is one entry of `FAMILIES`; everything else in the package
works on the `Decoder` that `describe` returns. See docs/families.md for how to add one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
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
    and nothing else reads or writes the residual stream but the embedding, the final norm and the head, whose product
    is the logits as they are.
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

    @property
    def stack(self) -> str:
        """The model without its head, which calls the blocks."""
        return self.blocks.rpartition(".")[0]


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

# LayerNorm families: their hidden size cannot be pruned, but the weights of their blocks' linears can.
LAYER_NORM_FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        embedding="transformer.wte",
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        attention_norm="ln_1",
        attention_in=("attn.c_attn",),
        attention_out="attn.c_proj",
        mlp_norm="ln_2",
        mlp_in=("mlp.c_fc",),
        mlp_out="mlp.c_proj",
    ),
    "opt": Family(
        embedding="model.decoder.embed_tokens",
        blocks="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        attention_norm="self_attn_layer_norm",
        attention_out="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        mlp_in=("fc1",),
        mlp_out="fc2",
    ),
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
class Part:
    """The entries of one dimension of a linear that belong to groups: group g owns `width` of them, from
    `offset + g * width` on. `dim` is 0 for outputs (rows of the weight) and 1 for inputs (columns)."""

    linear: nn.Module
    dim: int
    offset: int
    width: int


@dataclass(frozen=True)
class Groups:
    """What can only go together from one branch of a block: `axis` is "heads" (one group is a key/value head with its
    query heads) or "channels" (of the MLP). The last part is the linear that writes, whose inputs a mask multiplies:
    a group whose inputs there are zero has no effect, biases of the others included."""

    block: int
    axis: str
    count: int
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """A name that stays the same with and without PEFT and through cuts."""
        return f"block{self.block}_{self.axis}"

    @property
    def writer(self) -> Part:
        """The inputs of the linear behind the branch."""
        return self.parts[-1]


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
        return self.model.get_submodule(self.family.stack)

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
    def rounding(self) -> int:
        """What a kept hidden size is a multiple of, beside `width_multiple`, unless one asks for another: the largest
        of 64, 32, 16 and 8, which hardware likes, that leaves eight sizes to choose from; else 1."""
        steps = (step for step in (64, 32, 16, 8) if 8 * math.lcm(step, self.width_multiple) <= self.hidden_size)
        return next(steps, 1)

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

    def groups(self) -> list[Groups]:
        """Heads and channels of all blocks, in their order, as the modules have them now."""
        found = []
        for i, block in enumerate(self.blocks):
            found.append(_heads(i, block, self.head_dim))
            found.append(_channels(i, block))
        return found

    def state_widths(self) -> None:
        """Make the attributes that attention, MLP and config keep beside the weights agree with them.

        Blocks of equal widths make a stock model. Others cannot: the config then says what each block has in
        `block_widths`, [[key/value heads, channels], ...], which `pyprune.models.open_model` reads.
        """
        config = self.config
        config.head_dim = self.head_dim  # it would follow from what changes now
        heads, channels = self.groups()[::2], self.groups()[1::2]
        widths = [[head.count, channel.count] for head, channel in zip(heads, channels, strict=True)]
        per_key = heads[0].writer.width // config.head_dim
        uniform = all(width == widths[0] for width in widths)
        vars(config).pop("block_widths", None)
        if uniform:
            config.num_attention_heads, config.num_key_value_heads = per_key * widths[0][0], widths[0][0]
            config.intermediate_size = widths[0][1]
        else:
            config.block_widths = widths
        for block, (keys, width) in zip(self.blocks, widths, strict=True):
            attention, mlp = (_parent(block.module, path) for path in (self.family.attention_out, self.family.mlp_out))
            _set_if_there(attention, num_key_value_heads=keys)
            _set_if_there(mlp, intermediate_size=width)
            if len(self.family.attention_in) == 1:  # Phi-3 splits the fused projection by its config's counts
                own = config if uniform else copy.copy(config)
                own.num_attention_heads, own.num_key_value_heads = per_key * keys, keys
                _set_if_there(attention, config=own)

    def keep_blocks(self, kept: Sequence[int]) -> None:
        """Leave only the blocks `kept`, in this order, in the model. This description is then out of date."""
        path, _, name = self.family.blocks.rpartition(".")
        setattr(self.model.get_submodule(path), name, nn.ModuleList(self.blocks[i].module for i in kept))
        for place, i in enumerate(kept):
            for module in self.blocks[i].module.modules():
                _set_if_there(module, layer_idx=place)  # where a block's keys and values lie in the cache
        if getattr(self.config, "layer_types", None):
            self.config.layer_types = [self.config.layer_types[i] for i in kept]
        self.config.num_hidden_layers = len(kept)

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


def _heads(i: int, block: Block, head_dim: int) -> Groups:
    """Groups of a key/value head with its query heads, which stock code keeps side by side."""
    queries = size_of(block.writes[0])[1]
    linears = block.reads[0].linears
    if len(linears) == 1:  # queries, keys and values are the rows of one matrix
        keys = (size_of(linears[0])[0] - queries) // 2
        rows = [(linears[0], 0, queries), (linears[0], queries, keys), (linears[0], queries + keys, keys)]
    else:
        rows = [(linear, 0, size_of(linear)[0]) for linear in linears]
    count = rows[1][2] // head_dim
    parts = [Part(linear, 0, offset, size // count) for linear, offset, size in rows]
    return Groups(i, "heads", count, (*parts, Part(block.writes[0], 1, 0, queries // count)))


def _channels(i: int, block: Block) -> Groups:
    """Every channel of an MLP: its row of each linear that reads, its column of the one that writes."""
    count = size_of(block.writes[1])[1]
    readers = [
        Part(linear, 0, offset, 1)
        for linear in block.reads[1].linears
        for offset in range(0, size_of(linear)[0], count)
    ]
    return Groups(i, "channels", count, (*readers, Part(block.writes[1], 1, 0, 1)))


def _parent(block: nn.Module, path: str) -> nn.Module:
    return block.get_submodule(path.rpartition(".")[0])


def _set_if_there(module: nn.Module, **values: Any) -> None:
    for name, value in values.items():
        if name in vars(module):
            setattr(module, name, value)


def base(module: nn.Module) -> nn.Module:
    """The layer that holds the weight: looks through PEFT's adapter layers."""
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer  # type: ignore[assignment]
    return module


def weight_of(module: nn.Module) -> nn.Parameter:
    """The weight of a layer, looking through adapters. Raises ValueError when it is packed."""
    layer = base(module)
    if getattr(layer, "weight", layer) is None:
        raise ValueError(
            f"{type(layer).__name__} holds packed weights, which cannot be changed; unpack them with model.dequantize()"
        )
    return layer.get_parameter("weight")


def size_of(linear: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear or GPT-2's Conv1D; the weight of a quantised one may have any shape."""
    layer: Any = base(linear)
    if hasattr(layer, "nf"):
        return int(layer.nf), int(layer.nx)
    return int(layer.out_features), int(layer.in_features)


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel (its linears may still be LoRA layers), or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def stack_of(model: nn.Module) -> nn.Module | None:
    """The model without its head, which calls the blocks; None for a family that has no entry here."""
    model = unwrap(model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    family = FAMILIES.get(model_type) or LAYER_NORM_FAMILIES.get(model_type)  # type: ignore[arg-type]
    return model.get_submodule(family.stack) if family else None


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


# ------------------------------------------------------------------------------------ blocks, for blockwise pruning


@dataclass(frozen=True)
class Linear:
    """One linear of a block. `matrix` is its weight as [out, in], whichever way round the family stores it."""

    name: str  # inside its block
    module: nn.Module

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as [in, out]: GPT-2's Conv1D."""
        from transformers.pytorch_utils import Conv1D

        return isinstance(self.module, Conv1D)

    @property
    def matrix(self) -> torch.Tensor:
        """A view [out, in] of the live weight; writing to it writes to the model."""
        return self.stored(weight_of(self.module).data)

    def stored(self, matrix: torch.Tensor) -> torch.Tensor:
        """[out, in] the way round that the module stores it (and back), as a view."""
        return matrix.T if self.transposed else matrix


@dataclass(frozen=True)
class Branch:
    """Attention or MLP: `reads` all read one activation, `write` adds to the residual stream."""

    name: str
    reads: tuple[Linear, ...]
    write: Linear


@dataclass(frozen=True)
class BlockLinears:
    """One decoder block as pruning of single weights sees it."""

    name: str  # inside the model
    module: nn.Module
    branches: tuple[Branch, Branch]


@dataclass(frozen=True)
class Trunk:
    """The blocks of a model, and `stack`: the model without its head, which calls them."""

    stack: nn.Module
    blocks: tuple[BlockLinears, ...]


def describe_blocks(model: nn.Module) -> Trunk:
    """The blocks of a causal language model and their linears, LayerNorm families included.

    Raises:
        UnsupportedArchitecture: an unknown family, a model without a head, or a family entry that does not fit.
        ValueError: the model has adapters.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    family = LAYER_NORM_FAMILIES.get(model_type) or _family(unwrap(model))  # type: ignore[arg-type]

    def linear(block: nn.Module, path: str) -> Linear:
        module = _part(model, block, path)
        if base(module) is not module:
            raise ValueError(f"model: {path} carries an adapter; fold it first with pyprune.surgery.fold_adapters")
        return Linear(path, module)

    def branches(block: nn.Module) -> tuple[Branch, Branch]:
        def branch(name: str, reads: tuple[str, ...], write: str) -> Branch:
            return Branch(name, tuple(linear(block, path) for path in reads), linear(block, write))

        return (
            branch("attention", family.attention_in, family.attention_out),
            branch("mlp", family.mlp_in, family.mlp_out),
        )

    model = unwrap(model)
    blocks = _part(model, model, family.blocks).named_children()
    return Trunk(
        stack=model.get_submodule(family.stack),
        blocks=tuple(BlockLinears(f"{family.blocks}.{i}", block, branches(block)) for i, block in blocks),
    )
