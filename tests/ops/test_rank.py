"""The `rank` ops on the CPU: numbers against the definitions, gradients, dispatch, compile."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from pyprune import _native, ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 7), (33, 31), (0, 5), (5, 300), (9, 257), (2, 1031)]
STEPS = [7, 100, 255]
ISAS = _native.cpu.isas() if _native.cpu else ()
needs_kernels = pytest.mark.skipif(_native.cpu is None, reason=f"no compiled module: {_native.why_missing}")


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


def ranks(rows: int, columns: int) -> Tensor:
    """A random permutation in each row."""
    return torch.rand(rows, columns).argsort(1).to(torch.uint16)


def cut(columns: int, d: int, steps: int) -> int:
    """floor(columns d / steps), exactly."""
    return int(Fraction(columns * d, steps))


def masked_by_hand(weight: Tensor, rank: Tensor, threshold: Tensor) -> Tensor:
    out = torch.zeros_like(weight)
    for i, (row, order) in enumerate(zip(weight, rank.tolist(), strict=True)):
        for j, q in enumerate(order):
            if q >= threshold[i]:
                out[i, j] = row[j]
    return out


def gradient_by_hand(grad: Tensor, weight: Tensor, rank: Tensor, steps: int) -> Tensor:
    """One comparison for each weight and rate, fp64."""
    product, wide = grad.double() * weight.double(), rank.to(torch.int32)
    columns = weight.shape[1]
    return torch.stack([-(product * (wide < cut(columns, d, steps))).sum(1) for d in range(steps + 1)], dim=1)


# ------------------------------------------------------------------------------------------------------------- numbers


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_mask_is_exact(shape: tuple[int, int], dtype: torch.dtype, isa: str) -> None:
    rows, columns = shape
    weight, rank = torch.randn(shape).to(dtype), ranks(rows, columns)
    threshold = torch.randint(0, columns + 1, (rows,), dtype=torch.int32)
    threshold[:2] = torch.tensor([0, columns])[:rows]
    expected = masked_by_hand(weight, rank, threshold)
    assert torch.equal(ops.rank_mask(weight, rank, threshold), expected)
    with ops.using("reference"):
        assert torch.equal(ops.rank_mask(weight, rank, threshold), expected)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_gradient_of_the_rates(shape: tuple[int, int], steps: int, dtype: torch.dtype, isa: str) -> None:
    """Products of 16-bit numbers are exact in fp32, so the error is that of summing at most `columns` of them."""
    rows, columns = shape
    grad, weight, rank = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), ranks(rows, columns)
    expected = gradient_by_hand(grad, weight, rank, steps)
    result = ops.rank_bucket_grad(grad, weight, rank, steps)
    assert result.dtype == torch.float32
    allowed = 2**-23 * (grad.double() * weight.double()).abs().sum(1, keepdim=True)
    assert ((result - expected).abs() <= allowed).all()


def test_reference_in_fp64() -> None:
    grad, weight, rank = *torch.randn(2, 9, 301, dtype=torch.float64), ranks(9, 301)
    expected = gradient_by_hand(grad, weight, rank, 100)
    torch.testing.assert_close(ops.rank_bucket_grad(grad, weight, rank, 100), expected, rtol=0, atol=1e-12)


@needs_kernels
@pytest.mark.parametrize("columns", [65536, 65535, 60001, 53248, 28672, 11008, 4096, 3])
@pytest.mark.parametrize("steps", [1, 100, 255])
def test_bucket_of_every_rank(columns: int, steps: int) -> None:
    """One weight of one in each row of columns: the first d that counts it is the first whose cut exceeds its rank,
    for every rank of the widest rows; rank 65535 and threshold 65536 too."""
    rank = torch.arange(columns).to(torch.uint16)[None]
    ones, wide = torch.ones(1, columns), torch.arange(columns)
    result = ops.rank_bucket_grad(ones, ones, rank, steps)
    counts = [cut(columns, d, steps) for d in range(steps + 1)]
    assert result[0].neg().tolist() == counts  # sums of ones are exact
    for d in (0, 1, steps // 2, steps):
        out = ops.rank_mask(ones, rank, torch.tensor([counts[d]], dtype=torch.int32))
        assert torch.equal(out[0] != 0, wide >= counts[d])


def test_nan_is_dropped_by_the_mask_and_stays_in_its_row() -> None:
    weight, rank = torch.randn(4, 50), ranks(4, 50)
    gone = rank.to(torch.int32) < 20
    weight[gone] = float("nan")
    out = ops.rank_mask(weight, rank, torch.full((4,), 20, dtype=torch.int32))
    assert torch.equal(out == 0, gone) and not out.signbit()[gone].any()
    grad = torch.randn(4, 50)
    grad[1, 7] = float("nan")
    result = ops.rank_bucket_grad(grad, torch.ones(4, 50), rank, 10)
    assert result[1, -1].isnan() and result[[0, 2, 3]].isfinite().all()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_the_same_for_any_number_of_threads(dtype: torch.dtype) -> None:
    grad, weight, rank = torch.randn(37, 500).to(dtype), torch.randn(37, 500).to(dtype), ranks(37, 500)
    first = ops.rank_bucket_grad(grad, weight, rank, 100)
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(ops.rank_bucket_grad(grad, weight, rank, 100), first)
    finally:
        torch.set_num_threads(1)


# ----------------------------------------------------------------------------------------------------- through the mask


def besa_by_autograd(weight: Tensor, rank: Tensor, beta: Tensor) -> Tensor:
    """BESA as its authors write it: the explicit matrix of keep probabilities, straight through the hard mask."""
    columns, steps = weight.shape[1], beta.shape[1] - 1
    wide = rank.to(torch.int64)
    exceeds = torch.tensor([[cut(columns, d, steps) > q for q in range(columns)] for d in range(steps + 1)]).double()
    keep = 1 - (beta @ exceeds).gather(1, wide)
    rates = torch.arange(steps + 1, dtype=torch.float64) / steps
    hard = (wide >= ((beta.detach() @ rates) * columns).floor()[:, None]).double()
    return weight * (hard - keep.detach() + keep)


@pytest.mark.parametrize("steps", [10, 100])
def test_gradient_equals_autograd_through_the_probability_matrix(steps: int) -> None:
    weight, rank = torch.randn(6, 130, dtype=torch.float64), ranks(6, 130)
    theta = torch.randn(6, steps + 1, dtype=torch.float64, requires_grad=True)
    seen = torch.randn(6, 130, dtype=torch.float64)
    results = []
    for function in (ops.rank_allocate, besa_by_autograd):
        out = function(weight, rank, theta.softmax(1))
        (grad,) = torch.autograd.grad((out.sin() * seen).sum(), theta)
        results.append((out.detach(), grad))
    assert torch.equal(*(out for out, _ in results))
    assert results[0][1].abs().max() > 1e-2
    assert (results[0][1] - results[1][1]).abs().max() < 1e-12


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_give_besas_gradient_too(dtype: torch.dtype) -> None:
    weight, rank = torch.randn(6, 130).to(dtype), ranks(6, 130)
    beta = torch.randn(6, 101).softmax(1).requires_grad_()
    out = ops.rank_allocate(weight, rank, beta)
    (grad,) = torch.autograd.grad(out.float().square().sum() / 2, beta)
    exact_beta = beta.detach().double().requires_grad_()
    exact = besa_by_autograd(weight.double(), rank, exact_beta)
    (expected,) = torch.autograd.grad(exact.square().sum() / 2, exact_beta)
    assert torch.equal(out.double(), exact.detach())
    assert (grad - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_gradient_of_the_weight_passes_the_mask() -> None:
    weight, rank = torch.randn(5, 40, requires_grad=True), ranks(5, 40)
    beta = torch.zeros(5, 5)
    beta[:, 2] = 1  # half
    seen = torch.randn(5, 40)
    (ops.rank_allocate(weight, rank, beta) * seen).sum().backward()
    assert torch.equal(weight.grad, seen * (rank.to(torch.int32) >= 20))


def test_one_rate_for_all_rows_gets_the_sum() -> None:
    weight, rank, shared = torch.randn(5, 40), ranks(5, 40), torch.randn(1, 11).softmax(1).requires_grad_()
    seen = torch.randn(5, 40)
    (grad,) = torch.autograd.grad((ops.rank_allocate(weight, rank, shared.expand(5, 11)) * seen).sum(), shared)
    expected = gradient_by_hand(seen, weight, rank, 10).sum(0)
    torch.testing.assert_close(grad[0].double(), expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- torch's side


@pytest.mark.parametrize("implementation", ["chosen", "reference"])
def test_opcheck(implementation: str) -> None:
    weight, grad, rank = torch.randn(4, 12), torch.randn(4, 12), ranks(4, 12)
    threshold = torch.tensor([0, 3, 12, 7], dtype=torch.int32)
    chosen, _ = ops.choose("rank_mask", weight.device, weight.dtype)
    with ops.using(chosen if implementation == "chosen" else "reference"):
        torch.library.opcheck(torch.ops.pyprune.rank_mask.default, (weight, rank, threshold))
        torch.library.opcheck(torch.ops.pyprune.rank_bucket_grad.default, (grad, weight, rank, 10))


def test_strided_inputs() -> None:
    weight, grad, rank = torch.randn(12, 7).T, torch.randn(7, 24)[:, ::2], ranks(7, 12).T.contiguous().T
    threshold = torch.full((7,), 5, dtype=torch.int32)
    assert torch.equal(
        ops.rank_mask(weight, rank, threshold), ops.rank_mask(weight.contiguous(), rank.contiguous(), threshold)
    )
    assert torch.equal(
        ops.rank_bucket_grad(grad, weight, rank, 10),
        ops.rank_bucket_grad(grad.contiguous(), weight.contiguous(), rank.contiguous(), 10),
    )


def test_compile_in_one_graph() -> None:
    def step(weight: Tensor, rank: Tensor, theta: Tensor) -> Tensor:
        return ops.rank_allocate(weight, rank, theta.softmax(1)).square().sum()

    torch._dynamo.reset()
    weight, rank = torch.randn(6, 24), ranks(6, 24)
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        theta = torch.linspace(-1, 1, 6 * 21).view(6, 21).requires_grad_()
        run(weight, rank, theta).backward()
        results.append(theta.grad)
    assert torch.equal(*results)


# -------------------------------------------------------------------------------------------------------------- errors

WEIGHT, RANK = torch.zeros(3, 8), torch.zeros(3, 8, dtype=torch.uint16)
THRESHOLD, BETA = torch.zeros(3, dtype=torch.int32), torch.full((3, 11), 1 / 11)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.rank_mask(WEIGHT, RANK.to(torch.int32), THRESHOLD), "rank is torch.int32, expected torch.uint16"),
        (lambda: ops.rank_mask(WEIGHT, RANK[:2], THRESHOLD), r"rank has shape \[2, 8\], expected \[3, 8\]"),
        (lambda: ops.rank_mask(WEIGHT, RANK, THRESHOLD.long()), "threshold is torch.int64, expected torch.int32"),
        (lambda: ops.rank_mask(WEIGHT, RANK, THRESHOLD[:2]), r"threshold has shape \[2\], expected \[3\]"),
        (lambda: ops.rank_mask(WEIGHT[:, :0], RANK[:, :0], THRESHOLD), "1 to 65536 columns"),
        (lambda: ops.rank_mask(WEIGHT.int(), RANK, THRESHOLD), "weight is torch.int32, expected one of"),
        (lambda: ops.rank_bucket_grad(WEIGHT, WEIGHT, RANK, 256), "steps is 256, expected 1 to 255"),
        (
            lambda: ops.rank_bucket_grad(WEIGHT.half(), WEIGHT, RANK, 10),
            "grad is torch.float16, expected torch.float32",
        ),
        (lambda: ops.rank_bucket_grad(WEIGHT[:2], WEIGHT, RANK, 10), r"grad has shape \[2, 8\], expected \[3, 8\]"),
        (lambda: ops.rank_allocate(WEIGHT, RANK, BETA[:2]), r"beta has shape \[2, 11\], expected \[3, 2 to 256\]"),
        (lambda: ops.rank_allocate(WEIGHT, RANK, BETA.double()), "beta is torch.float64, expected torch.float32"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()
