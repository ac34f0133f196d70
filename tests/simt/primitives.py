"""What the primitives of csrc/ptx.cuh do, written out from the PTX ISA's own formulas, on inputs for primitives.cu."""

from __future__ import annotations

import torch
from torch import Tensor


def copies(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """cp.async: data [64, 16] bytes, how many of each to read [64], and what run_copy writes [64, 16].

    "src-size ... in case it is less than cp-size, remaining bytes are filled with zeros".
    """
    data = torch.randint(1, 256, (64, 16), dtype=torch.uint8, generator=generator)
    size = torch.arange(64, dtype=torch.int32) % 17
    read = torch.where(torch.arange(16) < size[:, None], data, torch.zeros_like(data))
    return data, size, read.view(2, 32, 16).flip(1).reshape(64, 16)


def matrices(transposed: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """ldmatrix .x4: four 8x8 matrices [4, 8, 8] of 16 bits, and each lane's fragments [32, 4, 2].

    "Each row of a matrix is ... loaded by a quad of threads: thread 4 i + j holds row i, elements 2 j and 2 j + 1";
    .trans loads each matrix in column-major order.
    """
    data = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16, generator=generator)
    source = data.transpose(1, 2) if transposed else data
    # [matrix, row, quad, pair] -> lane = 4 row + quad
    return data, source.reshape(4, 8, 4, 2).permute(1, 2, 0, 3).reshape(32, 4, 2).contiguous()


def fragments(dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mma.m16n8k16: a [32, 4, 2], b [32, 2, 2], c [32, 4] as lanes hold them, and d = a b + c [32, 4] in fp64.

    The ISA's formulas for element i of a lane with groupID = lane >> 2 and threadID_in_group = lane % 4:
    A: row = groupID for 0 <= i < 2 or 4 <= i < 6, else groupID + 8;
       column = threadID_in_group * 2 + (i & 1), + 8 for i >= 4
    B: row = threadID_in_group * 2 + (i & 1), + 8 for i >= 2;  column = groupID
    C: row = groupID for i < 2, else groupID + 8;  column = threadID_in_group * 2 + (i & 1)
    """
    a = torch.randn(16, 16, generator=generator).to(dtype)
    b = torch.randn(16, 8, generator=generator).to(dtype)
    c = torch.randn(16, 8, generator=generator)
    d = a.double() @ b.double() + c.double()
    lane = torch.arange(32)[:, None]
    group, thread = lane >> 2, lane % 4
    i = torch.arange(8)
    a_row = torch.where((i < 2) | ((i >= 4) & (i < 6)), group, group + 8)
    a_column = thread * 2 + (i & 1) + torch.where(i >= 4, 8, 0)
    i = torch.arange(4)
    b_row = thread * 2 + (i & 1) + torch.where(i >= 2, 8, 0)
    c_row = torch.where(i < 2, group, group + 8)
    c_column = thread * 2 + (i & 1)
    return (
        a[a_row, a_column].view(32, 4, 2),
        b[b_row, group.expand(32, 4)].view(32, 2, 2),
        c[c_row, c_column],
        d[c_row, c_column],
    )


MMA_ATOL = 32 * 2**-23
"""17 fp32 additions of terms below 16, in an order that the ISA leaves open, each rounded (or cut, as hardware may)."""
