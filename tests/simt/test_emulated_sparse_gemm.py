"""csrc/sparse_gemm.cu on the emulator: right numbers in every schedule, and every barrier needed and noticed."""

from __future__ import annotations

import json
import re

import pytest
import torch
from emulator import EAGER_GREEDY, LAZY, ROOT, SCHEDULES, Emulator, Schedule
from sparse_checks import (
    DAMAGED_SHAPE,
    EMPTY_SHAPES,
    PRODUCTS,
    SHAPES,
    WHOLE_ROWS,
    Launchers,
    Product,
    Shape,
    damaged_bitmaps,
    nm_weight,
    reference,
)
from torch import Tensor

from pyprune import ops
from pyprune._cuda import CudaKernels, plans
from pyprune.reference.bits import pack_bits

SOURCE = ROOT / "csrc/sparse_gemm.cu"
BUSY = Shape(5, 1160, 72)  # Five stages a part: the last one lies where the first did. A rest everywhere.
MORE_TOKENS = (Shape(11, 520, 72), Shape(20, 520, 72), Shape(40, 520, 72))  # The kernels for up to 16, 32 and 64.
EDGES = (4, 5, 8, 9, 15, 16, 17, 24, 25, 31, 32, 33, 40, 41, 64, 65)
"""Tokens: where one kernel ends and the next begins, and where tiles of eight are left out."""
FORMATS = [product for product in PRODUCTS if product.dtype == torch.bfloat16 and product.splits == 2]


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("schedule", [LAZY, EAGER_GREEDY], ids=str)
def test_agrees_with_fp64(
    emulator: Emulator, launchers: Launchers, schedule: Schedule, shape: Shape, product: Product
) -> None:
    tensors = product.inputs(shape)
    with emulator.using(schedule):
        product.check(tensors, product.run(launchers, shape, tensors))


@pytest.mark.parametrize("product", FORMATS, ids=str)
@pytest.mark.parametrize("tokens", EDGES)
@pytest.mark.parametrize("inputs, outputs", [(384, 64), (300, 70)], ids=["whole pieces", "rests"])
def test_every_kernel_up_to_its_last_token(
    emulator: Emulator, launchers: Launchers, inputs: int, outputs: int, tokens: int, product: Product
) -> None:
    shape = Shape(tokens, inputs, outputs)
    tensors = product.inputs(shape)
    for schedule in (LAZY, EAGER_GREEDY):
        with emulator.using(schedule):
            product.check(tensors, product.run(launchers, shape, tensors))


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
def test_empty_and_without_bias(launchers: Launchers, shape: Shape, product: Product) -> None:
    for bias in (True, False):
        tensors = product.inputs(shape)
        product.check(tensors, product.run(launchers, shape, tensors, bias), bias)


@pytest.mark.parametrize("product", FORMATS, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0], ids=["nothing kept", "everything kept"])
def test_the_sparsest_and_the_densest(launchers: Launchers, product: Product, value: float) -> None:
    """A tile without values, and one that fills its shared memory. (The densest 2:4 weight keeps two of four.)"""
    shape = Shape(3, 192, 70)
    tensors = product.inputs(shape)
    if product.op == "nm_linear":
        weight = (nm_weight(70, 192, 2, 4, product.dtype) != 0).to(product.dtype) * value
        tensors["values"], tensors["metadata"], _ = reference.nm_compress(weight, 2, 4)
    else:
        weight = torch.full((70, 192), value, dtype=product.dtype)
        tensors["values"], tensors["bitmap"], tensors["offsets"] = reference.bitmap_pack(weight)
    tensors["weight"] = weight
    product.check(tensors, product.run(launchers, shape, tensors))


@pytest.mark.parametrize("product", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [BUSY, *MORE_TOKENS], ids=str)
def test_bitwise_the_same_in_every_schedule(
    emulator: Emulator, launchers: Launchers, shape: Shape, product: Product
) -> None:
    tensors = product.inputs(shape)
    first = product.run(launchers, shape, tensors)
    for schedule in SCHEDULES:
        with emulator.using(schedule):
            assert torch.equal(product.run(launchers, shape, tensors), first), schedule


@pytest.mark.parametrize("product", FORMATS, ids=str)
def test_nothing_before_the_start_is_touched(emulator: Emulator, launchers: Launchers, product: Product) -> None:
    emulator.at_end = False
    tensors = product.inputs(BUSY)
    product.check(tensors, product.run(launchers, BUSY, tensors))


# What must be noticed


def synchronisations() -> list[int]:
    """The source lines of every barrier and every wait."""
    lines = SOURCE.read_text().splitlines()
    return [i for i, line in enumerate(lines, 1) if re.search(r"__syncthreads\(\);|cp_async_wait<", line)]


@pytest.mark.parametrize("product", FORMATS, ids=str)
@pytest.mark.parametrize("line", synchronisations(), ids="line {}".format)
def test_every_missing_barrier_and_wait_is_noticed(
    emulator: Emulator, launchers: Launchers, line: int, product: Product
) -> None:
    tensors = product.inputs(BUSY)
    right = product.run(launchers, BUSY, tensors)
    for schedule in SCHEDULES:
        with emulator.using(schedule), emulator.without(line):
            try:
                wrong = product.run(launchers, BUSY, tensors)
            except RuntimeError:
                return
        if not torch.equal(right, wrong):
            return
    pytest.fail(f"{SOURCE.name}, line {line}: left out, and no schedule shows it")


@pytest.mark.parametrize("which", ["x", "values", "metadata", "bitmap", "offsets", "bias"])
@pytest.mark.parametrize("product", FORMATS, ids=str)
def test_reading_past_the_end_of_any_input_is_noticed(
    emulator: Emulator, launchers: Launchers, product: Product, which: str
) -> None:
    for shape in (Shape(5, 320, 64), Shape(5, 300, 64)):  # Asynchronous copies, and single elements.
        tensors = product.inputs(shape)
        if which not in tensors:
            continue
        kept = tensors[which][: -8 if which == "values" and product.op == "bitmap_linear" else -1]

        def short(tensor: Tensor, whole: Tensor = tensors[which], kept: Tensor = kept) -> Tensor:
            return emulator.copy(kept if tensor is whole else tensor)

        launchers.copy = short
        with pytest.raises(RuntimeError, match=r"out of bounds access: a buffer of \d+ bytes.*block .*thread"):
            product.run(launchers, shape, tensors)


@pytest.mark.parametrize("product", [product for product in PRODUCTS if product.op == "bitmap_linear"], ids=str)
@pytest.mark.parametrize("tokens", [1, 9])
def test_damaged_places_lead_nowhere(emulator: Emulator, launchers: Launchers, tokens: int, product: Product) -> None:
    """Wrong offsets and bits give wrong outputs, never a read outside values; those of other tiles are as they were."""
    outputs, inputs = DAMAGED_SHAPE
    shape = Shape(tokens, inputs, outputs)
    tensors = product.inputs(shape)
    tensors["values"], parts = damaged_bitmaps(tensors["weight"])
    right = product.run(launchers, shape, tensors)
    product.check(tensors, right)
    for at_end in (True, False):
        emulator.at_end = at_end
        for tensors["bitmap"], tensors["offsets"] in parts:
            y = product.run(launchers, shape, tensors)
            for rows in WHOLE_ROWS:
                assert torch.equal(y[:, rows], right[:, rows])


def test_invalid_arguments_are_refused(emulator: Emulator) -> None:
    x = emulator.empty(64, 64, dtype=torch.float32).data_ptr()
    for shape, tensor_cores, splits, dtype in (
        ((1, 64, 64), True, 1, 0),  # fp32 on tensor cores
        ((1, 64, 64), False, 2, 0),  # no room for two parts
        ((1, 64, 64), False, 0, 0),
        ((1, 66, 64), False, 1, 0),
        ((1, 64, 64), False, 1, 3),
    ):
        with pytest.raises(RuntimeError, match="invalid argument"):
            emulator.cuda.nm_linear(shape, tensor_cores, splits, dtype, x, x, x, 0, x, 0, 0)
    with pytest.raises(RuntimeError, match="invalid argument"):
        emulator.cuda.bitmap_linear((1, 64, 64), False, 1, 0, x, x + 4, 64, x, x, 0, x, 0, 0)


# The ops of pyprune.ops on these kernels


def dense_of(name: str, arguments: tuple[Tensor | int, ...]) -> Tensor:
    return getattr(reference, "nm_decompress" if name == "nm_linear" else "bitmap_unpack")(*arguments)


@pytest.mark.parametrize("tokens", [1, 5, 40, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["nm_linear", "bitmap_linear"])
def test_functional_api(emulator: Emulator, op: str, dtype: torch.dtype, tokens: int) -> None:
    """Every row of the default tables, and above: x [2, tokens / 2, in] where that divides."""
    shape = Shape(tokens, 200, 66)
    tensors = Product(op, dtype, False, 1).inputs(shape)
    packed = [tensor for name, tensor in tensors.items() if name not in ("x", "weight", "bias")]
    pattern = (2, 4) if op == "nm_linear" else (66, 200)
    x = tensors["x"].view(2, -1, 200) if tokens % 2 == 0 else tensors["x"]
    with ops.using(CudaKernels(emulator.cuda, stream=lambda device: 0)):
        y = getattr(ops, op)(x, *packed, *pattern, tensors["bias"])
    assert y.shape == (*x.shape[:-1], 66)
    Product(op, dtype, False, 1).check(tensors, y.view(tokens, 66))


def test_packing_through_the_functional_api(emulator: Emulator) -> None:
    weight = nm_weight(70, 136, 2, 4, torch.bfloat16, odd=True)
    with ops.using(CudaKernels(emulator.cuda, stream=lambda device: 0)):
        bits, flips = ops.nm_prune(weight.nan_to_num(), 2, 4, torch.zeros(70, 17, dtype=torch.uint8))
        nm = ops.nm_decompress(*ops.nm_compress(weight, 2, 4), 2, 4)
        bitmap = ops.bitmap_unpack(*ops.bitmap_pack(weight), 70, 136)
        with pytest.raises(ValueError, match=r"row 3, group 1 \(columns 4 to 7\) has more than 2 nonzeros"):
            ops.nm_compress(torch.ones(4, 8).tril(-1)[:, [3, 3, 3, 3, 0, 1, 2, 3]], 2, 4)
    assert flips == 70 * 68 and bits.shape == (70, 17)
    for result in (nm, bitmap):
        assert torch.equal(result.view(torch.int16), torch.where(weight == 0, 0, weight).view(torch.int16))


@pytest.mark.parametrize("tokens", [3, 2000])
@pytest.mark.parametrize("index", ["in", "out", "both"])
def test_gathered_linear(emulator: Emulator, tokens: int, index: str) -> None:
    """By spreading x and gathering y, and, for many tokens, by copying the weight."""
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(30, 40, generator=g), torch.randn(30, generator=g)
    columns = torch.randperm(40, generator=g)[:17].sort().values if index != "out" else None
    rows = torch.randperm(30, generator=g)[:11].sort().values if index != "in" else None
    x = torch.randn(tokens, 40 if columns is None else 17, generator=g)
    with ops.using(CudaKernels(emulator.cuda, stream=lambda device: 0)):
        y = ops.gathered_linear(x, weight, columns, rows, bias)
    with ops.using("reference"):
        expected = ops.gathered_linear(x.double(), weight.double(), columns, rows, bias.double())
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-4)  # 40 products of size 1 in fp32


def test_masked_linear(emulator: Emulator) -> None:
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(30, 41, generator=g), torch.randn(3, 41, generator=g)
    mask = torch.rand(30, 41, generator=g) < 0.5
    weight[~mask] = float("inf")
    bits = pack_bits(mask)
    with ops.using(CudaKernels(emulator.cuda, stream=lambda device: 0)):
        y = ops.masked_linear(x, weight, bits)
    torch.testing.assert_close(y.double(), x.double() @ weight.masked_fill(~mask, 0).double().T, rtol=0, atol=1e-4)


# The tables


def test_tables_are_well_formed() -> None:
    tables = json.loads(plans.TABLES.read_text())
    assert "default" in tables
    for kind, table in tables.items():
        assert set(table) == {"nm_linear", "bitmap_linear", "cutlass_tokens"}, kind
        assert table["cutlass_tokens"] is None or table["cutlass_tokens"] >= 1
        for op in (table["nm_linear"], table["bitmap_linear"]):
            assert set(op) == {"16-bit", "32-bit"}
            for size, rows in op.items():
                tokens = [most for most, _, _ in rows]
                assert tokens == sorted(set(tokens)) and tokens[0] >= 1
                assert all(kernel in ("tensor cores", "plain") and blocks >= 1 for _, kernel, blocks in rows)
                assert size == "16-bit" or all(kernel == "plain" for _, kernel, _ in rows)


def test_splits() -> None:
    """H100: 132 multiprocessors. 4096 outputs are 64 tiles; 8 parts make 512 blocks, 3.9 for each."""
    assert plans.splits(4, 132, Shape(1, 4096, 4096)) == plans.splits(4, 132, Shape(1, 14336, 4096)) == 8
    assert plans.splits(2, 132, Shape(1, 4096, 4096)) == 4
    assert plans.splits(4, 132, Shape(1, 512, 4096)) == 4, "a part has at least one stage"
    assert plans.splits(4, 132, Shape(1, 8192, 64)) == plans.MOST_SPLITS
    assert plans.splits(4, 132, Shape(1, 4096, 28672)) == 5, "448 tiles alone leave some with four and most with three"
    assert plans.splits(4, 132, Shape(32, 4096, 28672)) == 1, "the parts of 32 tokens cost more than that"
    assert plans.splits(4, 132, Shape(1, 0, 0)) == 1
