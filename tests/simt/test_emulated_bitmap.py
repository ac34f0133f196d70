"""csrc/bitmap.cu on the emulator: bit for bit what the reference makes, and every barrier needed and noticed."""

from __future__ import annotations

import re

import pytest
import torch
from emulator import EAGER_GREEDY, LAZY, ROOT, SCHEDULES, Emulator, Schedule
from sparse_checks import (
    DAMAGED_SHAPE,
    DTYPES,
    WHOLE_ROWS,
    Launchers,
    assert_same,
    bitmap_pack,
    bitmap_unpack,
    damaged_bitmaps,
    odd_weight,
    reference,
)
from torch import Tensor

SOURCE = ROOT / "csrc/bitmap.cu"
SHAPES = ((1, 1), (64, 64), (65, 130), (3, 144), (130, 16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("schedule", [LAZY, EAGER_GREEDY], ids=str)
def test_packing_and_back(
    emulator: Emulator, launchers: Launchers, schedule: Schedule, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    for sparsity in (0.0, 0.5, 1.0):
        weight = odd_weight(*shape, dtype, sparsity)
        packed = reference.bitmap_pack(weight)
        with emulator.using(schedule):
            assert_same(bitmap_pack(launchers, weight), packed)
            dense = bitmap_unpack(launchers, *packed, *shape)
        assert_same((dense,), (reference.bitmap_unpack(*packed, *shape),))


@pytest.mark.parametrize("shape", [(0, 16), (3, 0)], ids=str)
def test_empty(launchers: Launchers, shape: tuple[int, int]) -> None:
    packed = reference.bitmap_pack(torch.zeros(shape))
    assert_same(bitmap_pack(launchers, torch.zeros(shape)), packed)
    assert bitmap_unpack(launchers, *packed, *shape).shape == shape


def test_nothing_before_the_start_is_touched(emulator: Emulator, launchers: Launchers) -> None:
    emulator.at_end = False
    weight = odd_weight(70, 131, torch.bfloat16, 0.5)
    packed = bitmap_pack(launchers, weight)
    assert_same(packed, reference.bitmap_pack(weight))
    assert_same((bitmap_unpack(launchers, *packed, 70, 131),), (reference.bitmap_unpack(*packed, 70, 131),))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_damaged_places_lead_nowhere(emulator: Emulator, launchers: Launchers, dtype: torch.dtype) -> None:
    """Wrong offsets and bits give wrong rows, never a read outside values; rows of other tiles are as they were."""
    weight = odd_weight(*DAMAGED_SHAPE, dtype, 0.5)
    values, parts = damaged_bitmaps(weight)
    right = reference.bitmap_unpack(values, *parts[0], *DAMAGED_SHAPE)
    for at_end in (True, False):
        emulator.at_end = at_end
        for bitmap, offsets in parts:
            dense = bitmap_unpack(launchers, values, bitmap, offsets, *DAMAGED_SHAPE)
            for rows in WHOLE_ROWS:
                assert_same((dense[rows],), (right[rows],))


def synchronisations() -> list[int]:
    """The source lines of every barrier."""
    return [i for i, line in enumerate(SOURCE.read_text().splitlines(), 1) if re.search(r"__syncthreads\(\);", line)]


def test_every_missing_barrier_is_noticed(emulator: Emulator, launchers: Launchers) -> None:
    weight = odd_weight(65, 130, torch.bfloat16, 0.5)
    packed = reference.bitmap_pack(weight)
    assert synchronisations()
    for line in synchronisations():
        noticed = []
        for schedule in SCHEDULES:
            with emulator.using(schedule), emulator.without(line):
                try:
                    assert_same(bitmap_pack(launchers, weight), packed)
                    assert_same((bitmap_unpack(launchers, *packed, 65, 130),), (weight,))
                    noticed.append(False)
                except (AssertionError, RuntimeError):
                    noticed.append(True)
        assert any(noticed), f"{SOURCE.name}, line {line}: left out, and no schedule shows it"


@pytest.mark.parametrize("which", ["weight", "values", "bitmap", "offsets"])
def test_reading_past_the_end_of_any_input_is_noticed(launchers: Launchers, which: str) -> None:
    weight = odd_weight(64, 128, torch.float16, 0.4)
    values, bitmap, offsets = reference.bitmap_pack(weight)
    copy = launchers.copy

    def short(tensor: Tensor) -> Tensor:
        cut = {"weight": weight, "values": values, "bitmap": bitmap, "offsets": offsets}[which]
        left_out = 8 if which == "values" else 1
        return copy(tensor[:-left_out] if tensor is cut else tensor)

    launchers.copy = short
    with pytest.raises(RuntimeError, match=r"out of bounds access: a buffer of \d+ bytes.*block .*thread"):
        if which == "weight":
            bitmap_pack(launchers, weight, rows=64)
        else:
            bitmap_unpack(launchers, values, bitmap, offsets, 64, 128)


def test_invalid_arguments_are_refused(launchers: Launchers) -> None:
    with pytest.raises(RuntimeError, match="invalid argument"):
        launchers.cuda.bitmap_unpack(64, 64, 3, 0, 0, 0, 0, 0, 0)
