"""Reconstruction of what survived pruning (arXiv 2510.14444): the weights that a mask left are trained so that
attention and MLP, one after the other, give what they gave before, on the calibration text that pruned them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune.blockwise import Block
from pyprune.calibration import sum_over_processes


@dataclass(frozen=True)
class Reconstruction:
    """A step that any one-shot method can add: `prune(model, method, calibration, then=[Reconstruction()])`.

    For attention, then for the MLP of each block: minimises ||u - t||^2 / ||t||^2 over its surviving weights, with u
    what it adds to the residual stream and t what it added with dense weights, both for the inputs that come through
    what is pruned before it. Zeros stay zeros. Weights are trained in fp32 by Adam and rounded to their dtype.

    Attributes:
        epochs: passes over the calibration batches for each of the two, a step for every batch (`Block.descend`).
        learning_rate: Adam's step as a share of the root mean square of a linear's surviving weights, falling to 0.
    """

    epochs: int = 1
    learning_rate: float = 0.02

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.learning_rate <= 0:
            raise ValueError(
                f"epochs is {self.epochs} and learning_rate {self.learning_rate}; expected at least one epoch and a "
                "positive step"
            )

    def __call__(self, block: Block) -> dict[str, float]:
        """Returns both branches' relative squared error on the calibration text, `before_NAME` and `after_NAME`."""
        figures: dict[str, float] = {}
        for branch in block.branches:
            names = [linear.name for linear in (*branch.reads, branch.write)]
            errors = self._reconstruct(block, names, branch.write.name)
            figures |= {f"{when}_{branch.name}": error for when, error in zip(("before", "after"), errors, strict=True)}
        return figures

    def _reconstruct(self, block: Block, names: list[str], write: str) -> tuple[float, float]:
        dense = {name: block.dense[name] for name in names}
        targets = [block.capture(i, [write], dense)[write][1].to("cpu") for i in range(len(block))]
        survivors = {name: _Survivors(block.linears[name].matrix) for name in names}
        before = self._error(block, write, targets, {name: block.linears[name].matrix for name in names})
        groups = [{"params": [s.values], "lr": self.learning_rate * s.scale} for s in survivors.values()]

        def loss(i: int) -> Tensor:
            weights = {name: s.weight() for name, s in survivors.items()}
            error, size = _squares(block.capture(i, [write], weights)[write][1], targets[i])
            return error / size

        block.descend(torch.optim.Adam(groups, betas=(0.9, 0.95)), self.epochs, loss)
        found = {name: s.weight().detach() for name, s in survivors.items()}
        after = self._error(block, write, targets, found)
        if after < before:
            for name, weight in found.items():
                block.write(name, weight)
        return before, min(before, after)

    def _error(self, block: Block, write: str, targets: list[Tensor], weights: Mapping[str, Tensor]) -> float:
        squares = torch.zeros(2, dtype=torch.float64)
        for i, target in enumerate(targets):
            squares += torch.stack(_squares(block.capture(i, [write], weights)[write][1], target)).cpu()
        error, size = sum_over_processes(squares.to(block.inputs.device)).tolist()
        return error / size if size else 0.0


class _Survivors:
    """The surviving weights of one linear in fp32 (fp64 for fp64), and where they are."""

    def __init__(self, weight: Tensor) -> None:
        self.dtype, self.mask = weight.dtype, weight != 0
        values = weight.to(torch.promote_types(weight.dtype, torch.float32))
        self.scale = float(values.square().sum() / self.mask.sum().clamp(min=1)) ** 0.5
        self.values = values.clone().requires_grad_()

    def weight(self) -> Tensor:
        """[out, in] in the weight's dtype, with a gradient for the values that survive."""
        return (self.values * self.mask).to(self.dtype)


def _squares(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(||output - target||^2, ||target||^2)."""
    target = target.to(output.device)
    dtype = torch.promote_types(output.dtype, torch.float32)
    return (output - target).to(dtype).square().sum(), target.to(dtype).square().sum()
