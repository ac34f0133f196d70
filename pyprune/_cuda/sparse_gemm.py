"""The `sparse_gemm` family: few tokens on the launchers of csrc/sparse_gemm.h, more on the expanded weight by torch.

2:4 for many tokens runs on CUTLASS where the build has it (csrc/cutlass/sparse_gemm.h).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyprune._cpu.common import DTYPE_CODES, address
from pyprune._cuda.bitmap import Bitmap, sixteen_bytes
from pyprune._cuda.nm import Nm
from pyprune._cuda.nm_adamw import NmAdamw
from pyprune._cuda.plans import Plan, plan, suits_cutlass

COPY_TOKENS = 360
"""Tokens whose product costs as much as copying the weight, on an H100: (4 bytes / 3.35 TB/s) / (2 / 600 TFLOP/s)."""


ROWS = 64
"""Outputs of a block (csrc/sparse_gemm.cu)."""
RESERVE = 1 << 18
"""Tickets of a device, 2 MiB, for calls that are captured in CUDA graphs."""


class Tickets:
    """Zeros by which blocks count each other (csrc/sparse_gemm.h); a launch leaves them zero.

    Launches that may run at the same time must not share them. Those of one stream run one after the other and do.
    A captured one may be replayed on any stream, beside anything, and has some of its own for good, from a reserve made
    by the first call that is not captured. Without a reserve, or when it is used up, they are zeroed inside the graph.
    """

    def __init__(self) -> None:
        self.of_stream: dict[tuple[torch.device, int], Tensor] = {}
        self.reserve: dict[torch.device, Tensor] = {}

    def take(self, device: torch.device, stream: int, count: int) -> Tensor:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            left = self.reserve.get(device)
            if left is None or len(left) < count:
                return torch.zeros(count, dtype=torch.int64, device=device)
            self.reserve[device] = left[count:]
            return left[:count]
        if device.type == "cuda" and device not in self.reserve:
            self.reserve[device] = torch.zeros(RESERVE, dtype=torch.int64, device=device)
        found = self.of_stream.get((device, stream))
        if found is None or len(found) < count:
            found = self.of_stream[device, stream] = torch.zeros(count, dtype=torch.int64, device=device)
        return found


class SparseGemm(Bitmap, Nm, NmAdamw):
    """The family's ops, and those that they need for many tokens."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.tickets = Tickets()

    def nm_linear(self, x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
        if (n, m) == (2, 4):
            chosen = plan("nm_linear", x)
            if chosen is not None:
                return self._multiply("nm_linear", chosen, x, (values, metadata), bias, len(values))
            if hasattr(self.kernels, "nm_linear_cutlass") and suits_cutlass(x, len(values)):
                y = self._multiply_by_cutlass(x, values, metadata)
                return y if bias is None else y.add_(bias)
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
        chosen = plan("bitmap_linear", x)
        if chosen is None:
            return linear(x, self.bitmap_unpack(values, bitmap, offsets, out_features, in_features), bias)
        weight = (sixteen_bytes(values), sixteen_bytes(bitmap), offsets)
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
        self, function: str, chosen: Plan, x: Tensor, weight: tuple[Tensor, ...], bias: Tensor | None, outputs: int
    ) -> Tensor:
        """Calls a launcher: shape, plan and dtype, addresses, room for parts of sums, tickets, the stream."""
        tokens, inputs = x.shape
        y = x.new_empty(tokens, outputs)
        partial = x.new_empty(2 * chosen.blocks, min(tokens, 64), ROWS, dtype=torch.float32)
        with torch.cuda.device_of(x):
            stream = self.stream(x.device)
            tickets = self.tickets.take(x.device, stream, -(-outputs // ROWS) * -(-tokens // 4))
            addresses = [address(tensor) for tensor in (x, *weight, bias, y, partial, tickets)]
            getattr(self.kernels, function)(
                (tokens, inputs, outputs),
                chosen.tensor_cores,
                chosen.blocks,
                DTYPE_CODES[x.dtype],
                *addresses,
                stream,
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
