"""Bases of the residual stream: its statistics, the principal axes, and a rotation folded into the weights.

An RMSNorm without its gain commutes with an orthogonal matrix, so one global Q [d, d] can be folded into a decoder's
weights without changing its function (Ashkboos et al., SliceGPT, arXiv 2401.15024, theorem 1). Choosing Q as the
principal axes of what the blocks read puts most of the signal into few channels, which pruning then keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pyprune.architectures import describe, weight_of
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
    rows = torch.zeros(0, dtype=torch.bool, device=device)

    def add(norm: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        x = args[0][rows]
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
            rows = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            decoder.stack(**inputs, use_cache=False)
            tokens += int(rows.sum())
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


def pca(covariance: torch.Tensor) -> torch.Tensor:
    """Principal axes Q [d, d], fp64: columns by falling eigenvalue, each one's largest entry positive.

    Raises:
        ValueError: `covariance` is not a finite square matrix.
    """
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1] or not torch.isfinite(covariance).all():
        raise ValueError(f"covariance: expected a finite [d, d] matrix, found shape {list(covariance.shape)}")
    matrix = covariance.double()
    vectors = torch.linalg.eigh((matrix + matrix.T) / 2).eigenvectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


@torch.no_grad()
def rotate(model: nn.Module, q: torch.Tensor) -> nn.Module:
    """Fold the norms' gains and an orthogonal basis into the weights, in place; the model's function stays the same.

    The residual stream x becomes x Q. Gains move into their readers (the final norm's into the head, which is untied
    for it): W <- W diag(g) Q, g <- 1. Writers: W <- Q^T W, b <- Q^T b. Embedding: E <- E Q. In fp64, then back to the
    dtype.

    Args:
        model: a causal language model without adapters.
        q: [d, d], orthogonal.

    Raises:
        ValueError: adapters present, or `q` of a wrong shape or not orthogonal.
    """
    decoder = describe(model)
    refuse_adapters(decoder, "rotate")
    _check_orthogonal(q, decoder.hidden_size)
    untie(decoder)
    for reads in decoder.reads():
        gain = decoder.gain(reads.norm)
        for linear in reads.linears:
            fold_right(linear, gain[:, None] * q.to(gain))
        decoder.set_gain(reads.norm, torch.ones_like(gain))
    for name, writer in decoder.writers().items():
        fold: Callable[[nn.Module, torch.Tensor], None] = fold_right if name == "embedding" else fold_left
        fold(writer, q if name == "embedding" else q.T)
    return model


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
    """`rotate` for a model that goes on training with LoRA, in place; its norms' gains must be folded already.

    Returns:
        For each trained parameter that changed, how, so that its optimiser's moments can follow.

    Raises:
        ValueError: `q` of a wrong shape or not orthogonal, a gain that is not one, DoRA, or tied embeddings.
    """
    decoder = describe(model)
    _check_orthogonal(q, decoder.hidden_size)
    if decoder.tied or any(not (decoder.gain(reads.norm) == 1).all() for reads in decoder.reads()):
        raise ValueError("rotate_adapted: the norms' gains are not folded; call pyprune.basis.rotate(model, q) first")
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
