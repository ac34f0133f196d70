"""csrc/nm.cu, bitmap.cu and sparse_gemm.cu on a device: the emulator's checks, layers of real size, the ops."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from sparse_checks import (
    DAMAGED_SHAPE,
    DTYPES,
    EMPTY_SHAPES,
    PATTERNS,
    PRODUCTS,
    SHAPES,
    WHOLE_ROWS,
    Launchers,
    Product,
    Shape,
    assert_same,
    bitmap_pack,
    bitmap_unpack,
    damaged_bitmaps,
    nm_compress,
    nm_decompress,
    nm_prune,
    nm_weight,
    odd_weight,
    reference,
)

from pyprune import _native, ops
from pyprune._cuda import plans, sparse_gemm

LARGE = (Shape(1, 4096, 11008), Shape(3, 11008, 4096), Shape(16, 4096, 4096), Shape(64, 4096, 6144))

pytestmark = pytest.mark.gpu


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_nm(launchers: Launchers, n: int, m: int, dtype: torch.dtype) -> None:
    for columns in (8 * m, 9 * m, 200 * m):
        scores = torch.randn(37, columns, generator=torch.Generator().manual_seed(m)).to(dtype)
        previous, _, _ = reference.nm_prune(-scores, n, m, None)
        assert_same(nm_prune(launchers, scores, n, m, previous), reference.nm_prune(scores, n, m, previous))
        weight = nm_weight(37, columns, n, m, dtype, odd=True)
        values, metadata, first = reference.nm_compress(weight, n, m)
        assert_same(nm_compress(launchers, weight, n, m), (values, metadata, first))
        dense = nm_decompress(launchers, values, metadata, n, m)
        assert_same((dense,), (reference.nm_decompress(values, metadata, n, m),))


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (65, 130), (130, 144), (1000, 1111)], ids=str)
def test_bitmap(launchers: Launchers, shape: tuple[int, int], dtype: torch.dtype) -> None:
    for sparsity in (0.0, 0.5, 1.0):
        weight = odd_weight(*shape, dtype, sparsity)
        packed = reference.bitmap_pack(weight)
        assert_same(bitmap_pack(launchers, weight), packed)
        dense = bitmap_unpack(launchers, *packed, *shape)
        assert_same((dense,), (reference.bitmap_unpack(*packed, *shape),))


@pytest.mark.sanitizer
@pytest.mark.parametrize("product", [product for product in PRODUCTS if product.op == "bitmap_linear"], ids=str)
def test_damaged_places_lead_nowhere(launchers: Launchers, product: Product) -> None:
    """Rows of other tiles are as they were; compute-sanitizer sees that nothing else is read."""
    outputs, inputs = DAMAGED_SHAPE
    shape = Shape(9, inputs, outputs)
    tensors = product.inputs(shape)
    tensors["values"], parts = damaged_bitmaps(tensors["weight"])
    right = product.run(launchers, shape, tensors)
    for tensors["bitmap"], tensors["offsets"] in parts:
        y = product.run(launchers, shape, tensors)
        dense = bitmap_unpack(launchers, *(tensors[name] for name in ("values", "bitmap", "offsets")), *DAMAGED_SHAPE)
        for rows in WHOLE_ROWS:
            assert torch.equal(y[:, rows], right[:, rows])
            assert_same((dense[rows],), (tensors["weight"][rows],))


@pytest.mark.sanitizer
@pytest.mark.parametrize("product", PRODUCTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES + EMPTY_SHAPES, ids=str)
def test_products(launchers: Launchers, shape: Shape, product: Product) -> None:
    tensors = product.inputs(shape)
    product.check(tensors, product.run(launchers, shape, tensors))


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_products_at_size_and_again(launchers: Launchers, shape: Shape, product: Product) -> None:
    tensors = product.inputs(shape, device="cuda")
    result = product.run(launchers, shape, tensors)
    product.check(tensors, result)
    for _ in range(5):
        assert torch.equal(product.run(launchers, shape, tensors), result), "differs from run to run"


@pytest.mark.parametrize("tokens", [1, 5, 40, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["nm_linear", "bitmap_linear"])
def test_functional_api(device: torch.device, op: str, dtype: torch.dtype, tokens: int) -> None:
    """Whatever the table of this device chooses, on another stream, with the gradient of x."""
    chosen, why = ops.choose(op, device, dtype)
    assert chosen.name == "cuda", why
    product = Product(op, dtype, False, 1)
    tensors = product.inputs(Shape(tokens, 1024, 768))
    packed = [tensor.to(device) for name, tensor in tensors.items() if name not in ("x", "weight", "bias")]
    pattern = (2, 4) if op == "nm_linear" else (768, 1024)
    x = tensors["x"].to(device).requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = getattr(ops, op)(x, *packed, *pattern, tensors["bias"].to(device))
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    stream.synchronize()
    product.check(tensors, y.detach().cpu())
    exact = tensors["weight"].double().sum(0).expand(tokens, -1)
    plain = torch.ones(tokens, 768, dtype=dtype) @ tensors["weight"]
    allowed = 2 * (plain.double() - exact).abs().max() + torch.finfo(dtype).eps / 2 * exact.abs().max()
    assert (grad.cpu().double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packing_at_size(launchers: Launchers, dtype: torch.dtype) -> None:
    """Bit for bit what the reference makes on the device: more tiles and groups than one wave of blocks has threads."""
    weight = nm_weight(4096, 11008, 2, 4, dtype, odd=True, device="cuda")
    scores = weight.nan_to_num()
    previous, _, _ = reference.nm_prune(-scores, 2, 4, None)
    for result, right in (
        (nm_prune(launchers, scores, 2, 4, previous), reference.nm_prune(scores, 2, 4, previous)),
        (packed := nm_compress(launchers, weight, 2, 4), reference.nm_compress(weight, 2, 4)),
        ((nm_decompress(launchers, *packed[:2], 2, 4),), (torch.where(weight == 0, 0, weight),)),
        (tiles := bitmap_pack(launchers, weight), reference.bitmap_pack(weight)),
        ((bitmap_unpack(launchers, *tiles, 4096, 11008),), (torch.where(weight == 0, 0, weight),)),
    ):
        assert_same(result, tuple(tensor.cpu() for tensor in right))


def test_errors_name_the_group(device: torch.device) -> None:
    weight = nm_weight(8, 32, 2, 4, torch.float16)
    weight[5, 8:12] = 1
    with pytest.raises(ValueError, match=r"row 5, group 2 \(columns 8 to 11\)"):
        ops.nm_compress(weight.to(device), 2, 4)
    weight[6, 0] = float("nan")
    with pytest.raises(ValueError, match=r"row 6, group 0 \(columns 0 to 3\)"):
        ops.nm_prune(weight.to(device), 2, 4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [Shape(512, 256, 128), Shape(700, 1040, 264), Shape(2048, 4096, 6144)], ids=str)
def test_cutlass(device: torch.device, shape: Shape, dtype: torch.dtype, bias: bool) -> None:
    """2:4 for many tokens on sm_90a: sizes that are multiples of its tiles, and that are not."""
    if not hasattr(_native.cuda, "nm_linear_cutlass") or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a build with PYPRUNE_CUTLASS=1 and a device of capability 9.0")
    product = Product("nm_linear", dtype, True, 1)
    tensors = product.inputs(shape, device="cuda")
    assert plans.suits_cutlass(tensors["x"], shape.outputs)
    packed = (tensors["values"], tensors["metadata"], 2, 4)
    with patch.object(sparse_gemm, "linear", side_effect=AssertionError("not by CUTLASS")):
        y = ops.nm_linear(tensors["x"], *packed, tensors["bias"] if bias else None)
    product.check(tensors, y, bias)
