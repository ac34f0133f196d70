"""The launcher of csrc/lora_score.h on tensors, and its tolerance. Used on the emulator and on a device."""

from __future__ import annotations

import torch
from hsm_checks import DTYPE_CODES, DTYPES, Launchers
from ops.test_lora_score import SCALE, Factors, by_hand, make
from sparse_checks import addresses, poisoned
from torch import Tensor

__all__ = ["DTYPES", "SCALE", "SHAPES", "Launchers", "make"]

# (outputs, inputs, rank). Of rows that are whole 16-byte pieces and ranks up to 32: a second block of rows and of
# columns; one, two and four slots of eight ranks. Of others: one weight; nothing aligned; a second block of rows and of
# columns; a rank that takes several stages of the summed dimension (6 r + 3 r > 96); one rank too many.
SHAPES = [
    *((130, 520, 2), (128, 64, 8), (21, 200, 16), (17, 72, 21), (9, 136, 32)),
    *((1, 1, 1), (19, 37, 3), (130, 515, 2), (17, 76, 21), (9, 72, 33)),
]


def launch(launchers: Launchers, factors: Factors, dim: int) -> tuple[list[Tensor], Tensor]:
    """The inputs' copies and the partial sums."""
    weight, a = factors[:2]
    copies = [launchers.copy(tensor) for tensor in factors]
    rows, scratch = launchers.cuda.lora_group_score_sizes(*weight.shape, a.shape[0], dim)
    partials = poisoned(launchers, rows, weight.shape[dim], dtype=torch.float32)
    workspace = poisoned(launchers, scratch + 256, dtype=torch.uint8)  # as bf16, NaN
    start = -workspace.data_ptr() % 256
    tensors = addresses(*copies, partials, workspace[start:])
    sizes = (*weight.shape, a.shape[0])
    launchers.cuda.lora_group_score(DTYPE_CODES[weight.dtype], *sizes, SCALE, dim, *tensors, launchers.stream())
    return copies, partials


def run(launchers: Launchers, factors: Factors, dim: int) -> Tensor:
    copies, partials = launch(launchers, factors, dim)
    assert all(torch.equal(before, after.cpu()) for before, after in zip(factors, copies, strict=True))
    return partials.sum(0).cpu()


def check(factors: Factors, dim: int, result: Tensor) -> None:
    """Split factors are off by 2^-16 each in every term of both products; the sums by less."""
    exact, size = by_hand(factors, dim)
    assert ((result - exact).abs() <= 2**-14 * size).all()
