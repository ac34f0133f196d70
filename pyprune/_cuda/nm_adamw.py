"""The `nm_adamw` family on the launchers of csrc/nm_adamw.h."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune._cpu.common import DTYPE_CODES, address
from pyprune._cpu.nm_adamw import adamw_options, converts
from pyprune._cuda.common import Launchers
from pyprune.reference.nm_adamw import masked_weight


class NmAdamw(Launchers):
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
        with torch.cuda.device_of(param):
            self.kernels.nm_adamw(
                DTYPE_CODES[param.dtype],
                *param.shape,
                adamw_options(*options),  # type: ignore[arg-type]
                param.data_ptr(),
                grad.data_ptr(),
                exp_avg.data_ptr(),
                exp_avg_sq.data_ptr(),
                address(mask),
                self.stream(param.device),
            )

    def masked_weight(self, weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
        if not converts(weight.dtype, dtype):
            return masked_weight(weight, mask, dtype)
        out = torch.empty_like(weight, dtype=dtype)
        with torch.cuda.device_of(weight):
            self.kernels.masked_weight(
                DTYPE_CODES[weight.dtype],
                DTYPE_CODES[dtype],
                *weight.shape,
                weight.data_ptr(),
                mask.data_ptr(),
                out.data_ptr(),
                self.stream(weight.device),
            )
        return out
