"""lora_group_score on the CPU: numbers against the definition in fp64, dispatch, fakes, bad input."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pyprune import _native, ops, reference
from pyprune.reference import lora_score

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (outputs, inputs, rank): one weight, rows and columns beside a vector, a strip and the row tile, no rank, nothing.
SHAPES = [(1, 1, 1), (5, 17, 3), (67, 259, 8), (8, 512, 16), (130, 33, 65), (4, 7, 0), (0, 5, 2), (5, 0, 2)]
ISAS = _native.cpu.isas() if _native.cpu else ()
needs_kernels = pytest.mark.skipif(_native.cpu is None, reason=f"no compiled module: {_native.why_missing}")
SCALE = 1.7

Factors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set this machine runs."""
    before = _native.cpu.isa()
    _native.cpu.set_isa(request.param)
    yield request.param
    _native.cpu.set_isa(before)


@pytest.fixture
def poison() -> Iterator[None]:
    """Uninitialised memory is NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(outputs: int, inputs: int, rank: int, dtype: torch.dtype, seed: int = 0) -> Factors:
    """Weight, A, B and their gradients, of the sizes met in training; both terms of Ghat count."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=g) * scale

    weight = normal(outputs, inputs, scale=0.05).to(dtype)
    a, b = normal(rank, inputs, scale=0.3), normal(outputs, rank, scale=0.1)
    return weight, a, b, normal(rank, inputs, scale=0.2), normal(outputs, rank, scale=0.1)


def by_hand(factors: Factors, dim: int) -> tuple[Tensor, Tensor]:
    """The definition in fp64, and the sum of the magnitudes of everything that is added and multiplied, which rounding
    is measured by."""
    w, a, b, ga, gb = (tensor.double() for tensor in factors)
    score = (gb @ a + b @ ga - gb @ ga) * (w + SCALE * b @ a)
    size = (gb.abs() @ (a - ga).abs() + b.abs() @ ga.abs()) * (w.abs() + SCALE * b.abs() @ a.abs())
    return score.abs().sum(1 - dim), size.sum(1 - dim)


@needs_kernels
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_kernels_agree_with_fp64(shape: tuple[int, int, int], dtype: torch.dtype, dim: int, isa: str) -> None:
    """Off by at most twice what plain fp32 torch is off by, and a rounding (2^-22) of what was added."""
    factors = make(*shape, dtype)
    exact, size = by_hand(factors, dim)
    result = ops.lora_group_score(*factors, SCALE, dim)
    plain = reference.lora_group_score(*factors, SCALE, dim)
    assert result.dtype == torch.float32 and result.shape == exact.shape
    assert ops.choose("lora_group_score", factors[0].device, dtype)[0].name == "cpu"
    assert ((result - exact).abs() <= 2 * (plain - exact).abs().max() + 2**-22 * size).all() if exact.numel() else True


@pytest.mark.parametrize("dim", [0, 1])
def test_reference_is_the_definition_a_slab_at_a_time(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = tuple(tensor.double() for tensor in make(67, 33, 5, torch.float32))
    exact, _ = by_hand(factors, dim)  # type: ignore[arg-type]
    for slab in (1, 33 * 7, 1 << 20):
        monkeypatch.setattr(lora_score, "SLAB", slab)
        torch.testing.assert_close(ops.lora_group_score(*factors, SCALE, dim), exact, rtol=1e-12, atol=0)


@needs_kernels
@pytest.mark.parametrize("dim", [0, 1])
def test_the_same_bits_for_any_number_of_threads(dim: int) -> None:
    factors = make(301, 513, 8, torch.bfloat16)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(ops.lora_group_score(*factors, SCALE, dim))
    torch.set_num_threads(1)
    assert torch.equal(*results)


@pytest.mark.parametrize("where", range(5))
def test_what_is_not_finite_shows(where: int) -> None:
    factors = make(9, 20, 3, torch.float32)
    factors[where][1, 1] = torch.nan
    assert not torch.isfinite(ops.lora_group_score(*factors, SCALE, 0)).all()


def test_transposed_inputs_are_taken() -> None:
    factors = make(12, 20, 3, torch.float32)
    turned = tuple(tensor.T.contiguous().T for tensor in factors)
    assert torch.equal(ops.lora_group_score(*turned, SCALE, 1), ops.lora_group_score(*factors, SCALE, 1))


def test_registration() -> None:
    factors = make(12, 20, 3, torch.bfloat16)
    for dim in (0, 1):
        torch.library.opcheck(torch.ops.pyprune.lora_group_score.default, (*factors, SCALE, dim))
    compiled = torch.compile(
        lambda *tensors: ops.lora_group_score(*tensors, SCALE, 0) + 1, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(*factors), ops.lora_group_score(*factors, SCALE, 0) + 1)
    factors[1].requires_grad_(True)
    assert not ops.lora_group_score(*factors, SCALE, 0).requires_grad


def test_bad_input() -> None:
    weight, a, b, ga, gb = make(6, 8, 2, torch.bfloat16)
    for arguments, error, message in (
        ((weight[0], a, b, ga, gb, 1.0, 0), ValueError, r"weight has shape \[8\], expected \[out, in\]"),
        ((weight, a[:, 1:], b, ga, gb, 1.0, 0), ValueError, r"a has shape \[2, 7\], expected \[2, 8\]"),
        ((weight, a, b[:, :1], ga, gb, 1.0, 0), ValueError, r"b has shape \[6, 1\], expected \[6, 2\]"),
        ((weight, a, b, ga[:1], gb, 1.0, 0), ValueError, r"grad_a has shape \[1, 8\], expected \[2, 8\]"),
        ((weight, a, b, ga, gb.T, 1.0, 0), ValueError, r"grad_b has shape \[2, 6\], expected \[6, 2\]"),
        ((weight, a.bfloat16(), b, ga, gb, 1.0, 0), TypeError, "a is torch.bfloat16, expected torch.float32"),
        ((weight.int(), a, b, ga, gb, 1.0, 0), TypeError, "weight is torch.int32"),
        ((weight, a, b, ga, gb, 1.0, 2), ValueError, "dim is 2; expected 0"),
    ):
        with pytest.raises(error, match=message):
            ops.lora_group_score(*arguments)
