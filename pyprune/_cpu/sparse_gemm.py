"""The `sparse_gemm` family: csrc/sparse_gemm_cpu.h."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune._cpu.common import DTYPE_CODES, Kernels, address


class SparseGemm(Kernels):
    """The family's ops."""

    def bitmap_linear(
        self,
        x: Tensor,
        values: Tensor,
        bitmap: Tensor,
        offsets: Tensor,
        bias: Tensor | None,
        out_features: int,
        in_features: int,
    ) -> Tensor:
        y, workspace = self._outputs(x, out_features, in_features)
        self.kernels.bitmap_linear(
            DTYPE_CODES[x.dtype],
            len(x),
            out_features,
            in_features,
            x.data_ptr(),
            values.data_ptr(),
            len(values),
            bitmap.data_ptr(),
            offsets.data_ptr(),
            address(bias),
            y.data_ptr(),
            workspace.data_ptr(),
            torch.get_num_threads(),
        )
        return y

    def nm_linear(self, x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
        y, workspace = self._outputs(x, len(values), x.shape[1])
        self.kernels.nm_linear(
            DTYPE_CODES[x.dtype],
            len(x),
            len(values),
            x.shape[1],
            n,
            m,
            x.data_ptr(),
            values.data_ptr(),
            metadata.data_ptr(),
            address(bias),
            y.data_ptr(),
            workspace.data_ptr(),
            torch.get_num_threads(),
        )
        return y

    def masked_linear(self, x: Tensor, weight: Tensor, mask_bits: Tensor, bias: Tensor | None) -> Tensor:
        y, workspace = self._outputs(x, *weight.shape)
        self.kernels.masked_linear(
            DTYPE_CODES[x.dtype],
            len(x),
            *weight.shape,
            x.data_ptr(),
            weight.data_ptr(),
            mask_bits.data_ptr(),
            address(bias),
            y.data_ptr(),
            workspace.data_ptr(),
            torch.get_num_threads(),
        )
        return y

    def gathered_linear(
        self, x: Tensor, weight: Tensor, in_index: Tensor | None, out_index: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        outputs = len(weight) if out_index is None else len(out_index)
        y, workspace = self._outputs(x, outputs, weight.shape[1])
        self.kernels.gathered_linear(
            DTYPE_CODES[x.dtype],
            len(x),
            outputs,
            x.shape[1],
            weight.shape[1],
            x.data_ptr(),
            weight.data_ptr(),
            address(in_index),
            address(out_index),
            address(bias),
            y.data_ptr(),
            workspace.data_ptr(),
            torch.get_num_threads(),
        )
        return y

    def _outputs(self, x: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
        """y, and the scratch that the kernels need."""
        size = self.kernels.sparse_gemm_workspace(len(x), in_features)
        return x.new_empty(len(x), out_features), torch.empty(size, dtype=torch.uint8)
