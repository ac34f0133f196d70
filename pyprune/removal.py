"""Exact removal of heads, MLP channels and blocks: what is cut out had no effect on the *masked* model.

A group (architectures.Groups) is masked by zeroing its inputs of the linear that writes: nothing of it reaches the
residual stream then, whatever its other weights and biases are. So its rows of q, k, v, gate and up and its columns of
the output and down projections can go. Removing a block leaves what passes by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyprune import surgery
from pyprune.architectures import Decoder, Groups, Part, describe, size_of, weight_of
from pyprune.surgery import Selection


def entries(part_width: int, offset: int, groups: Tensor) -> Tensor:
    """Indices of the entries that `groups` own in a dimension: `part_width` each, in rising order of the groups."""
    return (offset + groups[:, None] * part_width + torch.arange(part_width)).flatten()


def axes_of(part: Part) -> Iterator[tuple[nn.Parameter, int]]:
    """The parameters of a part's linear and its adapters that have its dimension, and where."""
    return surgery.input_axes(part.linear) if part.dim == 1 else surgery.output_axes(part.linear)


def check_groups(groups: Groups, kept: Sequence[int] | Tensor) -> Tensor:
    """The kept groups as rising indices on the CPU. Raises ValueError for none, repeated ones or ones out of range."""
    index = torch.as_tensor(kept).cpu()
    valid = index.ndim == 1 and index.numel() > 0 and not index.is_floating_point() and index.dtype != torch.bool
    if not valid or int(index.min()) < 0 or int(index.max()) >= groups.count or len(index.unique()) != len(index):
        raise ValueError(
            f"kept[{groups.name!r}]: expected different indices from 0 to {groups.count - 1}, at least one, found "
            f"{index.tolist()}"
        )
    return index.long().sort().values


@torch.no_grad()
def remove_groups(model: nn.Module, kept: Mapping[str, Sequence[int] | Tensor]) -> dict[nn.Parameter, Selection]:
    """Cut blocks down to the heads and channels `kept`, in place, also in a model that goes on training with LoRA.

    Parameter objects stay the same (their `.data` is replaced, gradients are dropped), so optimizers stay valid once
    their moments are cut with the returned selections (`training.carry_moments`). The config follows.

    Args:
        model: a causal language model, plain or with LoRA or DoRA.
        kept: for groups by name (`Groups.name`), the indices that stay; others stay as they are.

    Returns:
        For each parameter that changed, how.

    Raises:
        ValueError: unknown names, bad indices, quantised weights, or other adapters than LoRA and DoRA. Nothing has
            been changed then.
    """
    decoder = describe(model)
    found = {groups.name: groups for groups in decoder.groups()}
    if unknown := sorted(kept.keys() - found.keys()):
        raise ValueError(f"kept: unknown groups {unknown}; expected names like {', '.join(list(found)[:2])}")
    chosen = {name: check_groups(found[name], index) for name, index in kept.items()}
    cut = [found[name] for name in chosen if len(chosen[name]) < found[name].count]
    linears = {part.linear: part.dim for groups in cut for part in groups.parts}
    surgery.refuse_what_cannot_be_cut(linears, "remove_groups")

    selections: dict[nn.Parameter, Selection] = {}
    for groups in cut:
        for linear, dim in {part.linear: part.dim for part in groups.parts}.items():
            parts = [part for part in groups.parts if part.linear is linear]  # several when they share a matrix
            index = torch.cat([entries(part.width, part.offset, chosen[groups.name]) for part in parts])
            if dim == 1:
                surgery.keep_dora_norms(linear, surgery.complement(index, size_of(linear)[1]))
            selections |= {parameter: Selection(axis, index) for parameter, axis in axes_of(parts[0])}
    surgery.select(selections, linears)
    decoder.state_widths()
    return selections


def as_config(model: nn.Module) -> nn.Module:
    """Cut a freshly built model, in place, to the `block_widths` of its config, if it has any.

    Raises:
        ValueError: `block_widths` is not a pair of counts for each block, of at most the config's own.
    """
    widths = getattr(getattr(model, "config", None), "block_widths", None)
    if widths is None:
        return model
    groups = describe(model).groups()
    counts = [count for pair in widths for count in pair]
    if len(counts) != len(groups) or any(not 0 < n <= g.count for n, g in zip(counts, groups, strict=True)):
        raise ValueError(
            f"config.json: block_widths has {len(widths)} entries, the first {widths[0]}; expected for each of "
            f"{len(groups) // 2} blocks [key/value heads, channels], at most {[g.count for g in groups[:2]]}"
        )
    remove_groups(model, {g.name: range(count) for g, count in zip(groups, counts, strict=True)})
    return model


def remove_blocks(model: nn.Module, kept: Sequence[int]) -> nn.Module:
    """Leave only the blocks `kept` of a model, in their order, in place.

    Raises:
        ValueError: `kept` is empty, not rising, or names a block that is not there.
    """
    decoder = describe(model)
    check_blocks(len(decoder.blocks), kept)
    decoder.keep_blocks(kept)
    return model


def check_blocks(count: int, kept: Sequence[int]) -> None:
    """Raises ValueError unless `kept` are rising indices of some of `count` blocks."""
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= count:
        raise ValueError(f"kept: expected rising indices of blocks, 0 to {count - 1}, at least one, found {list(kept)}")


@contextmanager
def masked(model: nn.Module, kept: Mapping[str, Sequence[int] | Tensor]) -> Iterator[Decoder]:
    """The function that the model will have once only `kept` is left, without cutting: the others' inputs of the
    linear behind them are zero. For looking at a plan's effect before it is applied."""
    decoder = describe(model)
    found = {groups.name: groups for groups in decoder.groups()}
    handles = []
    for name, index in kept.items():
        writer = found[name].writer
        mask = torch.zeros(size_of(writer.linear)[1], device=weight_of(writer.linear).device)
        mask[entries(writer.width, writer.offset, check_groups(found[name], index))] = 1
        handles.append(writer.linear.register_forward_pre_hook(_times(mask)))
    try:
        yield decoder
    finally:
        for handle in handles:
            handle.remove()


def _times(mask: Tensor) -> Callable[..., tuple[Any, ...]]:
    return lambda module, args: (args[0] * mask.to(args[0].dtype), *args[1:])
