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


def copies_8(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """cp.async of 8 bytes: data [32, 8], how many of each to read [32], and what run_copy_8 writes [32, 8]."""
    data = torch.randint(1, 256, (32, 8), dtype=torch.uint8, generator=generator)
    size = torch.arange(32, dtype=torch.int32) % 9
    return data, size, torch.where(torch.arange(8) < size[:, None], data, torch.zeros_like(data)).flip(0)


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


def sparse_fragments(
    dtype: torch.dtype, selector: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mma.sp.m16n8k32: a, b [32, 4, 2], metadata [32], c [32, 4] as lanes hold them, and d = a b + c [32, 4] in fp64.

    Of every four consecutive elements of a row of A two are kept; 2 bits each say which, the first in the lowest bits.
    A's kept elements and C lie as in `fragments`. The ISA's formulas for the rest:
    B: row = threadID_in_group * 2 + (i & 1), + 8 for i >= 2, + 16 for i >= 4, + 24 for i >= 6;  column = groupID
    Metadata: of each quad the two threads 2 F and 2 F + 1 contribute, F the selector: the first columns 0 to 15, the
    second 16 to 31; the low 16 bits of row groupID, the high 16 bits of row groupID + 8.
    The other threads' words are noise here, which nothing may read.
    """
    kept = torch.rand(16, 8, 4, generator=generator).topk(2).indices.sort(-1).values  # [row, four, slot]
    values = torch.randn(16, 8, 2, generator=generator).to(dtype)
    dense = torch.zeros(16, 8, 4, dtype=dtype).scatter_(2, kept, values).view(16, 32)
    b = torch.randn(32, 8, generator=generator).to(dtype)
    c = torch.randn(16, 8, generator=generator)
    d = dense.double() @ b.double() + c.double()
    metadata = torch.randint(-(2**31), 2**31 - 1, (32,), dtype=torch.int64, generator=generator)
    for row in range(8):
        for half in range(2):
            word = 0
            for four in range(4):
                for high in range(2):
                    first, second = kept[row + 8 * high, 4 * half + four].tolist()
                    word |= (first | second << 2) << (16 * high + 4 * four)
            metadata[4 * row + 2 * selector + half] = word
    lane = torch.arange(32)[:, None]
    group, thread = lane >> 2, lane % 4
    i = torch.arange(8)
    a_row = torch.where((i < 2) | ((i >= 4) & (i < 6)), group, group + 8)
    a_column = thread * 2 + (i & 1) + torch.where(i >= 4, 8, 0)
    b_row = thread * 2 + (i & 1) + i // 2 * 8
    i = torch.arange(4)
    c_row, c_column = torch.where(i < 2, group, group + 8), thread * 2 + (i & 1)
    return (
        values.view(16, 16)[a_row, a_column].view(32, 4, 2),
        b[b_row, group.expand(32, 8)].view(32, 4, 2),
        torch.where(metadata >= 2**31, metadata - 2**32, metadata).int(),
        c[c_row, c_column],
        d[c_row, c_column],
    )


def bit_operations(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """prmt, shf.r, popc and shfl.up: a, b, selector [32], and what run_bits writes [32, 4]. All int32.

    prmt: "numbers the bytes in the source from 0 to 7 ... for each byte in the target a 4-bit selection value is
    defined"; the upper half of the selector is not read. shf.r: the low word of {b, a} >> (selector & 31).
    """
    a, b = (torch.randint(-(2**31), 2**31 - 1, (32,), dtype=torch.int32, generator=generator) for _ in range(2))
    selector = torch.randint(0, 2**31 - 1, (32,), dtype=torch.int32, generator=generator) & ~0x8888
    out = torch.empty(32, 4, dtype=torch.int64)
    for lane in range(32):
        low, high, pick = int(a[lane]) & 0xFFFFFFFF, int(b[lane]) & 0xFFFFFFFF, int(selector[lane])
        both = (low | high << 32).to_bytes(8, "little")
        out[lane, 0] = int.from_bytes(bytes(both[pick >> 4 * i & 7] for i in range(4)), "little")
        out[lane, 1] = (low | high << 32) >> (pick & 31) & 0xFFFFFFFF
        out[lane, 2] = low.bit_count()
        out[lane, 3] = int(a[lane - 2 if lane >= 2 else lane]) & 0xFFFFFFFF
    return a, b, selector, torch.where(out >= 2**31, out - 2**32, out).int()


MMA_ATOL = 17 * 2**-19
"""17 terms below 32 in an order that the ISA leaves open. Tensor cores shift them to the largest one's exponent and cut
what falls off, up to a unit in its last place (2^-19) of each; a wrong layout is off by 1."""
