"""The `bitmap` ops: packing and unpacking, bit for bit, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import DTYPES, ISAS, random_weight, same_bits, using_isa, without_negative_zero
from torch import Tensor

from pyprune import ops
from pyprune.reference.bits import INTEGERS, is_nonzero

SHAPES = [(1, 1), (31, 33), (64, 64), (63, 65), (65, 63), (128, 192), (130, 257), (5, 1000)]


@pytest.fixture(params=[*ISAS, "reference"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set this machine runs, and plain torch."""
    with ops.using("reference") if request.param == "reference" else using_isa(request.param):
        yield request.param


def definition(weight: Tensor) -> tuple[list[int], list[int], list[int]]:
    """Bits of the values, words of the bitmap and offsets as docs/architecture.md has them, an element at a time."""
    rows, columns = weight.shape
    kept, bits = is_nonzero(weight).tolist(), weight.view(INTEGERS[weight.element_size()]).tolist()
    values: list[int] = []
    words: list[int] = []
    offsets = [0]
    for top in range(0, rows, 64):
        for left in range(0, columns, 64):
            for i in range(top, top + 64):
                word = 0
                for j in range(left, left + 64):
                    if i < rows and j < columns and kept[i][j]:
                        word |= 1 << j - left
                        values.append(bits[i][j])
                words.append(word)
            values += [0] * (-len(values) % 8)
            offsets.append(len(values))
    return values, words, offsets


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_as_defined_and_back(shape: tuple[int, int], dtype: torch.dtype, implementation: str) -> None:
    for sparsity in (0.0, 0.5, 0.95):
        weight = random_weight(*shape, dtype, sparsity)
        values, bitmap, offsets = packed = ops.bitmap_pack(weight)
        words = [int.from_bytes(row, "little") for row in bitmap.flatten(0, 1).tolist()]
        integers = values.view(INTEGERS[values.element_size()]).tolist()
        assert (integers, words, offsets.tolist()) == definition(weight)
        ops.check_bitmap(*packed, *shape)
        assert same_bits(ops.bitmap_unpack(*packed, *shape), without_negative_zero(weight))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_weight_survives_the_round_trip(data: st.DataObject) -> None:
    shape = (data.draw(st.integers(0, 140), "rows"), data.draw(st.integers(0, 140), "columns"))
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    weight = random_weight(*shape, dtype, data.draw(st.floats(0, 1), "sparsity"), data.draw(st.integers(0, 99), "seed"))
    packed = ops.bitmap_pack(weight)
    ops.check_bitmap(*packed, *shape)
    assert same_bits(ops.bitmap_unpack(*packed, *shape), without_negative_zero(weight))


def test_sixteen_bits_of_every_kind_survive(implementation: str) -> None:
    """All 65,536 bit patterns of both 16-bit types."""
    for dtype in (torch.bfloat16, torch.float16):
        weight = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(128, 512)
        packed = ops.bitmap_pack(weight)
        assert int(offsets_end(packed)) == 65536  # the two zeros are made up for by the tiles' padding
        assert same_bits(ops.bitmap_unpack(*packed, 128, 512), without_negative_zero(weight))


def offsets_end(packed: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Where the last tile's values end."""
    return packed[2][-1]


def test_zeros_are_not_stored(implementation: str) -> None:
    """Empty rows, tiles and weights cost bits alone."""
    weight = torch.zeros(200, 100)
    weight[70] = -0.0
    weight[130, 99] = 1
    values, bitmap, offsets = ops.bitmap_pack(weight)
    assert values.tolist() == [1] + [0] * 7
    assert offsets.tolist() == [0, 0, 0, 0, 0, 0, 8, 8, 8]
    assert bitmap.count_nonzero().item() == 1
    for shape in ((0, 5), (5, 0), (0, 0)):
        packed = ops.bitmap_pack(torch.zeros(shape))
        assert [len(t) for t in packed] == [0, 0, 1]
        ops.check_bitmap(*packed, *shape)
        assert ops.bitmap_unpack(*packed, *shape).shape == shape


def test_check_bitmap_refuses_damaged_tensors() -> None:
    shape = (70, 100)
    values, bitmap, offsets = ops.bitmap_pack(random_weight(*shape, torch.bfloat16, 0.5))

    def refused(match: str, error: type[Exception] = ValueError, **changed: Tensor) -> None:
        tensors = {"values": values, "bitmap": bitmap, "offsets": offsets} | changed
        with pytest.raises(error, match=match):
            ops.check_bitmap(**tensors, out_features=70, in_features=100)

    refused("values has .* elements, offsets ends at", values=values[:-8])
    refused("a multiple of 8 long", values=values[:-1])
    refused(r"bitmap has shape \[3, 64, 8\], expected \[4, 64, 8\]", bitmap=bitmap[:3])
    refused(r"offsets is torch.int32, expected torch.int64", TypeError, offsets=offsets.int())
    for tile in range(4):
        spoiled = bitmap.clone()
        spoiled[tile, 5, 2] = 0xFF if spoiled[tile, 5, 2] != 0xFF else 0
        spoiled[tile, 3] = 0
        spoiled[tile, 2] = 0
        refused(f"offsets gives tile {tile} ", bitmap=spoiled)
    for place, value in ((2, 10**12), (1, -8), (3, 0)):
        spoiled = offsets.clone()
        spoiled[place] = value
        refused(f"offsets gives tile {place - 1} ", offsets=spoiled)
    refused("offsets starts with 8, expected 0", offsets=offsets + 8)

    spoiled = bitmap.clone()  # the same number of bits, one of them below the weight, or to its right
    row = spoiled[2, 1].clone()
    spoiled[2, 1], spoiled[2, 6] = 0, row
    refused(r"bitmap of tile 2 has a bit outside the weight \[70, 100\]", bitmap=spoiled)
    spoiled = bitmap.clone()
    spoiled[1, 1] = spoiled[1, 1].flip(0)
    refused("bitmap of tile 1 has a bit outside the weight", bitmap=spoiled)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_damage_is_refused_or_harmless(data: st.DataObject) -> None:
    """Whatever bytes change, the check refuses them, or unpacking reads inside the tensors."""
    shape = (data.draw(st.integers(1, 100), "rows"), data.draw(st.integers(1, 150), "columns"))
    packed = [t.clone() for t in ops.bitmap_pack(random_weight(*shape, torch.bfloat16, 0.6))]
    tensor = packed[data.draw(st.integers(1, 2), "tensor")].view(torch.uint8).flatten()
    place = data.draw(st.integers(0, len(tensor) - 1), "byte")
    tensor[place] = data.draw(st.integers(0, 255), "to")
    try:
        ops.check_bitmap(*packed, *shape)
    except ValueError:
        return
    with ops.using("reference"):
        expected = ops.bitmap_unpack(*packed, *shape)
    assert same_bits(ops.bitmap_unpack(*packed, *shape), expected)


def test_arguments_are_checked() -> None:
    packed = ops.bitmap_pack(torch.ones(4, 4))
    with pytest.raises(TypeError, match=r"weight is torch.int32"):
        ops.bitmap_pack(torch.ones(4, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"weight has shape \[4\], expected two dimensions"):
        ops.bitmap_pack(torch.ones(4))
    with pytest.raises(ValueError, match=r"bitmap has shape \[1, 64, 8\], expected \[2, 64, 8\]"):
        ops.bitmap_unpack(*packed, 4, 65)
    with pytest.raises(ValueError, match="out_features is -1"):
        ops.bitmap_unpack(*packed, -1, 4)
    with pytest.raises(ValueError, match="offsets is on meta"):
        ops.bitmap_unpack(packed[0], packed[1], packed[2].to("meta"), 4, 4)


def test_non_contiguous_and_any_number_of_threads(implementation: str) -> None:
    weight = random_weight(300, 130, torch.bfloat16, 0.5)
    expected = ops.bitmap_pack(weight)
    strided = torch.stack([weight, -weight], -1)[..., 0]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results = ops.bitmap_pack(strided)
        assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))
        assert same_bits(ops.bitmap_unpack(*results, 300, 130), without_negative_zero(weight))
    torch.set_num_threads(1)


def test_opcheck_and_compile() -> None:
    weight = random_weight(70, 65, torch.float32, 0.5).nan_to_num()
    packed = ops.bitmap_pack(weight)
    torch.library.opcheck(torch.ops.pyprune.bitmap_pack.default, (weight,))
    torch.library.opcheck(torch.ops.pyprune.bitmap_unpack.default, (*packed, 70, 65))
    compiled = torch.compile(
        lambda *packed: ops.bitmap_unpack(*packed, 70, 65) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*packed), ops.bitmap_unpack(*packed, 70, 65) * 2)
