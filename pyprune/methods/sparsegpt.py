"""SparseGPT (arXiv 2301.00774): columns are pruned one after the other, and those behind make up for the error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune import patterns
from pyprune._ops.sparsegpt import MAX_GROUP
from pyprune.blockwise import Block, PruningError
from pyprune.methods import option
from pyprune.methods.oneshot import OneShot
from pyprune.ops import sparsegpt_solve
from pyprune.reference.bits import unpack_bits


@dataclass
class SparseGPT(OneShot):
    """Scores W^2 / U_jj^2 in slabs of columns, U the upper Cholesky factor of the inverse Hessian of the layer's
    squared error."""

    pattern: str = option("layer", "layer (counted in each slab), balanced (in its rows) or N:M, N of every M stay")
    true_sequential: bool = option(True, "linears read what the pruned ones before them in the block give")
    damping: float = option(0.01, "added to the Hessian's diagonal, as a share of its mean")
    slab: int = option(128, "columns that are pruned together")
    bits: int = option(0, "round the surviving weights to so many bits in the same solve (0: do not)")
    bits_group: int = option(128, "inputs that share one scale of the rounding (0: all of a row)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern == "row":
            raise ValueError("pattern is 'row', but SparseGPT counts in slabs of columns; choose layer or balanced")
        if patterns.parse(self.pattern).m > MAX_GROUP:
            raise ValueError(
                f"pattern is {self.pattern!r}; SparseGPT's solve takes N:M with M up to {MAX_GROUP}; choose a smaller "
                "M, or another method"
            )
        if self.damping <= 0 or self.slab < 1:
            raise ValueError(f"damping is {self.damping} and slab {self.slab}; expected positive numbers")
        if not (self.bits == 0 or 2 <= self.bits <= 8) or self.bits_group < 0:
            raise ValueError(
                f"bits is {self.bits} and bits_group {self.bits_group}; expected 0 or 2 to 8 bits, and a group of 0 or "
                "more inputs"
            )

    def check_linear(self, name: str, outputs: int, inputs: int) -> None:
        """Raises ValueError when groups of `bits_group` inputs do not divide those of the linear."""
        if self.bits:
            check_group(self.bits_group, name, inputs)

    def solve(self, block: Block) -> dict[str, float]:
        """Returns `loss`: the squared error on the calibration text that the solves predict, over all linears."""
        loss = 0.0
        for names, gram in block.grams(self.true_sequential):
            hessian = 2 * gram
            dead = prepare(hessian, self.damping)
            factor = inverse_factor(hessian, f"{block.name}.{names[0]}")
            for name in names:
                loss += self._solve(block, name, factor, dead)
        return {"loss": loss}

    def _solve(self, block: Block, name: str, factor: Tensor, dead: Tensor) -> float:
        weight = block.linears[name].matrix.to(factor.dtype).masked_fill(dead, 0)
        pattern, columns = block.pattern, weight.shape[1]
        scale, zero = None, None
        if self.bits:
            scale, zero = rounding_grid(weight, self.bits, self.bits_group or columns)
        solved, bits, loss = sparsegpt_solve(
            weight,
            factor,
            block.drop[name],
            pattern.n,
            pattern.m,
            per_row=pattern.name == "balanced",
            block=self.slab // pattern.m * pattern.m or pattern.m if pattern.grouped else self.slab,
            scale=scale,
            zero=zero,
            levels=2**self.bits - 1,
        )
        block.write(name, solved)
        block.keep(name, unpack_bits(bits, columns))
        return float(loss)


def check_group(group: int, name: str, inputs: int) -> None:
    """Raises ValueError when a `bits_group` (0: all inputs of a row) does not divide the inputs of a linear."""
    if inputs % (group or inputs):
        raise ValueError(
            f"bits_group is {group}, which does not divide the {inputs} inputs of {name}; give a divisor of them, or 0"
        )


def prepare(hessian: Tensor, damping: float) -> Tensor:
    """Damps a Hessian [in, in] in place and returns which inputs are dead, bool [in]: those get a 1 on the diagonal."""
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += damping * diagonal.mean()
    return dead


def inverse_factor(hessian: Tensor, name: str) -> Tensor:
    """U [in, in], upper, with U^T U the inverse of a damped Hessian. One that rounding leaves singular is damped more.

    Raises PruningError when that does not help.
    """
    for _ in range(4):
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return factor
        hessian = hessian.clone()
        hessian.diagonal().add_(0.1 * hessian.diagonal().mean())
    raise PruningError(
        f"{name}: the Hessian of its inputs is singular however much it is damped; the calibration text is too "
        "monotonous or the activations too large: give more text, or load the model in float32"
    )


def rounding_grid(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """(scale, zero) [out, in / group] of the asymmetric grid of 2^bits levels that spans each group and holds 0."""
    groups = weight.unflatten(1, (-1, group))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1)
    return scale, (-low / scale).round()
