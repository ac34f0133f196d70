"""The `nm_adamw` family on the kernels of csrc/nm_adamw_cpu.h."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune._cpu.common import DTYPE_CODES, Kernels, address
from pyprune.reference.nm_adamw import masked_weight


def adamw_options(
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    masked_decay: float,
    step: int,
    seed: int,
) -> tuple[float | int, ...]:
    """The fields of AdamW in csrc/nm_adamw.h."""
    rate, correction = lr / (1 - beta1**step), 1 / (1 - beta2**step)
    keep = 1 - lr * weight_decay
    return (beta1, 1 - beta1, beta2, 1 - beta2, keep, rate, correction, eps, masked_decay, seed & 0xFFFFFFFF)


def converts(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether the kernels write a masked weight of one dtype in the other."""
    return source == target or (source == torch.float32 and target in DTYPE_CODES)


class NmAdamw(Kernels):
    """The family's ops."""

    def nm_adamw_(
        self,
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        mask: Tensor | None,
        *options: float,
    ) -> None:
        self.kernels.nm_adamw(
            DTYPE_CODES[param.dtype],
            *param.shape,
            adamw_options(*options),  # type: ignore[arg-type]
            param.data_ptr(),
            grad.data_ptr(),
            exp_avg.data_ptr(),
            exp_avg_sq.data_ptr(),
            address(mask),
            torch.get_num_threads(),
        )

    def masked_weight(self, weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
        if not converts(weight.dtype, dtype):
            return masked_weight(weight, mask, dtype)
        out = torch.empty_like(weight, dtype=dtype)
        self.kernels.masked_weight(
            DTYPE_CODES[weight.dtype],
            DTYPE_CODES[dtype],
            *weight.shape,
            weight.data_ptr(),
            mask.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out
