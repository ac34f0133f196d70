"""BESA (arXiv 2402.16880): how much every row of a block loses is learnt from the block's own output error.

Importance is Wanda's and ranks every row once. A row's rate is the mean of a distribution over candidate rates, and its
gradient passes straight through the mask by way of the probability that a weight of a given rank is kept
(`ops.rank_allocate`). docs/besa.md has the formulas and where this departs from the authors' program.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from pyprune import ops
from pyprune.blockwise import Block, InputNorm
from pyprune.methods import option
from pyprune.methods.oneshot import OneShot
from pyprune.methods.sparsegpt import check_group
from pyprune.methods.wanda import wanda_scores

STEPS = 100  # the candidate rates are 0, 1/STEPS, ..., 1
CLIPPING_START = 4.0  # sigmoid: 0.98 of the largest weight of a group


@dataclass
class BESA(OneShot):
    """Minimises, over the logits of the rates of a block's rows,

        sum_c ||y_c - t_c||^2 / ||t_c||^2 / d + penalty ((s - s*) / s*)^2

    with y the block's output, s its sparsity and `s*` what that should be."""

    pattern: str = option("layer", "only layer: BESA itself counts out every row")
    rates: str = option("row", "what has a rate of its own: every row, or every layer", choices=["row", "layer"])
    targets: str = option(
        "pruned",
        "outputs to match: of the dense block on what comes through the pruned ones, or of the dense model",
        choices=["pruned", "dense"],
    )
    epochs: int = option(1, "passes over the calibration batches for each block")
    learning_rate: float = option(0.05, "Adam's step on the logits, falling to 0")
    spread: float = option(0.3, "standard deviation, at first, of the distribution over rates")
    temperature: float = option(1.0, "of the softmax over rates")
    penalty: float = option(5.0, "weight of the squared relative deviation from the sparsity")
    bits: int = option(0, "also round what survives to so many bits, with learnt clipping (0: do not)")
    bits_group: int = option(64, "inputs that share one scale of the rounding (0: all of a row)")
    clipping_rate: float = option(0.01, "Adam's step on the clipping")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern != "layer":
            raise ValueError(
                f"pattern is {self.pattern!r}, but BESA learns how much every row loses; use the pattern layer, or "
                "another method"
            )
        for name, known in {"rates": ("row", "layer"), "targets": ("pruned", "dense")}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {' or '.join(known)}")
        for name, least in (("epochs", 1), ("penalty", 0), ("bits_group", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {least}")
        for name in ("learning_rate", "spread", "temperature", "clipping_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number")
        if self.bits not in (0, 2, 3, 4, 5, 6, 7, 8):
            raise ValueError(f"bits is {self.bits}; expected 0 or 2 to 8")

    @property
    def reference(self) -> Literal["pruned", "dense"]:  # type: ignore[override]
        """See `blockwise.BlockMethod`."""
        return "dense" if self.targets == "dense" else "pruned"

    def check_linear(self, name: str, outputs: int, inputs: int) -> None:
        """Raises ValueError when groups of `bits_group` inputs do not divide those of the linear."""
        if self.bits:
            check_group(self.bits_group, name, inputs)

    def solve(self, block: Block) -> dict[str, float]:
        """Returns `learnt`, the block's sparsity before it was made exact, and the standard deviation of the rates of
        rows, `rates_std`."""
        norms = block.statistics(InputNorm)
        linears = {
            name: _Allocated(self, linear.matrix, norms[name].norm, _share(block))
            for name, linear in block.linears.items()
        }
        groups = [{"params": [x.theta for x in linears.values()], "lr": self.learning_rate}]
        if self.bits:
            groups.append({"params": [x.clipping for x in linears.values()], "lr": self.clipping_rate})
        block.descend(torch.optim.Adam(groups), self.epochs, partial(self._loss, block, linears))
        return self._finish(block, linears)

    def _loss(self, block: Block, linears: dict[str, _Allocated], i: int) -> Tensor:
        assert block.targets is not None
        betas = {name: linear.beta() for name, linear in linears.items()}
        output = block.forward(i, {name: linear.weight(betas[name]) for name, linear in linears.items()})
        rates = {name: mean_rate(beta).mean() for name, beta in betas.items()}
        size = sum(block.dense[name].numel() for name in linears)
        sparsity = sum(rate * (block.dense[name].numel() / size) for name, rate in rates.items())
        wanted = _share(block)
        return relative_error(output, block.targets[i]) + self.penalty * ((sparsity - wanted) / wanted) ** 2

    def _finish(self, block: Block, linears: dict[str, _Allocated]) -> dict[str, float]:
        """Makes the sparsity exact and the masks final."""
        wanted = [linear.counts() for linear in linears.values()]
        width = [
            torch.full_like(counts, linear.rank.shape[1])
            for counts, linear in zip(wanted, linears.values(), strict=True)
        ]
        counts = exact_counts(torch.cat(wanted), torch.cat(width), sum(block.drop.values()))
        for (name, linear), mine in zip(linears.items(), counts.split([len(c) for c in wanted]), strict=True):
            if self.bits:
                block.write(name, linear.rounded())
            block.keep(name, linear.rank.to(torch.int32) >= mine.to(torch.int32)[:, None])
        rates, widths = torch.cat(wanted) / torch.cat(width), torch.cat(width)
        return {"learnt": float(torch.cat(wanted).sum() / widths.sum()), "rates_std": float(rates.std(correction=0))}


class _Allocated:
    """One linear: its weight, the ranks in its rows, the logits of its rates, and its clipping."""

    def __init__(self, options: BESA, weight: Tensor, norm: Tensor, sparsity: float) -> None:
        self.options, self.dense = options, weight
        self.rank = ranks(wanda_scores(weight, norm))
        rows, columns = weight.shape
        start = start_logits(sparsity, options.spread, options.temperature).to(norm)
        self.theta = start.repeat(rows if options.rates == "row" else 1, 1).requires_grad_()
        groups = columns // (options.bits_group or columns)
        self.clipping = norm.new_full((rows, groups, 2), CLIPPING_START).requires_grad_()

    def beta(self) -> Tensor:
        """The distributions over rates, [rows or 1, STEPS + 1]."""
        return (self.theta / self.options.temperature).softmax(1)

    def weight(self, beta: Tensor) -> Tensor:
        """The masked weight, with gradients for the rates and the clipping."""
        weight = self._rounded() if self.options.bits else self.dense
        return ops.rank_allocate(weight, self.rank, beta.expand(len(weight), -1))

    @torch.no_grad()
    def counts(self) -> Tensor:
        """How many weights each row would lose, not yet whole: fp64 [rows]."""
        return mean_rate(self.beta().double()).expand(len(self.rank)) * self.rank.shape[1]

    @torch.no_grad()
    def rounded(self) -> Tensor:
        """The dense weight on its grid."""
        return self._rounded()

    def _rounded(self) -> Tensor:
        return round_to_grid(self.dense, self.clipping, self.options.bits)


def _share(block: Block) -> float:
    """The sparsity that the block must have."""
    return sum(block.drop.values()) / sum(weight.numel() for weight in block.dense.values())


def ranks(scores: Tensor) -> Tensor:
    """uint16 [out, in]: the place of each score in its row, 0 the lowest; among equal ones the lower index is first."""
    order = scores.argsort(dim=1, stable=True)
    places = torch.arange(scores.shape[1], dtype=torch.int32, device=scores.device).expand_as(order)
    return torch.empty_like(places).scatter_(1, order, places).to(torch.uint16)


def mean_rate(beta: Tensor) -> Tensor:
    """alpha [rows]: the mean of each distribution over the candidate rates."""
    return beta @ torch.linspace(0, 1, STEPS + 1, dtype=beta.dtype, device=beta.device)


def start_logits(sparsity: float, spread: float, temperature: float) -> Tensor:
    """fp64 [STEPS + 1]: of a normal distribution over the rates, cut off at 0 and 1, whose mean is the sparsity."""
    rates = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
    logits = torch.empty_like(rates)
    low, high = -1000 - 2 / spread**2, 1000 + 2 / spread**2
    for _ in range(100):
        tilt = (low + high) / 2
        logits = tilt * rates - rates**2 / (2 * spread**2)
        low, high = (tilt, high) if float(mean_rate(logits.softmax(0))) < sparsity else (low, tilt)
    return (logits - logits.max()) * temperature


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """The squared error of each channel over its squared norm in the target, averaged over channels. [B, T, d]"""
    dtype = torch.promote_types(output.dtype, torch.float32)
    output, target = output.flatten(0, -2).to(dtype), target.flatten(0, -2).to(dtype)
    norm = target.square().sum(0).clamp(min=torch.finfo(dtype).tiny)
    return ((output - target).square().sum(0) / norm).mean()


def exact_counts(wanted: Tensor, width: Tensor, total: int) -> Tensor:
    """Whole numbers near `wanted` [rows], each from 0 to its row's `width`, that sum to `total`: all rates are shifted
    alike, fractions are cut off, and the rows with the largest ones get one more. Both fp64; so is the result."""
    low, high = -1.0, 1.0
    for _ in range(60):
        shift = (low + high) / 2
        counts = (wanted + shift * width).clamp(min=0).minimum(width)
        low, high = (shift, high) if float(counts.sum()) < total else (low, shift)
    whole = counts.floor()
    missing = total - int(whole.sum())
    room = (counts - whole).masked_fill(whole >= width, -1)
    whole[room.topk(missing).indices] += 1
    return whole


def round_to_grid(weight: Tensor, clipping: Tensor, bits: int) -> Tensor:
    """Rounds to 2^bits levels between sigmoid(clipping) times the extremes of each group of inputs (OmniQuant, arXiv
    2308.13137), 0 being one of them; gradients for `clipping` [out, groups, 2] pass straight through the rounding."""
    groups = weight.unflatten(1, (clipping.shape[1], -1)).to(clipping.dtype)
    share = clipping.sigmoid()
    high = share[..., :1] * groups.amax(-1, keepdim=True).clamp(min=0)
    low = share[..., 1:] * groups.amin(-1, keepdim=True).clamp(max=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(clipping.dtype).tiny)
    zero = _round(-low / scale)
    code = (_round(groups / scale) + zero).clamp(0, 2**bits - 1)
    return ((code - zero) * scale).flatten(1).to(weight.dtype)


def _round(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()
