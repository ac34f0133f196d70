"""SlimGPT: cut heads and MLP channels in the order that costs least once the others make up for it, then LoRA (Ling et
al., NeurIPS 2024, arXiv 2412.18110; the same surgery as ZipLM's, arXiv 2302.04089).

A group can go when the columns that it owns in the linear that writes are zero. With X [T, in] what that linear reads
through the pruned blocks before it, W [out, in] its weight and H = X^T X, damped, zeroing the columns g adds at least

    tr(W_g (H^-1_gg)^-1 W_g^T)   to |X (W - W')^T|^2,   reached by   W' = W - W_g (H^-1_gg)^-1 H^-1_g:

(the optimal brain surgeon, for groups). The cheapest group goes, the others make up for it, and again, until the
block has the target's width. Nothing is trained for it, and no gradient taken; it costs about what SparseGPT does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pyprune import plan
from pyprune.architectures import Groups, describe
from pyprune.blockwise import Block, prune
from pyprune.calibration import Gram
from pyprune.methods import option
from pyprune.methods.oneshot import OneShot
from pyprune.methods.planned import PlannedCut
from pyprune.methods.sparsegpt import inverse_factor, prepare


@dataclass
class SlimGPT(PlannedCut):
    """Cut before training; satisfies `Method`."""

    damping: float = option(0.01, "added to the Hessian's diagonal, as a share of its mean")
    at_once: int = option(16, "channels that go before the others make up for them")

    reads_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damping <= 0:
            raise ValueError(f"damping is {self.damping}; expected a positive number")
        if self.at_once < 1:
            raise ValueError(f"at_once is {self.at_once}; expected at least 1 channel")

    def planned(self, model: nn.Module, calibration: Sequence[Tensor] | None, known: plan.Plan | None) -> plan.Plan:
        """What costs least goes, and the others make up for it: this needs the calibration of a resumed run too.

        Raises:
            ValueError: as `PlannedCut.planned`, or the model has adapters. PruningError, one of these, when activations
                or weights are not finite.
        """
        self.refuse_adapters(model)
        decoder, widths = describe(model), self.widths(model)
        if not calibration:
            raise ValueError(
                "calibration: SlimGPT reads text, and there is none: give calibration (a FILE; in Python token ids, "
                "each [batch, tokens])"
            )
        columns = _Columns(self, decoder.groups(), widths, known)
        prune(model, columns, calibration, progress=True)
        return known or plan.choose(decoder, self.target, widths, columns.stays)


class _Columns(OneShot):
    """What the engine of one-shot pruning runs. It counts no single weights: the plan counts columns. `known`: a plan
    that says what stays, which is else chosen here."""

    def __init__(
        self, options: SlimGPT, groups: Sequence[Groups], widths: plan.Widths, known: plan.Plan | None = None
    ) -> None:
        super().__init__(sparsity=1e-12)
        self.options, self.widths, self.known = options, widths, known.kept if known else {}
        self.groups = {g.writer.linear: g for g in groups}
        self.stays: dict[str, Tensor] = {}  # by group, 1 for those that stay

    def solve(self, block: Block) -> dict[str, float]:
        """Returns `loss`: the squared error on the calibration text that the solves predict, over both linears."""
        total = 0.0
        for branch in block.branches:
            name = branch.write.name
            groups = self.groups[branch.write.module]
            keep = getattr(self.widths, groups.axis)[groups.block]
            weight = block.linears[name].matrix
            if keep == groups.count:
                self.stays[groups.name] = torch.ones(groups.count)
                continue
            hessian = block.statistics(Gram, [name])[name].total
            dead = prepare(hessian, self.options.damping)
            factor = inverse_factor(hessian, f"{block.name}.{name}").double()
            solved, stays, loss = remove_columns(
                weight.double().masked_fill(dead, 0),
                factor.T @ factor,
                groups.count,
                keep,
                self.options.at_once if groups.axis == "channels" else 1,
                self.known.get(groups.name),
            )
            block.write(name, solved.to(weight.dtype))
            self.stays[groups.name] = stays.float().cpu()
            total += loss
        return {"loss": total}


def remove_columns(
    weight: Tensor, inverse: Tensor, groups: int, keep: int, at_once: int = 1, kept: Sequence[int] | None = None
) -> tuple[Tensor, Tensor, float]:
    """Zeroes groups of neighbouring columns, cheapest first, and lets the others make up for them.

    Args:
        weight: [out, in], fp64. inverse: of the Hessian [in, in], fp64. Both are changed in place.
        groups: how many there are, of in / groups columns each. keep: how many stay.
        at_once: groups that go between two updates.
        kept: the groups that stay, where that was decided before; in whatever order the others go, the weight is the
            same but for roundings.

    Returns:
        The weight, bool [groups] of what stays, and the squared error that was added.
    """
    width, device = weight.shape[1] // groups, weight.device
    stays = torch.ones(groups, dtype=torch.bool, device=device)
    loss = torch.zeros((), dtype=weight.dtype, device=device)
    decided = torch.zeros_like(stays)
    if kept is not None:
        decided[list(kept)] = True
    for left in range(groups - keep, 0, -at_once):
        costs = _costs(weight, inverse, stays, width).masked_fill(decided, torch.inf)
        gone = costs.topk(min(at_once, left), largest=False).indices
        columns = (gone[:, None] * width + torch.arange(width, device=device)).flatten()
        removed, rows = weight[:, columns], inverse[columns]
        solved = torch.linalg.solve(rows[:, columns], torch.cat([rows, removed.T], dim=1))
        update, error = solved.split([weight.shape[1], len(removed)], dim=1)
        loss += (error * removed.T).sum()
        weight.addmm_(removed, update, alpha=-1)
        inverse.addmm_(inverse[:, columns], update, alpha=-1)
        weight[:, columns] = 0
        stays[gone] = False
    return weight, stays, float(loss)


def _costs(weight: Tensor, inverse: Tensor, stays: Tensor, width: int) -> Tensor:
    """[groups]: the squared error that zeroing each group alone adds; infinite for those that are gone."""
    groups = len(stays)
    blocks = inverse.view(groups, width, groups, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    blocks = torch.where(stays[:, None, None], blocks, torch.eye(width).to(blocks))  # what is gone has zeros there
    columns = weight.T.reshape(groups, width, -1)
    solved = columns / blocks if width == 1 else torch.linalg.solve(blocks, columns)
    return (columns * solved).sum((1, 2)).masked_fill(~stays, torch.inf)
