"""Training with N:M masks: the fused optimiser step, and the masked weight that a product reads."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from pyprune._ops.dispatch import define, expect_float, expect_like, expect_shape, run

# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _check_mask(op: str, like: Tensor, mask: Tensor) -> None:
    expect_like(op, like, torch.uint8, mask=mask)
    expect_shape(op, "mask", mask, like.shape[0], -(-like.shape[1] // 8))


def _expect_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(
            f"nm_adamw_: {name} is changed in place and must be contiguous; its strides are {tensor.stride()}"
        )


def _check_nm_adamw(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, mask: Tensor | None) -> None:
    op = "nm_adamw_"
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise TypeError(f"{op}: param is {param.dtype}, expected torch.float32 or torch.bfloat16 (or torch.float64)")
    if param.dim() != 2:
        raise ValueError(f"{op}: param has shape {list(param.shape)}, expected two dimensions")
    expect_like(op, param, param.dtype, grad=grad)
    wide = torch.promote_types(param.dtype, torch.float32)
    expect_like(op, param, wide, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    for name, tensor in {"grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}.items():
        expect_shape(op, name, tensor, *param.shape)
    for name, tensor in {"param": param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}.items():
        _expect_contiguous(name, tensor)
    if mask is not None:
        _check_mask(op, param, mask)


def _check_masked_weight(weight: Tensor, mask: Tensor) -> None:
    expect_float("masked_weight", "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"masked_weight: weight has shape {list(weight.shape)}, expected two dimensions")
    _check_mask("masked_weight", weight, mask)


# ---------------------------------------------------------------------------------------------------------------------
# The ops and their fake kernels


def _nm_adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mask: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    masked_decay: float,
    step: int,
    seed: int,
) -> None:
    _check_nm_adamw(param, grad, exp_avg, exp_avg_sq, mask)
    tensors = (param, grad, exp_avg, exp_avg_sq, mask)
    run("nm_adamw_", param, tensors, lr, beta1, beta2, eps, weight_decay, masked_decay, step, seed)
    for tensor in (param, exp_avg, exp_avg_sq):  # kernels write by address, which autograd does not see
        torch.autograd.graph.increment_version(tensor)


def _nm_adamw_fake(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mask: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    masked_decay: float,
    step: int,
    seed: int,
) -> None:
    _check_nm_adamw(param, grad, exp_avg, exp_avg_sq, mask)


def _masked_weight(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    _check_masked_weight(weight, mask)
    return cast(Tensor, run("masked_weight", weight, (weight, mask), dtype))


def _masked_weight_fake(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    _check_masked_weight(weight, mask)
    return weight.new_empty(weight.shape, dtype=dtype)


define(
    "nm_adamw_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor? mask, float lr,"
    " float beta1, float beta2, float eps, float weight_decay, float masked_decay, int step, int seed) -> ()",
    _nm_adamw,
    _nm_adamw_fake,
)
define("masked_weight(Tensor weight, Tensor mask, ScalarType dtype) -> Tensor", _masked_weight, _masked_weight_fake)


# ---------------------------------------------------------------------------------------------------------------------
# The functional API


def nm_adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mask: Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    masked_decay: float,
    step: int,
    seed: int = 0,
) -> None:
    """One AdamW step, in place, that also shrinks masked weights (AST, arXiv 2407.20584, section 3.2):

        m <- b1 m + (1 - b1) g;   u = m + masked_decay (1 - mask) W;   v <- b2 v + (1 - b2) u^2
        W <- W (1 - lr weight_decay) - lr / (1 - b1^step) u / (sqrt(v / (1 - b2^step)) + eps)

    v is a moment of u, not of g, so that a step is about lr for every weight, and up to 1 / (1 - b1) of that in the
    first ones. Without a mask this is AdamW: u = m, and v is a moment of g.

    Args:
        param, grad: W and g, [rows, columns] in fp32 or bf16 (fp64 by the reference), or of any shape without a mask.
        exp_avg, exp_avg_sq: m and v, of W's shape in fp32 (fp64 for fp64).
        mask: uint8 [rows, ceil(columns / 8)], one bit a weight, 1 = kept; None for plain AdamW.
        step: the number of this step, from 1.
        seed: of the rounding to bf16, which is stochastic: element i takes the upper 16 bits of hash32(i + seed), so
            that the same seed gives the same result. Steps should have seeds of their own. fp32 is not rounded.

    Raises:
        TypeError, ValueError: dtypes or shapes that differ; param, exp_avg or exp_avg_sq with gaps in memory, or, with
            a mask or of different layouts, not contiguous.
    """
    if mask is None:
        order = range(param.dim())
        if not param.is_contiguous():  # channels last, say: its dimensions as they lie in memory
            order = sorted(order, key=param.stride, reverse=True)  # type: ignore[assignment]
        param, exp_avg, exp_avg_sq = (
            _rows(name, tensor.permute(tuple(order)))
            for name, tensor in {"param": param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}.items()
        )
        grad = _rows("grad", grad.permute(tuple(order)).contiguous())
    torch.ops.pyprune.nm_adamw_(
        param, grad, exp_avg, exp_avg_sq, mask, lr, *betas, eps, weight_decay, masked_decay, step, seed & 0xFFFFFFFF
    )


def _rows(name: str, tensor: Tensor) -> Tensor:
    """The same memory as [rows, columns]."""
    _expect_contiguous(name, tensor)
    return tensor.view(1, -1) if tensor.dim() < 2 else tensor.flatten(0, -2)  # a view, as it is contiguous


def masked_weight(weight: Tensor, mask: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """m * W [rows, columns] in `dtype` (default: the weight's); no gradient.

    Args:
        weight: [rows, columns]. What is masked comes out as zero, whatever it is.
        mask: uint8 [rows, ceil(columns / 8)], one bit a weight, 1 = kept.
    """
    return torch.ops.pyprune.masked_weight(weight, mask, dtype or weight.dtype)
