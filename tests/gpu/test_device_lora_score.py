"""csrc/lora_score.cu on a device: the emulator's checks, and layers of real size."""

from __future__ import annotations

import pytest
import torch
from lora_checks import DTYPES, SCALE, SHAPES, Launchers, check, make, run

from pyprune import ops

pytestmark = pytest.mark.gpu


@pytest.mark.sanitizer
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_fp64(launchers: Launchers, shape: tuple[int, int, int], dtype: torch.dtype, dim: int) -> None:
    factors = make(*shape, dtype)
    check(factors, dim, run(launchers, factors, dim))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4096, 11008, 8), (11008, 4095, 64)], ids=str)
def test_agrees_with_fp64_at_size(
    device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype, dim: int
) -> None:
    factors = tuple(tensor.to(device) for tensor in make(*shape, dtype))
    check(factors, dim, ops.lora_group_score(*factors, SCALE, dim))
