"""The `sparse_gemm` ops on the CPU: numbers against fp64 on every instruction set, gradients, dispatch, compile."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from sparse_cases import DTYPES, ISAS, needs_kernels, using_isa
from torch import Tensor
from torch.nn.functional import linear

from pyprune import ops
from pyprune._cpu import CpuKernels, sparse_gemm
from pyprune.reference.bits import pack_bits, unpack_bits

# (tokens, out, in): single elements, around 8, 16 and 64, no tokens, and several blocks of rows and panels of columns.
SHAPES = [
    (1, 1, 1),
    (1, 64, 64),
    (2, 31, 33),
    (3, 33, 31),
    (4, 65, 63),
    (5, 63, 65),
    (8, 16, 256),
    (9, 17, 257),
    (16, 70, 511),
    (33, 130, 96),
    (24, 30, 300),
    (63, 5, 300),
    (65, 3, 70),
    (150, 70, 600),
    (0, 8, 8),
]
Op = Callable[[Tensor, Tensor | None], Tensor]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set this machine runs, by the kernels for any number of tokens."""
    monkeypatch.setattr(sparse_gemm, "few_tokens", lambda isa, dtype: sys.maxsize)
    with using_isa(request.param):
        yield request.param


@pytest.fixture
def poison() -> Iterator[None]:
    """Uninitialised memory is NaN: what a kernel forgets to write, or reads before writing, shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def nm_case(weight: Tensor, n: int, m: int) -> tuple[Op, Tensor]:
    """`nm_linear` on weight with its columns cut to whole groups and pruned, and the dense weight it stands for."""
    bits, _ = ops.nm_prune(weight.abs(), n, m)
    dense = ops.masked_weight(weight, bits)
    packed = ops.nm_compress(dense, n, m)
    return lambda x, bias: ops.nm_linear(x, *packed, n, m, bias), dense


def bitmap_case(weight: Tensor, sparsity: float) -> tuple[Op, Tensor]:
    """`bitmap_linear` on weight with entries dropped at random."""
    dense = weight * (torch.rand(weight.shape) >= sparsity)
    packed = ops.bitmap_pack(dense)
    return lambda x, bias: ops.bitmap_linear(x, *packed, *weight.shape, bias), dense


def masked_case(weight: Tensor) -> tuple[Op, Tensor]:
    """`masked_linear`, with NaN where the mask is 0."""
    mask = torch.rand(weight.shape) < 0.5
    spoiled = weight.masked_fill(~mask, float("nan"))
    return lambda x, bias: ops.masked_linear(x, spoiled, pack_bits(mask), bias), weight * mask


CASES: dict[str, Callable[[Tensor], tuple[Op, Tensor]]] = {
    "nm 2:4": lambda weight: nm_case(weight[:, : weight.shape[1] // 4 * 4], 2, 4),
    "nm 4:8": lambda weight: nm_case(weight[:, : weight.shape[1] // 8 * 8], 4, 8),
    "nm 3:7": lambda weight: nm_case(weight[:, : weight.shape[1] // 7 * 7], 3, 7),
    "bitmap 0%": lambda weight: bitmap_case(weight, 0.0),
    "bitmap 50%": lambda weight: bitmap_case(weight, 0.5),
    "bitmap 97%": lambda weight: bitmap_case(weight, 0.97),
    "masked": masked_case,
}


def assert_as_exact_as_torch(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """At most twice as far from fp64 as torch's product with the dense weight, plus a unit in the last place of the
    largest result (four for fp32: there the order of summation is the error), because torch may be exact by luck."""
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert y.shape == exact.shape and y.dtype == x.dtype
    if y.numel() == 0:
        return
    units = 4 if x.dtype == torch.float32 else 1
    allowance = units * torch.finfo(x.dtype).eps * max(1.0, exact.abs().max().item())
    error = (y.double() - exact).abs().max().item()
    plain = (linear(x, weight, bias).double() - exact).abs().max().item()
    assert error <= 2 * plain + allowance, f"{error:.3e}, torch {plain:.3e}"


def inputs(tokens: int, outputs: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias of unit scale; y is about as large as x."""
    x, weight = torch.randn(tokens, columns), torch.randn(outputs, columns) / max(1, columns) ** 0.5
    return x.to(dtype), weight.to(dtype), torch.randn(outputs).to(dtype)


# ------------------------------------------------------------------------------------------------------------- numbers


@needs_kernels
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_kernels_are_as_exact_as_torch(case: str, dtype: torch.dtype, isa: str) -> None:
    for shape in SHAPES:
        x, weight, bias = inputs(*shape, dtype)
        op, dense = CASES[case](weight)
        x = x[:, : dense.shape[1]]
        assert_as_exact_as_torch(op(x, bias), x, dense, bias)
        assert_as_exact_as_torch(op(x, None), x, dense, None)


@needs_kernels
@pytest.mark.parametrize("wide", [False, True], ids=["as stored", "in fp32"])
@pytest.mark.parametrize("case", ["nm 2:4", "bitmap 50%", "masked"])
def test_many_tokens_multiply_in_either_type(case: str, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of expanded rows, whichever this processor would take; two blocks of rows, the last one cut short."""
    monkeypatch.setattr(sparse_gemm, "product_dtype", lambda dtype: torch.float32 if wide else dtype)
    monkeypatch.setattr(sparse_gemm, "few_tokens", lambda isa, dtype: 16)
    monkeypatch.setattr(sparse_gemm, "BLOCK_BYTES", 0)
    for dtype in (torch.bfloat16, torch.float16):
        x, weight, bias = inputs(80, 130, 96, dtype)
        op, dense = CASES[case](weight)
        assert_as_exact_as_torch(op(x, bias), x, dense, bias)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_gathered_channels(dtype: torch.dtype, isa: str) -> None:
    """Rows and columns kept at random, none of them, all of them, and whole words of 64 columns left out."""
    for tokens, outputs, columns in SHAPES:
        _, weight, bias = inputs(tokens, outputs, columns, dtype)
        some_in, some_out = (torch.arange(size)[torch.rand(size) < 0.6] for size in (columns, outputs))
        none = torch.zeros(0, dtype=torch.int64)
        far = torch.arange(columns)[torch.arange(columns) // 64 % 3 == 1]
        for in_index, out_index in ((some_in, some_out), (None, some_out), (some_in, None), (far, none), (none, None)):
            kept = weight if out_index is None else weight[out_index]
            kept = kept if in_index is None else kept[:, in_index]
            kept_bias = bias if out_index is None else bias[out_index]
            x = torch.randn(tokens, kept.shape[1]).to(dtype)
            y = ops.gathered_linear(x, weight, in_index, out_index, bias)
            assert_as_exact_as_torch(y, x, kept, kept_bias)


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 24, 40, 200, 530])
@pytest.mark.parametrize("case", ["nm 2:4", "bitmap 50%", "masked"])
def test_integers_are_exact(case: str, tokens: int, isa: str) -> None:
    """Sums of small integers are exact in every order: any element in a wrong place shows."""
    for dtype in DTYPES:
        weight = torch.randint(-3, 4, (97, 340)).to(dtype)
        x = torch.randint(-3, 4, (tokens, 340)).to(dtype)
        op, dense = CASES[case](weight)
        exact = (x.double() @ dense.double().T).to(dtype)
        assert torch.equal(op(x[:, : dense.shape[1]], None), exact)


@needs_kernels
def test_results_do_not_depend_on_the_number_of_threads(isa: str) -> None:
    for tokens in (1, 7, 20, 70):
        x, weight, bias = inputs(tokens, 300, 328, torch.bfloat16)
        for case in CASES.values():
            op, dense = case(weight)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(op(x[:, : dense.shape[1]], bias))
            torch.set_num_threads(1)
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("case", CASES)
def test_nan_stays_in_its_row(case: str) -> None:
    for tokens in (3, 40):
        x, weight, _ = inputs(tokens, 20, 96, torch.bfloat16)
        op, dense = CASES[case](weight)
        x = x[:, : dense.shape[1]].clone()
        clean = op(x, None)
        x[1, 5] = float("nan")
        spoiled = op(x, None)
        assert spoiled[1].isnan().all()
        assert torch.equal(spoiled[torch.arange(tokens) != 1], clean[torch.arange(tokens) != 1])


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("case", CASES)
def test_gradients_in_fp64(case: str) -> None:
    x, weight, bias = inputs(3, 5, 30, torch.float64)
    op, dense = CASES[case](weight)
    x = x[:, : dense.shape[1]].clone().requires_grad_()
    assert torch.autograd.gradcheck(op, (x, bias.requires_grad_()))


def test_gradients_of_the_weight() -> None:
    x, weight, bias = (t.requires_grad_() for t in inputs(4, 6, 10, torch.float64))
    mask = torch.rand(6, 10) < 0.5
    assert torch.autograd.gradcheck(lambda x, w, b: ops.masked_linear(x, w, pack_bits(mask), b), (x, weight, bias))
    kept = (torch.tensor([0, 3, 4, 9]), torch.tensor([1, 2, 5]))
    some = x[:, :4].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w, b: ops.gathered_linear(x, w, *kept, b), (some, weight, bias))

    assert torch.autograd.gradgradcheck(lambda x, w, b: ops.gathered_linear(x, w, *kept, b), (some, weight, bias))

    grad_y = torch.randn(4, 6, dtype=torch.float64)
    dense = torch.autograd.grad(ops.masked_linear(x, weight, pack_bits(mask), bias, True), weight, grad_y)[0]
    torch.testing.assert_close(dense, grad_y.T @ x)


@pytest.mark.parametrize("packed", ["nm", "bitmap"])
def test_second_derivatives_are_those_of_the_dense_weight(packed: str) -> None:
    """Of a gradient's length, whose derivative goes through the product twice."""
    x, weight, _ = inputs(3, 5, 32, torch.float32)
    weight = ops.masked_weight(weight, ops.nm_prune(weight.abs(), 2, 4)[0])
    values, *rest = ops.nm_compress(weight, 2, 4) if packed == "nm" else ops.bitmap_pack(weight)
    product = {
        "nm": lambda x: ops.nm_linear(x, values, *rest, 2, 4),
        "bitmap": lambda x: ops.bitmap_linear(x, values, *rest, 5, 32),
    }[packed]
    x.requires_grad_()

    def twice(function: Callable[[Tensor], Tensor]) -> Tensor:
        (grad,) = torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), x)[0]

    expected = twice(lambda x: linear(x, weight))
    assert (twice(product) - expected).norm() < 1e-5 * expected.norm()  # fp32, four products deep


@needs_kernels
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_the_kernels(case: str, dtype: torch.dtype) -> None:
    """As exact as torch's, for x and bias."""
    x, weight, bias = inputs(70, 40, 96, dtype)
    op, dense = CASES[case](weight)
    grad_y = torch.randn(70, 40).to(dtype)

    def gradients(function: Op, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x[:, : dense.shape[1]].to(dtype).requires_grad_(), bias.to(dtype).requires_grad_()]
        return list(torch.autograd.grad(function(*leaves), leaves, grad_y.to(dtype)))

    exact = gradients(lambda x, bias: linear(x, dense.double(), bias), torch.float64)
    plain = gradients(lambda x, bias: linear(x, dense, bias), dtype)
    for found, torchs, expected in zip(gradients(op, dtype), plain, exact, strict=True):
        allowance = torch.finfo(dtype).eps * expected.abs().max()
        assert (found - expected).abs().max() <= 2 * (torchs - expected).abs().max() + allowance


def test_packed_weights_are_constants() -> None:
    """LoRA on top of a packed base: x's gradient flows, and nothing else is asked for one, whatever was packed."""
    trained = torch.eye(8, requires_grad=True)
    assert not any(tensor.requires_grad for tensor in (*ops.bitmap_pack(trained), *ops.nm_compress(trained, 2, 4)))
    x, weight, _ = inputs(3, 8, 16, torch.float32)
    op, _ = CASES["bitmap 50%"](weight)
    x.requires_grad_()
    op(x, None).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


# -------------------------------------------------------------------------------------------------------- torch's side


@pytest.mark.parametrize("case", CASES)
def test_leading_dimensions_strides_and_autocast(case: str) -> None:
    x, weight, bias = inputs(6, 10, 56, torch.bfloat16)
    op, _ = CASES[case](weight)
    expected = op(x, bias)
    strided = torch.stack([x, -x], -1)[..., 0].unflatten(0, (2, 3))
    assert torch.equal(op(strided, bias), expected.unflatten(0, (2, 3)))
    with torch.autocast("cpu", torch.bfloat16):
        y = op(x.float(), bias.float())
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)


@pytest.mark.parametrize("implementation", ["chosen", "reference"])
def test_opcheck(implementation: str) -> None:
    x, weight, bias = inputs(6, 9, 16, torch.float32)
    bits, _ = ops.nm_prune(weight.abs(), 2, 4)
    dense = ops.masked_weight(weight, bits)
    index = torch.tensor([0, 5, 6])
    table = {
        "nm_linear": (x, *ops.nm_compress(dense, 2, 4), 2, 4, bias),
        "bitmap_linear": (x, *ops.bitmap_pack(dense), 9, 16, bias),
        "masked_linear": (x, weight, bits, bias),
        "gathered_linear": (x[:, :3].contiguous(), weight, index, index, bias),
    }
    for op, arguments in table.items():
        if implementation == "reference":
            with ops.using("reference"):
                torch.library.opcheck(getattr(torch.ops.pyprune, op).default, arguments)
        else:
            torch.library.opcheck(getattr(torch.ops.pyprune, op).default, arguments)


@pytest.mark.parametrize("case", ["nm 2:4", "bitmap 50%", "masked"])
def test_compile_in_one_graph(case: str) -> None:
    """fullgraph compile of forward and backward gives the eager bits."""
    x, weight, bias = inputs(12, 9, 64, torch.float32)
    op, _ = CASES[case](weight)

    def step(x: Tensor, bias: Tensor) -> Tensor:
        return op(x, bias).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (12, 5):
        results = []
        for function in (step, compiled):
            leaf = x[:tokens].clone().requires_grad_()
            loss = function(leaf, bias)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_arguments_are_checked() -> None:
    x, weight, bias = inputs(2, 8, 16, torch.float32)
    packed = ops.bitmap_pack(weight)
    with pytest.raises(ValueError, match=r"bitmap_linear: x has shape \[2, 15\], expected \[tokens, 16\]"):
        ops.bitmap_linear(x[:, :15], *packed, 8, 16)
    with pytest.raises(TypeError, match=r"bitmap_linear: values is torch.float32, expected torch.bfloat16 for x"):
        ops.bitmap_linear(x.bfloat16(), *packed, 8, 16)
    with pytest.raises(ValueError, match=r"bitmap_linear: bias has shape \[7\], expected \[8\]"):
        ops.bitmap_linear(x, *packed, 8, 16, bias[:7])
    with pytest.raises(ValueError, match=r"nm_linear: x has shape \[2, 16\], expected \[tokens, 8\]"):
        ops.nm_linear(x, weight[:, :4], torch.zeros(8, 1, dtype=torch.uint8), 2, 4)
    with pytest.raises(ValueError, match=r"masked_linear: mask_bits has shape \[8, 1\], expected \[8, 2\]"):
        ops.masked_linear(x, weight, torch.zeros(8, 1, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"masked_linear: mask_bits is torch.bool, expected its bits, .*ops.pack_bits"):
        ops.masked_linear(x, weight, weight > 0)
    with pytest.raises(TypeError, match=r"mask_bits is torch.int32, expected torch.uint8; cast it first"):
        ops.masked_linear(x, weight, torch.zeros(8, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="masked_linear: mask_bits is on meta, x is on cpu"):
        ops.masked_linear(x, weight, torch.zeros(8, 2, dtype=torch.uint8, device="meta"))
    with pytest.raises(IndexError, match=r"gathered_linear: out_index spans 3 to 8, expected 0 to 7"):
        ops.gathered_linear(x, weight, None, torch.tensor([3, 8]))
    with pytest.raises(IndexError, match="in_index spans -1 to 0"):
        ops.gathered_linear(x[:, :2], weight, torch.tensor([-1, 0]))
    with pytest.raises(ValueError, match="out_index does not rise"):
        ops.gathered_linear(x, weight, None, torch.tensor([3, 3]))
    with pytest.raises(TypeError, match=r"in_index is torch.int32"):
        ops.gathered_linear(x, weight, torch.arange(16, dtype=torch.int32))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_damaged_places_lead_nowhere(dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong bits, and offsets that nobody checked, give wrong rows, never a read outside values; other tiles' rows are
    as they were."""
    monkeypatch.setattr(CpuKernels, "_check_offsets", lambda *arguments: None)
    weight = torch.randn(192, 320).to(dtype)
    weight[torch.rand_like(weight.float()) < 0.5] = 0
    values, bitmap, offsets = ops.bitmap_pack(weight)
    everything = bitmap.clone()
    everything[5:10] = 255  # of the second of three rows of tiles
    for tokens in (1, 20, 100):  # in registers, by a panel, and expanded
        monkeypatch.setattr(sparse_gemm, "few_tokens", lambda isa, dtype: 20)
        x = torch.randn(tokens, 320).to(dtype)
        right = ops.bitmap_linear(x, values, bitmap, offsets, 192, 320)
        y = ops.bitmap_linear(x, values, everything, offsets, 192, 320)
        assert torch.equal(y[:, :64], right[:, :64]) and torch.equal(y[:, 128:], right[:, 128:])
        for place in (-1, -(1 << 62), len(values) - 1, len(values), 1 << 40, (1 << 62) + 1):
            elsewhere = offsets.clone()
            elsewhere[7] = place
            y = ops.bitmap_linear(x, values, bitmap, elsewhere, 192, 320)
            assert torch.equal(y[:, :64], right[:, :64]) and torch.equal(y[:, 128:], right[:, 128:]), place
        elsewhere = offsets.clone()
        elsewhere[14] = 1 << 50  # of the last tile, whose end stays
        y = ops.bitmap_linear(x, values, bitmap, elsewhere, 192, 320)
        assert torch.equal(y[:, :128], right[:, :128])


@needs_kernels
def test_offsets_that_do_not_fit_are_named() -> None:
    weight = torch.randn(192, 320)
    weight[torch.rand_like(weight) < 0.5] = 0
    values, bitmap, offsets = ops.bitmap_pack(weight)
    begin, end, size = int(offsets[7]), int(offsets[8]), len(values)
    for first, last in (
        (-8, 8),  # a tile that begins before the array,
        (size - 8, size + 8),  # ends behind it,
        ((1 << 63) - 8, -(1 << 63)),
        (end, begin),  # ends before it begins,
        (begin + 3, end),  # is off the alignment,
        (begin, end + 4096),  # or has more than a tile can
    ):
        elsewhere = offsets.clone()
        elsewhere[7:9] = torch.tensor([first, last])
        message = rf"offsets has tile [678] from -?\d+ to -?\d+, expected multiples of 8, at most 4096 .* the {size} "
        with pytest.raises(ValueError, match=f"bitmap_linear: {message}"):
            ops.bitmap_linear(torch.randn(2, 320), values, bitmap, elsewhere, 192, 320)
        with pytest.raises(ValueError, match=f"bitmap_unpack: {message}"):
            ops.bitmap_unpack(values, bitmap, elsewhere, 192, 320)
    with pytest.raises(ValueError, match=rf"offsets has tile 14 from \d+ to {size}, .* the {size - 8} elements"):
        ops.bitmap_linear(torch.randn(2, 320), values[:-8], bitmap, offsets, 192, 320)
    with pytest.raises(ValueError, match=rf"values has {size + 8} elements, offsets ends at {size}"):
        ops.bitmap_unpack(torch.cat([values, values[:8]]), bitmap, offsets, 192, 320)


def test_masks_agree_with_bits() -> None:
    """The mask of `nm_prune` is what `masked_linear` takes."""
    x, weight, _ = inputs(2, 8, 16, torch.float32)
    bits, _ = ops.nm_prune(weight.abs(), 2, 4)
    torch.testing.assert_close(ops.masked_linear(x, weight, bits), linear(x, weight * unpack_bits(bits, 16)))
