"""The `hsm` family on the CUDA launchers of csrc/hsm_fused.h.

The weight gradients are plain matrix products over T, so torch computes them; everything else is one launcher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune._cpu.common import DTYPE_CODES, address
from pyprune._cuda.common import Launchers


class Hsm(Launchers):
    """The family's ops."""

    def hsm(self, x: Tensor, l0: Tensor, v: Tensor, l1: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        y, h = x.new_empty(len(x), len(l1)), x.new_empty(len(x), len(l0))
        self._launch("hsm_forward", x, l0, l1, (), (x, l0, v, l1, mask, y, h))
        return y, h

    def hsm_backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        h: Tensor,
        l0: Tensor,
        v: Tensor,
        l1: Tensor,
        mask: Tensor,
        output_mask: list[bool],
    ) -> tuple[Tensor, ...]:
        wants_x, wants_l0, wants_v, wants_l1, wants_mask = output_mask
        grad_x, grad_p, grad_v = torch.empty_like(x), torch.empty_like(h), torch.empty_like(v)
        column_dot = torch.empty_like(mask) if wants_mask else None
        if wants_x or wants_l0 or wants_v or wants_mask:
            outputs = (grad_x, grad_p, grad_v, column_dot)
            self._launch("hsm_backward", x, l0, l1, (), (grad_y, x, h, l0, v, l1, mask, *outputs))
        grad_l1, grad_mask = l1.new_empty(0), mask.new_empty(0)
        if wants_l1 or wants_mask:
            g = grad_y.T @ (h * v.to(h.dtype))
            if wants_l1:
                grad_l1 = (mask[:, None] * g).to(l1.dtype)
            if column_dot is not None:
                grad_mask = column_dot + (l1 * g.to(mask.dtype)).sum(1)
        return (
            grad_x if wants_x else x.new_empty(0),
            grad_p.T @ x if wants_l0 else l0.new_empty(0),
            grad_v if wants_v else v.new_empty(0),
            grad_l1,
            grad_mask,
        )

    def hsm_residual_rmsnorm(
        self,
        x: Tensor,
        l0: Tensor,
        v: Tensor,
        l1: Tensor,
        mask: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        residual_out, normed = torch.empty_like(residual), torch.empty_like(residual)
        h, rstd = x.new_empty(len(x), len(l0)), v.new_empty(len(x))
        tensors = (x, l0, v, l1, mask, residual, weight, residual_out, normed, h, rstd)
        self._launch("hsm_residual_rmsnorm_forward", x, l0, l1, (eps,), tensors)
        return residual_out, normed, h, rstd

    def hsm_residual_rmsnorm_backward(
        self,
        grad_residual_out: Tensor,
        grad_normed: Tensor,
        x: Tensor,
        h: Tensor,
        residual_out: Tensor,
        rstd: Tensor,
        l0: Tensor,
        v: Tensor,
        l1: Tensor,
        mask: Tensor,
        weight: Tensor,
        output_mask: list[bool],
    ) -> tuple[Tensor, ...]:
        wants_x, wants_residual, wants_l0, wants_v, wants_l1, wants_mask, wants_weight = output_mask
        grad_residual, grad_weight = torch.empty_like(residual_out), v.new_empty(len(weight))
        tensors = (grad_residual_out, grad_normed, residual_out, rstd, weight, grad_residual, grad_weight)
        self._launch("rmsnorm_backward", x, l0, l1, (), tensors)
        wants = [wants_x, wants_l0, wants_v, wants_l1, wants_mask]
        grad_x, *others = self.hsm_backward(grad_residual, x, h, l0, v, l1, mask, wants)
        return (
            grad_x,
            grad_residual if wants_residual else x.new_empty(0),
            *others,
            grad_weight.to(weight.dtype) if wants_weight else weight.new_empty(0),
        )

    def _launch(
        self,
        function: str,
        x: Tensor,
        l0: Tensor,
        l1: Tensor,
        options: tuple[float, ...],
        tensors: tuple[Tensor | None, ...],
    ) -> None:
        """Calls a launcher: shape and dtype of the op, its options, addresses, a workspace, the stream."""
        shape, dtype = (*x.shape, len(l0), len(l1)), DTYPE_CODES[x.dtype]
        with torch.cuda.device_of(x):
            workspace = x.new_empty(self.kernels.hsm_workspace(shape, dtype), dtype=torch.uint8)
            addresses = [address(tensor) for tensor in tensors]
            stream = self.stream(x.device)
            getattr(self.kernels, function)(shape, dtype, *options, *addresses, workspace.data_ptr(), stream)
