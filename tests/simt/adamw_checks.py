"""The launchers of csrc/nm_adamw.h and transposable.h on tensors. Used on the emulator and on a device."""

from __future__ import annotations

import torch
from adamw_oracle import OPTIONS, Case
from hsm_checks import DTYPE_CODES, Launchers
from sparse_checks import addresses, poisoned
from torch import Tensor

from pyprune import ops
from pyprune._cpu.nm_adamw import adamw_options
from pyprune.reference.bits import pack_bits

# One weight, a byte cut short, aligned rows over several blocks, unaligned ones, none.
SHAPES = [(1, 1), (3, 13), (33, 264), (9, 515), (0, 8)]
TILED_SHAPES = [(4, 4), (8, 12), (12, 136), (0, 8)]
NUMBERS = ("eps", "weight_decay", "masked_decay", "step", "seed")
CONVERSIONS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


def step(launchers: Launchers, case: Case, mask: Tensor | None) -> list[Tensor]:
    """Weight and moments after the step."""
    tensors = [launchers.copy(tensor) for tensor in case.tensors]
    bits = None if mask is None else launchers.copy(mask)
    options = adamw_options(OPTIONS["lr"], *OPTIONS["betas"], *(OPTIONS[name] for name in NUMBERS))
    code, shape = DTYPE_CODES[case.dtype], (case.rows, case.columns)
    launchers.cuda.nm_adamw(code, *shape, options, *addresses(*tensors, bits), launchers.stream())
    assert torch.equal(tensors[1].cpu(), case.tensors[1])
    return [tensors[i].cpu().clone() for i in (0, 2, 3)]


def masked_weight(launchers: Launchers, weight: Tensor, kept: Tensor, out_dtype: torch.dtype) -> Tensor:
    tensors = launchers.copy(weight), launchers.copy(pack_bits(kept))
    out = poisoned(launchers, *weight.shape, dtype=out_dtype)
    codes = DTYPE_CODES[weight.dtype], DTYPE_CODES[out_dtype]
    launchers.cuda.masked_weight(*codes, *weight.shape, *addresses(*tensors, out), launchers.stream())
    return out.cpu().clone()


def check_transposable(launchers: Launchers, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The masks are the reference's, bit for bit, and so are the counts."""
    uneven = torch.rand(shape)  # Sums of the lower rows that differ vanish beside those of the upper ones: more ties.
    uneven.view(-1, 2, 2, shape[1])[:, 0] *= 2**15 if dtype == torch.float16 else 2**20
    for scores in (torch.rand(shape), torch.randint(0, 3, shape), uneven):
        scores = scores.to(dtype)
        previous = pack_bits(torch.rand(shape) < 0.5)
        with ops.using("reference"):
            right, flips = ops.transposable_prune(scores, previous)
        for others, expected in ((previous, int(flips)), (None, 0)):
            bits, counts = transposable_prune(launchers, scores, others)
            assert torch.equal(bits, right) and counts == [expected, 0]


def transposable_prune(launchers: Launchers, scores: Tensor, previous: Tensor | None) -> tuple[Tensor, list[int]]:
    """The mask, and how many bits differ and scores are NaN."""
    copies = launchers.copy(scores), None if previous is None else launchers.copy(previous)
    bits = poisoned(launchers, len(scores), -(-scores.shape[1] // 8), dtype=torch.uint8)
    counts = launchers.copy(torch.zeros(2, dtype=torch.int64))
    tensors = addresses(*copies, bits, counts[:1], counts[1:])
    launchers.cuda.transposable_prune(DTYPE_CODES[scores.dtype], *scores.shape, *tensors, launchers.stream())
    return bits.cpu(), counts.tolist()
