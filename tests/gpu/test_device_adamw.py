"""csrc/nm_adamw.cu and transposable.cu on a device: the emulator's checks, and a layer of real size."""

from __future__ import annotations

import pytest
import torch
from adamw_checks import (
    CONVERSIONS,
    SHAPES,
    TILED_SHAPES,
    Launchers,
    check_transposable,
    masked_weight,
    step,
)
from adamw_oracle import Case

from pyprune import ops
from pyprune.reference.bits import pack_bits

pytestmark = pytest.mark.gpu


@pytest.mark.sanitizer
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_agrees_with_fp64(
    launchers: Launchers, shape: tuple[int, int], dtype: torch.dtype, masked: bool
) -> None:
    case = Case(*shape, dtype, masked)
    case.check(step(launchers, case, case.mask))


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_agrees_with_fp64_at_size(device: torch.device, dtype: torch.dtype, masked: bool) -> None:
    case = Case(4096, 11008, dtype, masked)
    case.tensors = [tensor.to(device) for tensor in case.tensors]
    case.kept = None if case.kept is None else case.kept.to(device)
    found = case.step()
    case.check(found)
    assert all(torch.equal(a, b) for a, b in zip(case.step(), found, strict=True)), "differs from run to run"
    if dtype == torch.bfloat16:  # an fp32 sum may differ by a rounding, and then one weight in many thousand is another
        with ops.using("reference"):
            assert (case.step()[0] != found[0]).double().mean() < 1e-3


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtypes", CONVERSIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masked_weight(launchers: Launchers, shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    weight, kept = torch.randn(shape).to(dtypes[0]), torch.rand(shape) < 0.5
    assert torch.equal(masked_weight(launchers, weight, kept, dtypes[1]), torch.where(kept, weight, 0).to(dtypes[1]))


@pytest.mark.parametrize("dtypes", CONVERSIONS, ids=str)
def test_masked_weight_at_size(device: torch.device, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    weight = torch.randn(4096, 11008, device=device).to(dtypes[0])
    kept = torch.rand(weight.shape, device=device) < 0.5
    right = torch.where(kept, weight, 0).to(dtypes[1])
    assert torch.equal(ops.masked_weight(weight, pack_bits(kept), dtypes[1]), right)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", TILED_SHAPES, ids=str)
def test_transposable_masks_are_the_references(
    launchers: Launchers, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    check_transposable(launchers, shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_transposable_masks_at_size(device: torch.device, dtype: torch.dtype) -> None:
    scores = torch.randn(4096, 11008, device=device).abs().to(dtype)
    previous = pack_bits(torch.rand(4096, 11008, device=device) < 0.5)
    found = ops.transposable_prune(scores, previous)
    with ops.using("reference"):
        right = ops.transposable_prune(scores, previous)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
