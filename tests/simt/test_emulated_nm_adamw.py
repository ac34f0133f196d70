"""csrc/nm_adamw.cu and csrc/transposable.cu on the emulator: right numbers, nothing read or written past the ends."""

from __future__ import annotations

import pytest
import torch
from adamw_oracle import OPTIONS, Case
from emulator import EAGER_GREEDY, LAZY, Emulator, Schedule
from torch import Tensor

from pyprune import ops
from pyprune._cpu.common import DTYPE_CODES
from pyprune._cpu.nm_adamw import adamw_options
from pyprune.reference.bits import pack_bits

# One weight, a byte cut short, aligned rows over several blocks, unaligned ones, none.
SHAPES = [(1, 1), (3, 13), (33, 264), (9, 515), (0, 8)]
NUMBERS = ("eps", "weight_decay", "masked_decay", "step", "seed")


def step(emulator: Emulator, case: Case, mask: Tensor | None) -> list[Tensor]:
    """Weight and moments after the step."""
    tensors = [emulator.copy(tensor) for tensor in case.tensors]
    bits = None if mask is None else emulator.copy(mask)
    options = adamw_options(OPTIONS["lr"], *OPTIONS["betas"], *(OPTIONS[name] for name in NUMBERS))
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (*tensors, bits)]
    emulator.cuda.nm_adamw(DTYPE_CODES[case.dtype], case.rows, case.columns, options, *addresses, 0)
    assert torch.equal(tensors[1], case.tensors[1])
    return [tensors[i].clone() for i in (0, 2, 3)]


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("schedule", [LAZY, EAGER_GREEDY], ids=str)
def test_a_step_agrees_with_fp64(
    emulator: Emulator, schedule: Schedule, shape: tuple[int, int], dtype: torch.dtype, masked: bool
) -> None:
    case = Case(*shape, dtype, masked)
    with emulator.using(schedule):
        case.check(step(emulator, case, case.mask))


def test_bf16_rounds_by_the_same_hash_as_the_reference(emulator: Emulator) -> None:
    case = Case(17, 264, torch.bfloat16)
    with ops.using("reference"):
        right = case.step()[0]
    assert (step(emulator, case, case.mask)[0] != right).double().mean() < 1e-3


@pytest.mark.parametrize("target", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masked_weight(
    emulator: Emulator, shape: tuple[int, int], dtype: torch.dtype, target: torch.dtype | None
) -> None:
    out_dtype = target or dtype
    weight, kept = torch.randn(shape).to(dtype), torch.rand(shape) < 0.5
    tensors = emulator.copy(weight), emulator.copy(pack_bits(kept)), emulator.empty(*shape, dtype=out_dtype)
    codes, addresses = (DTYPE_CODES[dtype], DTYPE_CODES[out_dtype]), [tensor.data_ptr() for tensor in tensors]
    if out_dtype != dtype and dtype != torch.float32:
        with pytest.raises(RuntimeError, match="invalid argument"):
            emulator.cuda.masked_weight(*codes, *shape, *addresses, 0)
        return
    emulator.cuda.masked_weight(*codes, *shape, *addresses, 0)
    assert torch.equal(tensors[2], torch.where(kept, weight, 0).to(out_dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4, 4), (8, 12), (12, 136), (0, 8)], ids=str)
def test_transposable_masks_are_the_references(emulator: Emulator, shape: tuple[int, int], dtype: torch.dtype) -> None:
    for scores in (torch.rand(shape).to(dtype), torch.randint(0, 3, shape).to(dtype)):  # many ties
        with ops.using("reference"):
            right, _ = ops.transposable_prune(scores)
        copy, bits = emulator.copy(scores), emulator.empty(*right.shape, dtype=torch.uint8)
        emulator.cuda.transposable_prune(DTYPE_CODES[dtype], *shape, copy.data_ptr(), bits.data_ptr(), 0)
        assert torch.equal(bits, right)


def test_reading_past_an_end_is_noticed(emulator: Emulator) -> None:
    case = Case(8, 256, torch.float32)
    mask = case.mask
    assert mask is not None
    with pytest.raises(RuntimeError, match="out of bounds access"):
        step(emulator, case, mask[:-1])
    case.tensors[1] = case.tensors[1][:-1]
    with pytest.raises(RuntimeError, match="out of bounds access"):
        step(emulator, case, mask)


def test_nothing_before_the_start_is_touched(emulator: Emulator) -> None:
    emulator.at_end = False
    case = Case(3, 13, torch.bfloat16)
    case.check(step(emulator, case, case.mask))


def test_unknown_dtypes_are_refused(emulator: Emulator) -> None:
    options = adamw_options(OPTIONS["lr"], *OPTIONS["betas"], *(OPTIONS[name] for name in NUMBERS))
    with pytest.raises(RuntimeError, match="invalid argument"):
        emulator.cuda.nm_adamw(2, 1, 1, options, 0, 0, 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="invalid argument"):
        emulator.cuda.transposable_prune(7, 4, 4, 0, 0, 0)
