"""The `sparse_gemm` family: few tokens on the launchers of csrc/sparse_gemm.h, more on the expanded weight by torch.

2:4 for many tokens runs on CUTLASS where the build has it (csrc/cutlass/sparse_gemm.h).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyprune._cpu.common import DTYPE_CODES, address
from pyprune._cuda.bitmap import Bitmap, sixteen_bytes
from pyprune._cuda.nm import Nm
from pyprune._cuda.nm_adamw import NmAdamw
from pyprune._cuda.plans import Plan, plan, suits_cutlass

COPY_TOKENS = 1800
"""Tokens whose product costs as much as copying the weight. On an H100, 4096 x 11008 at 2048 tokens: copying three
quarters of the inputs by an index takes 153 us, 4.5 ps an element, and the dense product 228 us, 2.5 fs each."""


class SparseGemm(Bitmap, Nm, NmAdamw):
    """The family's ops, and those that they need for many tokens."""

    def nm_linear(self, x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
        if (n, m) == (2, 4):
            if hasattr(self.kernels, "nm_linear_cutlass") and suits_cutlass(x, len(values)):
                y = self._multiply_by_cutlass(x, values, metadata)
                return y if bias is None else y.add_(bias)
            chosen = plan("nm_linear", x, len(values))
            if chosen is not None:
                return self._multiply("nm_linear", chosen, x, (values, metadata), bias, len(values))
        return linear(x, self.nm_decompress(values, metadata, n, m), bias)

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
        chosen = plan("bitmap_linear", x, out_features)
        if chosen is None:
            return linear(x, self.bitmap_unpack(values, bitmap, offsets, out_features, in_features), bias)
        weight = (sixteen_bytes(values), len(values), sixteen_bytes(bitmap), offsets)
        return self._multiply("bitmap_linear", chosen, x, weight, bias, out_features)

    def masked_linear(self, x: Tensor, weight: Tensor, mask_bits: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, self.masked_weight(weight, mask_bits, weight.dtype), bias)

    def gathered_linear(
        self, x: Tensor, weight: Tensor, in_index: Tensor | None, out_index: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Few tokens take the whole weight, which is read once either way: x is spread, y gathered. So a weight that
        is left out must be finite. For many the kept part is copied, and the product is smaller."""
        outputs = len(weight) if out_index is None else len(out_index)
        kept = x.shape[1] * outputs / max(1, weight.numel())
        if len(x) * (1 - kept) > COPY_TOKENS * kept:
            rows = weight if out_index is None else weight[out_index]
            part = rows if in_index is None else rows[:, in_index]
            return linear(x, part, bias if bias is None or out_index is None else bias[out_index])
        if in_index is not None:
            x = x.new_zeros(len(x), weight.shape[1]).index_copy_(1, in_index, x)
        y = linear(x, weight, bias)
        return y if out_index is None else y[:, out_index]

    def _multiply(
        self,
        function: str,
        chosen: Plan,
        x: Tensor,
        weight: tuple[Tensor | int, ...],
        bias: Tensor | None,
        outputs: int,
    ) -> Tensor:
        """Calls a launcher: shape, plan and dtype, addresses (and sizes) of tensors, room for the parts of the sum, the
        stream."""
        tokens, inputs = x.shape
        y = x.new_empty(tokens, outputs)
        parts = chosen.splits if chosen.splits > 1 else 0
        partial = x.new_empty(parts, tokens, outputs, dtype=torch.float32)
        addresses = [part if isinstance(part, int) else address(part) for part in (x, *weight, bias, y, partial)]
        with torch.cuda.device_of(x):
            getattr(self.kernels, function)(
                (tokens, inputs, outputs),
                chosen.tensor_cores,
                chosen.splits,
                DTYPE_CODES[x.dtype],
                *addresses,
                self.stream(x.device),
            )
        return y

    def _multiply_by_cutlass(self, x: Tensor, values: Tensor, metadata: Tensor) -> Tensor:
        x, values = sixteen_bytes(x), sixteen_bytes(values)
        y = x.new_empty(len(x), len(values))
        shape, dtype = (*x.shape, len(values)), DTYPE_CODES[x.dtype]
        with torch.cuda.device_of(x):
            workspace = x.new_empty(self.kernels.nm_linear_cutlass_workspace(shape, dtype), dtype=torch.uint8)
            addresses = [tensor.data_ptr() for tensor in (x, values, metadata, y, workspace)]
            self.kernels.nm_linear_cutlass(shape, dtype, *addresses, self.stream(x.device))
        return y
