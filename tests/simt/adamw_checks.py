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
    """The masks are the reference's, bit for bit."""
    for scores in (torch.rand(shape).to(dtype), torch.randint(0, 3, shape).to(dtype)):  # many ties
        with ops.using("reference"):
            right, _ = ops.transposable_prune(scores)
        copy, bits = launchers.copy(scores), poisoned(launchers, *right.shape, dtype=torch.uint8)
        tensors = addresses(copy, bits)
        launchers.cuda.transposable_prune(DTYPE_CODES[dtype], *shape, *tensors, launchers.stream())
        assert torch.equal(bits.cpu(), right)
