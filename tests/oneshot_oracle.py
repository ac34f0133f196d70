"""One-shot methods written again from their formulas in fp64, with none of the library's code: the model runs as a
whole, hooks note what a linear reads, and masks are chosen by Python's stable sort."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

GROUPS = {  # linears of a block that read one activation, in the order of the forward pass
    "llama": (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    "gpt2": (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    "opt": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.out_proj",), ("fc1",), ("fc2",)),
}
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "opt": "model.decoder.layers"}

Solve = Callable[[Tensor, Tensor, str], Tensor]  # (weight [out, in], x [tokens, in], name) -> weight


def read_by(model: nn.Module, linear: nn.Module, batches: list[Tensor]) -> Tensor:
    """All that a linear reads [tokens, in]."""
    found: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda module, args: found.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for ids in batches:
            model(input_ids=ids)
    handle.remove()
    return torch.cat(found)


def prune_model(model: nn.Module, family: str, batches: list[Tensor], solve: Solve, sequential: bool) -> None:
    """Block by block in place; `sequential`: group by group inside a block."""
    for block in model.get_submodule(BLOCKS[family]).children():
        groups = GROUPS[family] if sequential else (sum(GROUPS[family], ()),)
        for group in groups:
            read = {name: read_by(model, block.get_submodule(name), batches) for name in group}
            for name in group:
                weight = block.get_submodule(name).weight.data
                turned = weight.T if family == "gpt2" else weight
                turned.copy_(solve(turned.clone(), read[name], name))


def lowest(values: list[float], count: int) -> list[int]:
    """Indices of the `count` lowest; among equal ones the lower index first."""
    return sorted(range(len(values)), key=lambda i: values[i])[:count]


def mask_rows(scores: Tensor, drop: int) -> Tensor:
    """Wanda's mask: drop / out of each row, one more in the rows where that is cheapest."""
    rows = scores.tolist()
    each, more = divmod(drop, len(rows))
    costs = [sorted(row)[each] for row in rows]
    extra = lowest(costs, more)
    mask = torch.ones_like(scores, dtype=torch.bool)
    for r, row in enumerate(rows):
        mask[r, lowest(row, each + (r in extra))] = False
    return mask


def mask_all(scores: Tensor, drop: int) -> Tensor:
    mask = torch.ones(scores.numel(), dtype=torch.bool)
    mask[lowest(scores.flatten().tolist(), drop)] = False
    return mask.view_as(scores)


def mask_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for r, row in enumerate(scores.tolist()):
        for start in range(0, len(row), m):
            group = sorted(range(start, start + m), key=lambda j: -row[j])
            mask[r, group[:n]] = True
    return mask


def counts(model: nn.Module, family: str, sparsity: float) -> list[int]:
    """Weights to drop of every linear in order: the running total is rounded."""
    found, total, given = [], 0.0, 0
    for block in model.get_submodule(BLOCKS[family]).children():
        for name in sum(GROUPS[family], ()):
            total += sparsity * block.get_submodule(name).weight.numel()
            found.append(round(total) - given)
            given += found[-1]
    return found


def random_hessian(columns: int, seed: int = 0, rank: int | None = None) -> Tensor:
    """2 X X^T of correlated inputs [in, in], fp64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rank or 4 * columns, columns, generator=generator, dtype=torch.float64)
    x = x @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)).double()
    return 2 * x.T @ x
