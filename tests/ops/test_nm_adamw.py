"""`nm_adamw_` and `masked_weight` on the CPU: numbers against the definitions, rounding, dispatch, what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from adamw_oracle import OPTIONS, Case

from pyprune import _native, ops
from pyprune.reference.bits import pack_bits

# Rows of one weight, bytes cut short, a whole tile, a tile and one more, none.
SHAPES = [(1, 1), (3, 13), (5, 512), (2, 513), (33, 264), (0, 5), (4, 0)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = _native.cpu.isas() if _native.cpu else ()


@pytest.fixture(params=[*ISAS, "reference"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set this machine runs, and the reference."""
    if request.param == "reference":
        with ops.using("reference"):
            yield request.param
        return
    before = _native.cpu.isa()
    _native.cpu.set_isa(request.param)
    yield request.param
    _native.cpu.set_isa(before)


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_agrees_with_fp64(implementation: str, shape: tuple[int, int], dtype: torch.dtype, masked: bool) -> None:
    case = Case(*shape, dtype, masked)
    case.check(case.step())


def test_bf16_rounds_by_the_same_hash_everywhere(implementation: str) -> None:
    """fp32 sums may differ by a rounding and with them a weight in many thousand, not more."""
    case = Case(65, 515, torch.bfloat16)
    found = case.step()[0]
    with ops.using("reference"):
        right = case.step()[0]
    assert (found != right).double().mean() < 1e-3


def test_rounding_is_right_on_average(implementation: str) -> None:
    """From 1 towards 1 - 2^-10, a quarter of the way to the next bf16 number below."""
    weight, grad = torch.ones(64, 1024, dtype=torch.bfloat16), torch.ones(64, 1024, dtype=torch.bfloat16)
    zeros = torch.zeros(64, 1024)
    options = OPTIONS | {"weight_decay": 0.0, "step": 1, "lr": 2**-10, "eps": 0.0}
    ops.nm_adamw_(weight, grad, zeros, zeros.clone(), None, **options)
    below = 1 - 2**-8
    assert set(weight.unique().tolist()) == {below, 1.0}
    share = (weight == below).double().mean().item()
    assert share == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / weight.numel()) ** 0.5)  # five standard errors


def test_the_same_seed_gives_the_same_weights_at_any_thread_count() -> None:
    case = Case(33, 1030, torch.bfloat16)
    first = case.step()
    torch.set_num_threads(3)
    again = case.step()
    torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    other_seed = [tensor.clone() for tensor in case.tensors]
    ops.nm_adamw_(*other_seed, case.mask, **OPTIONS | {"seed": 1})
    assert not torch.equal(other_seed[0], first[0]) and torch.equal(other_seed[2], first[1])


def test_infinity_and_nan_stay_what_they_are(implementation: str) -> None:
    weight = torch.tensor([[float("inf"), -float("inf"), float("nan"), 3.3e38]], dtype=torch.bfloat16)
    zeros = torch.zeros(1, 4)
    ops.nm_adamw_(weight, torch.zeros_like(weight), zeros, zeros.clone(), None, **OPTIONS | {"weight_decay": 0.0})
    assert weight[0, 0] == float("inf") and weight[0, 1] == -float("inf") and bool(weight[0, 2].isnan())
    assert bool(weight[0, 3].isfinite())


@pytest.mark.parametrize("target", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masked_weight(implementation: str, shape: tuple[int, int], dtype: torch.dtype, target: Any) -> None:
    weight, kept = torch.randn(shape).to(dtype), torch.rand(shape) < 0.5
    weight[~kept] = float("nan")  # what is masked never matters
    found = ops.masked_weight(weight, pack_bits(kept), target)
    expected = torch.where(kept, weight, 0).to(target or dtype)
    assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_autograd_sees_the_change() -> None:
    weight = torch.randn(4, 8, requires_grad=True)
    y = (weight * weight).sum()
    with torch.no_grad():
        zeros = torch.zeros(4, 8)
        ops.nm_adamw_(weight, torch.ones(4, 8), zeros, zeros.clone(), None, **OPTIONS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4), (2, 3, 4, 5)], ids=str)
def test_without_a_mask_any_shape_in_any_order_is_changed(shape: tuple[int, ...]) -> None:
    """Also a parameter whose dimensions lie in another order in memory, as those of a convolution may."""
    case = Case(1, max(1, math.prod(shape)), torch.float32, False)
    backwards = range(len(shape))[::-1]
    laid = [tensor.clone().reshape(shape).permute(tuple(backwards)).contiguous() for tensor in case.tensors]
    weight, grad, exp_avg, exp_avg_sq = (tensor.permute(tuple(backwards)) for tensor in laid)
    ops.nm_adamw_(weight, grad.contiguous(), exp_avg, exp_avg_sq, None, **OPTIONS)
    case.check([tensor.reshape(1, -1) for tensor in (weight, exp_avg, exp_avg_sq)])


def test_a_parameter_with_gaps_is_refused() -> None:
    wide = torch.ones(2, 3, 8)
    gaps = wide[..., :4]
    with pytest.raises(ValueError, match="param is changed in place and must be contiguous; its strides are"):
        ops.nm_adamw_(gaps, torch.ones(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), None, **OPTIONS)
    assert (wide == 1).all()


def test_the_ops_are_registered_as_they_should_be() -> None:
    case = Case(4, 12, torch.float32)
    (b1, b2), o = OPTIONS["betas"], OPTIONS
    numbers = (o["lr"], b1, b2, o["eps"], o["weight_decay"], o["masked_decay"], o["step"], o["seed"])
    torch.library.opcheck(torch.ops.pyprune.nm_adamw_.default, (*case.tensors, case.mask, *numbers))
    torch.library.opcheck(torch.ops.pyprune.masked_weight.default, (case.tensors[0], case.mask, torch.bfloat16))


def refused(error: type[Exception], message: str, **changes: Any) -> None:
    case = Case(4, 12, torch.float32)
    tensors = dict(zip(("param", "grad", "exp_avg", "exp_avg_sq"), case.tensors, strict=True)) | {"mask": case.mask}
    with pytest.raises(error, match=message):
        ops.nm_adamw_(*(tensors | changes).values(), **OPTIONS)


def test_bad_input_is_refused() -> None:
    refused(TypeError, "param is torch.float16", param=torch.zeros(4, 12).half())
    refused(TypeError, "grad is torch.bfloat16, expected torch.float32", grad=torch.zeros(4, 12).bfloat16())
    refused(ValueError, r"exp_avg has shape \[4, 11\], expected \[4, 12\]", exp_avg=torch.zeros(4, 11))
    refused(ValueError, r"mask has shape \[4, 1\], expected \[4, 2\]", mask=torch.zeros(4, 1, dtype=torch.uint8))
    refused(TypeError, r"mask is torch.bool", mask=torch.zeros(4, 2, dtype=torch.bool))
    refused(ValueError, "param is changed in place and must be contiguous", param=torch.zeros(12, 4).T)
