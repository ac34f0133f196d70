"""The `sparse_gemm` family: csrc/sparse_gemm_cpu.h, or expanded rows and torch's product where that is faster.

Expanding costs one pass over the weight, whatever the number of tokens; with many of them, a library that has better
instructions, or more registers, wins. `few_tokens` is where the two cross, measured: docs/kernels.md. Where torch has
only plain loops for a 16-bit type (bf16 without AVX-512, for one), rows are expanded to fp32 and multiplied so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyprune._cpu.bitmap import Bitmap
from pyprune._cpu.common import DTYPE_CODES, address
from pyprune._cpu.nm import Nm

MOST_TOKENS = {
    ("avx512_bf16", torch.bfloat16): sys.maxsize,
    ("avx512_bf16", torch.float32): sys.maxsize,
    ("avx512", torch.float32): sys.maxsize,
    ("avx2", torch.float32): 256,
}
"""The most tokens for which the kernels run, by their instruction set and the dtype that torch would multiply in."""
OTHERWISE = {torch.bfloat16: 64, torch.float16: 16, torch.float32: 16}
"""The same for the rest, by dtype alone, and in bf16 where torch has AMX; not measured again with wider panels."""
BLOCK_BYTES = 4 * 1024 * 1024
"""Rows that are expanded at a time: they stay in the cache until torch has multiplied by them."""
ROWS_OF_TILES = 64


@cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What torch multiplies matrices of `dtype` in: itself, or fp32 where it is several times as fast."""
    checks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in checks:
        return dtype
    supported = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, checks[dtype])()
    return dtype if supported else torch.float32


@cache
def few_tokens(isa: str, dtype: torch.dtype) -> int:
    """The most tokens for which the kernels of an instruction set run on a weight of `dtype`."""
    product = product_dtype(dtype)
    if product == torch.bfloat16 and torch.cpu._is_amx_tile_supported():  # which torch has, and the kernels have not
        return OTHERWISE[product]
    return MOST_TOKENS.get((isa, product), OTHERWISE[product])


class SparseGemm(Bitmap, Nm):
    """The family's ops."""

    def _takes(self, x: Tensor) -> bool:
        """Whether the kernels are the faster way for these tokens."""
        return len(x) <= few_tokens(self.kernels.isa(), x.dtype)

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
        self._check_offsets("bitmap_linear", values, offsets)
        if not self._takes(x):

            def expand(first: int, rows: Tensor) -> None:
                self._unpack_rows(values, bitmap, offsets, first // ROWS_OF_TILES, rows)

            return _expanded_linear(x, bias, out_features, expand)
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
        if not self._takes(x):

            def expand(first: int, rows: Tensor) -> None:
                part = slice(first, first + len(rows))
                self._decompress_rows(values[part], metadata[part], n, m, rows)

            return _expanded_linear(x, bias, len(values), expand)
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
        if not self._takes(x):

            def expand(first: int, rows: Tensor) -> None:
                part = slice(first, first + len(rows))
                code = DTYPE_CODES[x.dtype]
                source, mask = weight[part].data_ptr(), mask_bits[part].data_ptr()
                threads = torch.get_num_threads()
                self.kernels.masked_weight(code, code, *rows.shape, source, mask, rows.data_ptr(), threads)

            return _expanded_linear(x, bias, len(weight), expand)
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
        if not self._takes(x) or (in_index is None and out_index is None):
            kept = weight if out_index is None else weight.index_select(0, out_index)
            kept_bias = bias if bias is None or out_index is None else bias.index_select(0, out_index)
            return linear(x, kept if in_index is None else kept.index_select(1, in_index), kept_bias)
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


def _expanded_linear(
    x: Tensor, bias: Tensor | None, out_features: int, expand: Callable[[int, Tensor], None]
) -> Tensor:
    """x W^T + bias a block of rows of W at a time; `expand(first, rows)` fills `rows` [rows, in] with those of W."""
    dtype = product_dtype(x.dtype)
    row_bytes = max(1, x.shape[1]) * dtype.itemsize
    step = max(ROWS_OF_TILES, BLOCK_BYTES // row_bytes // ROWS_OF_TILES * ROWS_OF_TILES)
    buffer = x.new_empty(min(step, out_features), x.shape[1])
    wide = buffer if dtype == x.dtype else torch.empty_like(buffer, dtype=dtype)
    y = x.new_empty(len(x), out_features)
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    for first in range(0, out_features, step):
        rows, multiplied = buffer[: out_features - first], wide[: out_features - first]
        part = slice(first, first + len(rows))
        expand(first, rows)
        if wide is not buffer:
            multiplied.copy_(rows)
        y[:, part] = linear(x, multiplied, None if bias is None else bias[part])
    return y
