"""The `nm` ops: masks, packing and unpacking, bit for bit, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import DTYPES, ISAS, needs_kernels, random_weight, same_bits, using_isa, without_negative_zero
from torch import Tensor

from pyprune import ops
from pyprune.reference.bits import is_nonzero, pack_bits, unpack_bits

PATTERNS = [(2, 4), (4, 8), (1, 2), (1, 4), (3, 4), (4, 4), (3, 12), (8, 16), (5, 33), (100, 256)]


@pytest.fixture(params=[*ISAS, "reference"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set this machine runs, and plain torch."""
    with ops.using("reference") if request.param == "reference" else using_isa(request.param):
        yield request.param


def pruned(rows: int, groups: int, n: int, m: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A weight with at most n nonzeros a group, fewer in many, and odd values."""
    weight = random_weight(rows, groups * m, dtype, 0.3, seed)
    order = torch.rand(rows, groups, m, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return torch.where((order < n).flatten(1), weight, -0.0)


def definition_of_prune(scores: Tensor, n: int, m: int) -> Tensor:
    """The mask by counting: fewer than n of an entry's group are larger, or equal and to its left."""
    group = scores.double().unflatten(1, (-1, m))
    mine, other = group[..., :, None], group[..., None, :]
    to_the_left = torch.ones(m, m, dtype=torch.bool).tril(-1)
    return (((other > mine) | ((other == mine) & to_the_left)).sum(-1) < n).flatten(1)


def definition_of_metadata(weight: Tensor, n: int, m: int) -> list[list[int]]:
    """The bytes of docs/architecture.md, an index at a time."""
    bits = 2 if m <= 4 else 4 if m <= 16 else 8
    rows = []
    for row in is_nonzero(weight).tolist():
        number = place = 0
        for first in range(0, len(row), m):
            group = row[first : first + m]
            kept = [j for j in range(m) if group[j]]
            spare = [j for j in range(m) if not group[j]]
            for j in sorted(kept + spare[: n - len(kept)]):
                number |= j << place
                place += bits
        rows.append(list(number.to_bytes(-(-place // 8), "little")))
    return rows


# -------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_prune_keeps_the_largest(n: int, m: int, dtype: torch.dtype, implementation: str) -> None:
    """Ties, both zeros, infinities and denormals among the scores; 1 group, some, and more than a block of 32."""
    for groups in (1, 7, 35):
        scores = random_weight(5, groups * m, dtype, 0.2).nan_to_num(nan=1.0)
        scores = torch.where(torch.rand(scores.shape) < 0.5, scores.float().round().to(dtype), scores)
        bits, flips = ops.nm_prune(scores, n, m)
        expected = definition_of_prune(scores, n, m)
        assert torch.equal(bits, pack_bits(expected))
        assert flips.item() == 0 and flips.dtype == torch.int64
        previous = pack_bits(torch.rand(scores.shape) < 0.5)
        again, flips = ops.nm_prune(scores, n, m, previous)
        assert torch.equal(again, bits)
        assert flips.item() == (unpack_bits(previous, groups * m) != expected).sum().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prune_names_the_first_nan(dtype: torch.dtype, implementation: str) -> None:
    scores = torch.zeros(9, 140, dtype=dtype)
    for row, column in ((7, 3), (6, 139), (6, 136)):
        scores[row, column] = float("nan")
    with pytest.raises(ValueError, match=r"nm_prune: row 6, group 34 \(columns 136 to 139\) has a score that is NaN"):
        ops.nm_prune(scores, 2, 4)


# ------------------------------------------------------------------------------------------------------------ packing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_packed_as_defined_and_back(n: int, m: int, dtype: torch.dtype, implementation: str) -> None:
    for groups in (0, 1, 15, 16, 17, 49):
        weight = pruned(6, groups, n, m, dtype, seed=groups)
        values, metadata = ops.nm_compress(weight, n, m)
        assert metadata.tolist() == definition_of_metadata(weight, n, m)
        ops.check_nm(values, metadata, n, m, (6, groups * m))
        assert same_bits(ops.nm_decompress(values, metadata, n, m), without_negative_zero(weight))
        with ops.using("reference"):
            assert same_bits(values, ops.nm_compress(weight, n, m)[0])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_weight_survives_the_round_trip(data: st.DataObject) -> None:
    """Any bits at all, at any pattern and size."""
    m = data.draw(st.integers(1, 20), "m")
    n = data.draw(st.integers(1, m), "n")
    rows, groups = data.draw(st.integers(0, 5), "rows"), data.draw(st.integers(0, 40), "groups")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    seed = data.draw(st.integers(0, 2**31), "seed")
    weight = pruned(rows, groups, n, m, dtype, seed)
    values, metadata = ops.nm_compress(weight, n, m)
    ops.check_nm(values, metadata, n, m, (rows, groups * m))
    assert same_bits(ops.nm_decompress(values, metadata, n, m), without_negative_zero(weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (5, 12)])
def test_compress_names_the_first_group_that_does_not_fit(
    n: int, m: int, dtype: torch.dtype, implementation: str
) -> None:
    weight = torch.zeros(40, 20 * m, dtype=dtype)
    for row, group in ((39, 0), (7, 19), (7, 18), (31, 3)):
        weight[row, group * m : group * m + n + 1] = torch.arange(1, n + 2)
    found = ", ".join(f"{i}" for i in [*range(1, n + 2), *[0] * (m - n - 1)])
    where = rf"row 7, group 18 \(columns {18 * m} to {19 * m - 1}\) has more than {n} nonzeros"
    with pytest.raises(ValueError, match=rf"nm_compress: {where} and is not {n}:{m}; prune it first: \[{found}\]"):
        ops.nm_compress(weight, n, m)


def test_sixteen_bits_of_every_kind_survive() -> None:
    """All 65,536 bit patterns of both 16-bit types, one in each 2:4 group."""
    for dtype in (torch.bfloat16, torch.float16):
        for isa in ISAS:
            with using_isa(isa):
                everything = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(64, 1024)
                weight = torch.stack([torch.full_like(everything, -0.0), everything] * 2, -1).flatten(1)
                back = ops.nm_decompress(*ops.nm_compress(weight, 2, 4), 2, 4)
                assert same_bits(back, without_negative_zero(weight))


# ---------------------------------------------------------------------------------------------------------- bad input


def test_check_nm_refuses_damaged_tensors() -> None:
    weight = pruned(3, 5, 2, 4, torch.bfloat16)
    values, metadata = ops.nm_compress(weight, 2, 4)
    ops.check_nm(values, metadata, 2, 4, (3, 20))
    damaged = metadata.clone()
    damaged[1, 0] = 0x05  # indices 1, 1
    with pytest.raises(ValueError, match=r"metadata of row 1, group 0 is \[1, 1\], expected 2 rising indices below 4"):
        ops.check_nm(values, damaged, 2, 4)
    damaged = metadata.clone()
    damaged[2, 2] |= 0x40  # the nibble past the fifth group
    with pytest.raises(ValueError, match="metadata of row 2 has bits set past its last index"):
        ops.check_nm(values, damaged, 2, 4)
    with pytest.raises(ValueError, match=r"the packed weight is \[3, 20\], expected \[3, 24\]"):
        ops.check_nm(values, metadata, 2, 4, (3, 24))
    with pytest.raises(ValueError, match=r"metadata has shape \[3, 2\], expected \[3, 3\]"):
        ops.check_nm(values, metadata[:, :2], 2, 4)
    with pytest.raises(TypeError, match=r"metadata is torch.int8, expected torch.uint8"):
        ops.check_nm(values, metadata.to(torch.int8), 2, 4)
    values, metadata = ops.nm_compress(pruned(2, 3, 2, 5, torch.bfloat16), 2, 5)
    metadata[0, 1] = 0x90  # index 9 of 5
    with pytest.raises(ValueError, match=r"row 0, group 1 is .*expected 2 rising indices below 5"):
        ops.check_nm(values, metadata, 2, 5)


def test_arguments_are_checked() -> None:
    weight = torch.zeros(4, 12)
    with pytest.raises(ValueError, match="the pattern is 5:4"):
        ops.nm_prune(weight, 5, 4)
    with pytest.raises(ValueError, match="scores has 12 columns, expected a multiple of m = 8"):
        ops.nm_prune(weight, 4, 8)
    with pytest.raises(TypeError, match=r"weight is torch.int64"):
        ops.nm_compress(weight.long(), 2, 4)
    with pytest.raises(ValueError, match=r"previous_bits has shape \[4, 1\], expected \[4, 2\]"):
        ops.nm_prune(weight, 2, 4, torch.zeros(4, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="values has 3 columns, expected a multiple of n = 2"):
        ops.nm_decompress(weight[:, :3], torch.zeros(4, 1, dtype=torch.uint8), 2, 4)
    with pytest.raises(ValueError, match="metadata is on meta"):
        ops.nm_decompress(weight, torch.zeros(4, 3, dtype=torch.uint8, device="meta"), 2, 4)


# -------------------------------------------------------------------------------------------------------- torch's side


@needs_kernels
def test_non_contiguous_and_any_number_of_threads(implementation: str) -> None:
    weight = pruned(67, 31, 2, 4, torch.bfloat16)
    expected = ops.nm_compress(weight, 2, 4)
    strided = torch.stack([weight, -weight], -1)[..., 0]
    scores = weight.float().nan_to_num()
    bits, _ = ops.nm_prune(scores, 2, 4)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results = ops.nm_compress(strided, 2, 4)
        assert same_bits(results[0], expected[0]) and torch.equal(results[1], expected[1])
        assert ops.nm_prune(scores, 2, 4, bits ^ pack_bits(torch.ones(67, 124, dtype=torch.bool)))[1] == 67 * 124
    torch.set_num_threads(1)


def test_opcheck_and_compile() -> None:
    weight = pruned(6, 8, 2, 4, torch.float32).nan_to_num()
    packed = ops.nm_compress(weight, 2, 4)
    previous = pack_bits(weight != 0)
    torch.library.opcheck(torch.ops.pyprune.nm_prune.default, (weight, 2, 4, previous))
    torch.library.opcheck(torch.ops.pyprune.nm_compress.default, (weight, 2, 4))
    torch.library.opcheck(torch.ops.pyprune.nm_decompress.default, (*packed, 2, 4))

    def step(weight: Tensor) -> tuple[Tensor, Tensor]:
        bits, flips = ops.nm_prune(weight.abs(), 2, 4, previous)
        return bits, ops.nm_decompress(*ops.nm_compress(weight, 2, 4), 2, 4) + flips

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(weight), step(weight), strict=True))


def test_bits_past_the_last_column_are_zero(implementation: str) -> None:
    """in = 4 leaves half a byte."""
    bits, flips = ops.nm_prune(torch.tensor([[1.0, 2, 3, 4]]), 2, 4, torch.tensor([[0b0011]], dtype=torch.uint8))
    assert bits.tolist() == [[0b1100]] and flips.item() == 4
