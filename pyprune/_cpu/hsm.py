"""The `hsm` family on the kernels of csrc/hsm_fused_cpu.h.

Nothing of size [T, n] is allocated but the results: the scales v and mask are folded into the small matrices, and the
product with l1 is computed a tile of rows at a time, so that what follows it finds the tile in the cache.

The matrix products are torch's (oneDNN), except in bf16 where the processor has a bf16 dot product and no tiles (AMX):
there oneDNN is slow at products this thin, and the kernels do them too.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from pyprune._cpu.common import DTYPE_CODES, Kernels, address

TILE_BYTES = 2 * 1024 * 1024
"""A tile of the second product per thread: small enough for the caches, large enough to keep the product efficient."""
TOKENS_AT_A_TIME = 48
"""What the bf16 products work on at a time (kPanel), filled up with zeros."""
FEWEST_TOKENS = TOKENS_AT_A_TIME
"""Fewer rows are left to torch's products."""
SMALL_PRODUCT = 1 << 19
"""Multiplications below which the call of oneDNN costs more than its speed gains."""
PARTIAL_SUMS = 64
"""Partial rows of a column sum: enough for 64 threads, and independent of their number, so sums are reproducible."""


def _onednn_linear(a: Tensor, b: Tensor) -> Tensor | None:
    """a b^T by oneDNN in fp32, or None where it does not apply.

    `torch.mm` sends fp32 to MKL, which on AMD processors runs at half of oneDNN's speed and elsewhere at the same.
    """
    if a.dtype != torch.float32 or a.numel() * len(b) < SMALL_PRODUCT or not torch.backends.mkldnn.enabled:
        return None
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return linear(a, b, None, "none", [], "") if linear else None


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [rows,k] b[columns,k]^T. `out` is where the result may be put; the caller must use what is returned."""
    result = _onednn_linear(a, b)
    return torch.mm(a, b.T, out=out) if result is None else result


class Hsm(Kernels):
    """The family's ops.

    Attributes:
        own_products: whether the bf16 products are the kernels', where the instruction set has them.
    """

    def __init__(self, kernels: ModuleType) -> None:
        super().__init__(kernels)
        self.own_products = not kernels.has_bf16_tiles()

    def hsm(self, x: Tensor, l0: Tensor, v: Tensor, l1: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        l1 = self._scale(l1, mask, v)
        if self._multiplies(x):
            return self._low_rank(x, l0, l1, mask)
        h = _product(x, l0)
        return self._expand(x, h, l1, mask), h

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
        column_dot = self._column_dot(grad_y, x) if output_mask[4] else None
        return self._finish_backward(grad_y, x, h, l0, v, l1, mask, column_dot, output_mask)

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
        rstd = v.new_empty(len(x))
        l1 = self._scale(l1, mask, v)
        if self._multiplies(x):
            _, h = self._low_rank(x, l0, l1, mask, y=residual_out, norm=(residual, weight, eps, normed, rstd))
            return residual_out, normed, h, rstd
        h = _product(x, l0)
        for rows, z, tile in self._tiles(h, l1, residual_out):
            self.kernels.mask_add_rmsnorm(
                DTYPE_CODES[x.dtype],
                *tile.shape,
                eps,
                x[rows].data_ptr(),
                x.stride(0),
                mask.data_ptr(),
                z.data_ptr(),
                residual[rows].data_ptr(),
                weight.data_ptr(),
                tile.data_ptr(),
                normed[rows].data_ptr(),
                rstd[rows].data_ptr(),
                torch.get_num_threads(),
            )
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
        grad_residual = torch.empty_like(residual_out)
        blocks = min(PARTIAL_SUMS, len(x))
        grad_weight = v.new_empty(blocks, len(weight))
        column_dot = v.new_empty(blocks, len(weight)) if wants_mask else None
        self.kernels.rmsnorm_backward(
            DTYPE_CODES[x.dtype],
            *residual_out.shape,
            grad_residual_out.data_ptr(),
            grad_normed.data_ptr(),
            residual_out.data_ptr(),
            rstd.data_ptr(),
            weight.data_ptr(),
            x.data_ptr(),
            x.stride(0),
            grad_residual.data_ptr(),
            blocks,
            grad_weight.data_ptr(),
            address(column_dot),
            torch.get_num_threads(),
        )
        total = column_dot.sum(0) if column_dot is not None else None
        wants = [wants_x, wants_l0, wants_v, wants_l1, wants_mask]
        grad_x, *others = self._finish_backward(grad_residual, x, h, l0, v, l1, mask, total, wants)
        return (
            grad_x,
            grad_residual if wants_residual else x.new_empty(0),
            *others,
            grad_weight.sum(0).to(weight.dtype) if wants_weight else weight.new_empty(0),
        )

    def _finish_backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        h: Tensor,
        l0: Tensor,
        v: Tensor,
        l1: Tensor,
        mask: Tensor,
        column_dot: Tensor | None,
        output_mask: list[bool],
    ) -> tuple[Tensor, ...]:
        """hsm's gradients, given column_dot [n] = sum_t grad_y * x[:, :n] when the mask's is wanted.

        With u = (mask * grad_y) l1, p = u * v and G = grad_y^T (h * v):
            grad_x = [mask * grad_y, 0] + p l0      grad_l0 = p^T x      grad_v = sum_t u * h
            grad_l1 = mask * G                      grad_mask = column_dot + sum_k l1 * G
        """
        wants_x, wants_l0, wants_v, wants_l1, wants_mask = output_mask
        grad_x = grad_l0 = x.new_empty(0)
        grad_v, grad_l1, grad_mask = v.new_empty(0), x.new_empty(0), mask.new_empty(0)
        if wants_x or wants_l0 or wants_v:
            masked_l1 = self._scale(l1, mask, None)
            if self._multiplies(x):
                dot = v.new_empty(-(-len(x) // TOKENS_AT_A_TIME), len(v)) if wants_v else None
                grad_x = torch.empty_like(x) if wants_x else grad_x
                _, p = self._low_rank(grad_y, masked_l1, l0, mask, y=grad_x, backward=(v, h, dot))
                grad_v = dot.sum(0) if dot is not None else grad_v
            else:
                u = _product(grad_y, masked_l1.T)
                p = self._scale(u, None, v)
                grad_v = self._column_dot(u, h) if wants_v else grad_v
                grad_x = self._expand(grad_y, p, l0.T, mask) if wants_x else grad_x
            if wants_l0:
                grad_l0 = self._sum_products(p, x)
        if wants_l1 or wants_mask:
            g_transposed = self._sum_products(self._scale(h, None, v), grad_y)
            if wants_l1:
                grad_l1 = self._scale(g_transposed.T.contiguous(), mask, None)
            if column_dot is not None:
                grad_mask = column_dot + self._column_dot(g_transposed, l1.T.contiguous())
        return grad_x, grad_l0, grad_v, grad_l1, grad_mask

    def _multiplies(self, x: Tensor) -> bool:
        """Whether the kernels do the matrix products too."""
        wanted = self.own_products and x.dtype == torch.bfloat16 and len(x) >= FEWEST_TOKENS
        return wanted and self.kernels.has_products()

    def _low_rank(
        self,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        mask: Tensor,
        *,
        y: Tensor | None = None,
        norm: tuple[Tensor, Tensor, float, Tensor, Tensor] | None = None,
        backward: tuple[Tensor, Tensor, Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """h = x a^T [T,r] and y = [mask * x, 0] + h b^T, with both products in the kernel.

        Args:
            y: where to put it; nothing is computed for an empty one.
            norm: residual, weight, eps, and where to put normed and rstd. y becomes the sum with the residual.
            backward: scale [r], beside [T,r], and where to put dot [blocks,r], which sums to that of (x a^T) * beside,
                or None. a is [inputs,r] and b [r,outputs] then, and h is multiplied by scale.
        """
        rank, outputs = (len(b), b.shape[1]) if backward else (len(a), len(b))
        h = x.new_empty(len(x), rank)
        y = x.new_empty(len(x), outputs) if y is None else y
        scale, beside, dot = backward or (None, None, None)
        residual, weight, eps, normed, rstd = norm or (None, None, 0.0, None, None)
        sizes, threads = (*x.shape, rank, outputs, len(mask)), torch.get_num_threads()
        workspace = x.new_empty(self.kernels.low_rank_workspace(sizes, threads), dtype=torch.uint8)
        self.kernels.low_rank(
            sizes,
            backward is not None,
            *map(address, (x, a, b, scale, mask, beside, dot, h, y if y.numel() else None, residual, weight)),
            eps,
            *map(address, (normed, rstd, workspace)),
            threads,
        )
        return y, h

    def _sum_products(self, a: Tensor, b: Tensor) -> Tensor:
        """a^T b for a [T,r] and b [T,n]."""
        if not self._multiplies(a):
            return _product(a.T, b.T)
        out = a.new_empty(a.shape[1], b.shape[1])
        sizes, threads = (*a.shape, b.shape[1]), torch.get_num_threads()
        workspace = a.new_empty(self.kernels.sum_products_workspace(sizes, threads), dtype=torch.uint8)
        self.kernels.sum_products(sizes, *map(address, (a, b, out, workspace)), threads)
        return out

    def _expand(self, x: Tensor, h: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        """[mask * x, 0] + h b^T, with the product by torch."""
        y = x.new_empty(len(x), len(b))
        for rows, z, tile in self._tiles(h, b, y):
            self._mask_add(x[rows], mask, z, tile)
        return y

    def _tiles(self, a: Tensor, b: Tensor, out: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields rows, the product (a b^T)[rows], and out[rows], which may be the buffer the product stands in."""
        row_bytes = out.shape[1] * out.element_size()
        step = max(32, TILE_BYTES * torch.get_num_threads() // row_bytes)
        for start in range(0, len(a), step):
            rows = slice(start, start + step)
            tile = out[rows]
            yield rows, _product(a[rows], b, tile), tile

    def _scale(self, a: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        """rows[:, None] * a * columns in a's dtype."""
        out = torch.empty_like(a)
        self.kernels.scale(
            DTYPE_CODES[a.dtype],
            *a.shape,
            a.data_ptr(),
            address(rows),
            address(columns),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def _mask_add(self, x: Tensor, mask: Tensor, z: Tensor, y: Tensor) -> None:
        """y = mask * x + z, in the columns that the mask has; y = z in the others."""
        self.kernels.mask_add(
            DTYPE_CODES[x.dtype],
            *y.shape,
            len(mask),
            x.data_ptr(),
            x.stride(0),
            mask.data_ptr(),
            z.data_ptr(),
            y.data_ptr(),
            torch.get_num_threads(),
        )

    def _column_dot(self, a: Tensor, b: Tensor) -> Tensor:
        """sum_t a * b[:, :n] for a [T,n], in fp32."""
        blocks = min(PARTIAL_SUMS, len(a))
        partial = torch.empty(blocks, a.shape[1], dtype=torch.float32)
        self.kernels.column_dot(
            DTYPE_CODES[a.dtype],
            *a.shape,
            a.data_ptr(),
            a.stride(0),
            b.data_ptr(),
            b.stride(0),
            blocks,
            partial.data_ptr(),
            torch.get_num_threads(),
        )
        return partial.sum(0)
