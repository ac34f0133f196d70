"""Bases of the residual stream: its statistics, the principal axes, and a rotation folded into the weights.

An RMSNorm without its gain commutes with an orthogonal matrix, so one global Q [d, d] can be folded into a decoder's
weights without changing its function (Ashkboos et al., SliceGPT, arXiv 2401.15024, theorem 1). Choosing Q as the
principal axes of what the blocks read puts most of the signal into few channels, which pruning then keeps.

Between the last block and the head stands the final norm's gain g. It can move into the head, which a tied one would
need a matrix of its own for. Or it stays, and the head tied, when Q mixes only channels of one gain: then
diag(g) Q = Q diag(w). Most channels of a trained model have nearly one gain, and `level` makes equal what nearly is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pyprune.architectures import Decoder, describe, weight_of
from pyprune.calibration import check_calibration
from pyprune.surgery import ROWS_AT_ONCE, fold_left, fold_right, input_axes, output_axes, refuse_adapters, untie

Batch = torch.Tensor | Mapping[str, torch.Tensor]


@torch.no_grad()
def covariance(model: nn.Module, batches: Iterable[Batch]) -> torch.Tensor:
    """Second moment [d, d], fp64, of the normalised block inputs, summed over all residual norms, mean over tokens.

    A norm's row is x / sqrt(mean(x^2) + eps), before its gain. Rows whose `attention_mask` is 0 are left out.

    Args:
        model: a causal language model; its head is not run.
        batches: token ids [B, T], or mappings with `input_ids` and optionally `attention_mask`, each [B, T].

    Raises:
        ValueError: no tokens at all, ids that do not fit the model, or non-finite activations.
    """
    decoder = describe(model)
    device = weight_of(decoder.embedding).device
    total = torch.zeros(decoder.hidden_size, decoder.hidden_size, dtype=torch.float64, device=device)
    tokens = 0
    rows: torch.Tensor | None = None  # of a batch without padding all count, and no mask is waited for

    def add(norm: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        x = args[0].flatten(0, -2) if rows is None else args[0][rows]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + decoder.epsilon(norm))
        total.add_((x.T @ x).to(total))

    handles = [reads.norm.register_forward_hook(add) for reads in decoder.reads()]
    was_training = decoder.model.training
    decoder.model.eval()
    try:
        for batch in batches:
            ids: Any = batch.get("input_ids") if isinstance(batch, Mapping) else batch
            check_calibration(model, [ids], "batches")
            inputs = _inputs(batch, device)
            rows = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
            decoder.stack(**inputs, use_cache=False)
            tokens += inputs["input_ids"].numel() if rows is None else int(rows.sum())
    finally:
        for handle in handles:
            handle.remove()
        decoder.model.train(was_training)
    if tokens == 0:
        raise ValueError("batches: found no token to take statistics of; give at least one batch of token ids [B, T]")
    if not torch.isfinite(total).all():
        raise ValueError("batches: the model's activations are not finite; check the weights, or use bf16 or fp32")
    return total / tokens


def _inputs(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        return {"input_ids": batch.to(device)}
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch}


@torch.no_grad()
def level(model: nn.Module, tolerance: float = 0.1) -> nn.Module:
    """Make nearly equal gains of a tied model's final norm equal, in place, so that a rotation may mix these channels.

    The only step here that changes the function, if little (docs/pat.md has figures). Gains of one sign that lie within
    `tolerance` of a middle get their mean, the most numerous first. A model whose head is untied stays as it is.

    Raises:
        ValueError: `tolerance` is not a share, at least 0 and below 1.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; expected a share, at least 0 and below 1")
    decoder = describe(model)
    if decoder.tied:
        gain = decoder.gain(decoder.final_norm)
        for sign in (1, -1):
            order = (sign * gain).argsort()
            order = order[gain[order] > 0] if sign > 0 else order[gain[order] < 0]
            for near in _nearly_equal(gain[order].abs(), (1 + tolerance) / (1 - tolerance)):
                gain[order[near]] = gain[order[near]].mean()
        decoder.set_gain(decoder.final_norm, gain)
    return model


def _nearly_equal(values: torch.Tensor, reach: float) -> Iterator[slice]:
    """Cuts rising positive values into runs whose last is at most `reach` times the first, the longest run first."""
    todo = [(0, len(values))]
    while todo:
        begin, end = todo.pop()
        if begin == end:
            continue
        part = values[begin:end].contiguous()
        ends = torch.searchsorted(part, part * reach, right=True)
        first = int((ends - torch.arange(len(part), device=ends.device)).argmax())
        last = int(ends[first])
        yield slice(begin + first, begin + last)
        todo += [(begin, begin + first), (begin + last, end)]


def mixable(model: nn.Module) -> torch.Tensor:
    """Which channels a rotation may mix without a change of the function or an untied head: a group's number for each
    channel, int64 [d]. Untied, all are of one group; tied, those whose gains in the final norm are equal."""
    decoder = describe(model)
    gain = decoder.gain(decoder.final_norm)
    return gain.unique(return_inverse=True)[1] if decoder.tied else torch.zeros_like(gain, dtype=torch.int64)


def pca(covariance: torch.Tensor, groups: torch.Tensor | None = None) -> torch.Tensor:
    """Principal axes Q [d, d], fp64: columns by falling variance, each one's largest entry positive.

    Args:
        covariance: [d, d], symmetric.
        groups: int64 [d], a group's number for each channel; every axis then stays within a group.

    Raises:
        ValueError: `covariance` is not a finite square matrix.
    """
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1] or not torch.isfinite(covariance).all():
        raise ValueError(f"covariance: expected a finite [d, d] matrix, found shape {list(covariance.shape)}")
    matrix = covariance.double()
    matrix = (matrix + matrix.T) / 2
    if groups is None:
        groups = torch.zeros(len(matrix), dtype=torch.int64)
    vectors, variances = torch.zeros_like(matrix), torch.zeros_like(matrix[0])
    for group in groups.unique():
        own = (groups == group).nonzero().flatten().to(matrix.device)
        variances[own], vectors[own[:, None], own] = torch.linalg.eigh(matrix[own[:, None], own])
    vectors = vectors[:, variances.argsort(descending=True, stable=True)]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


def to_principal_axes(
    model: nn.Module,
    calibration: Sequence[torch.Tensor] | None,
    untied: bool = False,
    q: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate a model to the principal axes of its normalised block inputs, in place.

    Args:
        model: a causal language model without adapters.
        calibration: token ids, each [B, T].
        untied: give a tied head a matrix of its own; else it stays tied, and only channels are mixed whose gains in the
            final norm are nearly equal (`level`).
        q: the axes of an earlier call on the same model, instead of `calibration`.

    Returns:
        The axes [d, d], fp64.

    Raises:
        ValueError: neither calibration batches nor `q`, and what `covariance` and `rotate` refuse.
    """
    if q is None and not calibration:
        raise ValueError(
            "calibration: a basis of principal axes needs token ids to look at; pass calibration=[ids, ...], each "
            "[batch, tokens], or choose basis='identity'"
        )
    if untied:
        untie(describe(model))
    else:
        level(model)
    if q is None:
        q = pca(covariance(model, calibration or ()), mixable(model))
    rotate(model, q)
    return q


@torch.no_grad()
def rotate(model: nn.Module, q: torch.Tensor) -> nn.Module:
    """Fold the norms' gains and an orthogonal basis into the weights, in place; the model's function stays the same.

    The residual stream x becomes x Q. Gains move into their readers: W <- W diag(g) Q, g <- 1. Writers: W <- Q^T W,
    b <- Q^T b. Embedding: E <- E Q. In fp64, then back to the dtype. A tied head stays tied, with the final norm's
    gains carried along, if `q` mixes only channels of the same gain; otherwise it is untied.

    Args:
        model: a causal language model without adapters.
        q: [d, d], orthogonal.

    Raises:
        ValueError: adapters present, or `q` of a wrong shape or not orthogonal.
    """
    decoder = describe(model)
    refuse_adapters(decoder, "rotate")
    _check_orthogonal(q, decoder.hidden_size)
    gain_behind = _carried(decoder, q)
    if gain_behind is None:
        untie(decoder)
    for reads in decoder.reads():
        gain = decoder.gain(reads.norm)
        if reads.norm is decoder.final_norm and gain_behind is not None:
            decoder.set_gain(reads.norm, gain_behind)
            continue
        for linear in reads.linears:
            fold_right(linear, gain[:, None] * q.to(gain))
        decoder.set_gain(reads.norm, torch.ones_like(gain))
    for name, writer in decoder.writers().items():
        fold: Callable[[nn.Module, torch.Tensor], None] = fold_right if name == "embedding" else fold_left
        fold(writer, q if name == "embedding" else q.T)
    return model


def _carried(decoder: Decoder, q: torch.Tensor) -> torch.Tensor | None:
    """w [d] with diag(g) Q = Q diag(w), g the gains of a tied model's final norm; None where there is no such w."""
    if not decoder.tied:
        return None
    gain = decoder.gain(decoder.final_norm)
    q = q.to(gain)
    carried = gain[q.abs().argmax(0)]  # taken, not computed, so that equal gains stay equal
    error = (gain[:, None] * q - q * carried).abs().max()
    return carried if error <= 1e-9 * gain.abs().max() else None


def _check_orthogonal(q: torch.Tensor, width: int) -> None:
    if q.shape != (width, width):
        raise ValueError(f"q: expected shape [{width}, {width}] (hidden_size), found {list(q.shape)}")
    error = float((q.double().T @ q.double() - torch.eye(width, dtype=torch.float64, device=q.device)).abs().max())
    if not error < 1e-6:  # written so that NaN fails too
        raise ValueError(f"q: not orthogonal, max |Q^T Q - I| is {error:.1e}, expected below 1e-6; compute it in fp64")


@dataclass(frozen=True)
class Rotation:
    """What happened to a parameter: its dimension `dim` was expressed in the basis `q` [d, d].

    Call it on the parameter or on its gradient's mean; `squared` is for a mean of squares, whose entries it mixes as if
    they were uncorrelated.
    """

    dim: int
    q: torch.Tensor

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._mix(tensor, self.q)

    def squared(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._mix(tensor, self.q.square())

    def _mix(self, tensor: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        wide, q = tensor.double(), q.to(tensor.device, torch.float64)
        return (wide @ q if self.dim == 1 else q.T @ wide).to(tensor.dtype)


@torch.no_grad()
def rotate_adapted(model: nn.Module, q: torch.Tensor) -> dict[nn.Parameter, Rotation]:
    """`rotate` for a model that goes on training with LoRA, in place; it must have been rotated once already.

    Returns:
        For each trained parameter that changed, how, so that its optimiser's moments can follow.

    Raises:
        ValueError: `q` of a wrong shape or not orthogonal, gains that are not one (of a tied model's final norm: that
            `q` mixes although they differ), or DoRA.
    """
    decoder = describe(model)
    _check_orthogonal(q, decoder.hidden_size)
    gain_behind = _carried(decoder, q)
    folded = [reads.norm for reads in decoder.reads() if not (decoder.tied and reads.norm is decoder.final_norm)]
    if any(not (decoder.gain(norm) == 1).all() for norm in folded):
        raise ValueError("rotate_adapted: the norms' gains are not folded; call pyprune.basis.rotate(model, q) first")
    if decoder.tied:
        if gain_behind is None:
            raise ValueError(
                "rotate_adapted: q mixes channels whose gains in the final norm differ, which a tied head cannot "
                "follow; keep to the groups of pyprune.basis.mixable(model)"
            )
        decoder.set_gain(decoder.final_norm, gain_behind)
    readers = [linear for reads in decoder.reads() for linear in reads.linears]
    axes = [axis for reader in readers for axis in input_axes(reader)]
    axes += [axis for writer in decoder.writers().values() for axis in output_axes(writer)]
    if any(getattr(writer, "lora_magnitude_vector", None) for writer in decoder.writers().values()):
        raise ValueError("rotate_adapted: DoRA's magnitudes of single outputs cannot follow a rotation of the outputs")
    changes = {parameter: Rotation(dim, q) for parameter, dim in axes}
    for parameter, change in changes.items():
        parameter.data = (
            torch.cat([change(rows) for rows in parameter.data.split(ROWS_AT_ONCE)])
            if (change.dim == 1)
            else change(parameter.data)
        )
    return {parameter: change for parameter, change in changes.items() if parameter.requires_grad}
