"""The launchers of csrc/nm.h, bitmap.h and sparse_gemm.h on tensors: inputs, calls, and the maths in fp64.

Used on the emulator and on a device (tests/gpu/test_device_sparse.py). Memory comes from hsm_checks.Launchers; outputs
start as 0xFF, a NaN in every type.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from hsm_checks import DTYPE_CODES, DTYPES, Launchers, roundoff
from torch import Tensor

from pyprune import reference

__all__ = ["DTYPES", "Launchers", "Product", "Shape", "reference"]

PATTERNS = ((2, 4), (1, 4), (4, 8), (2, 2), (3, 5), (1, 16), (16, 32), (7, 200))
"""n:m: the common ones, and every number of bits an index."""


def poisoned(launchers: Launchers, *shape: int, dtype: torch.dtype) -> Tensor:
    """Memory whose every byte is 0xFF."""
    tensor = launchers.empty(*shape, dtype=dtype)
    tensor.view(torch.uint8).fill_(255) if tensor.numel() else None
    return tensor


def addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


# ---------------------------------------------------------------------------------------------------------------------
# nm and bitmap: exact


def odd_weight(
    rows: int, columns: int, dtype: torch.dtype, sparsity: float, seed: int = 0, device: str = "cpu"
) -> Tensor:
    """Normal weights with zeros of both signs, infinities, NaN and the smallest denormal among them."""
    g = torch.Generator(device).manual_seed(seed)
    draw = {"generator": g, "device": device}
    weight = torch.randn(rows, columns, **draw).to(dtype)
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), tiny, -tiny], device=device).to(dtype)
    strange = torch.rand(weight.shape, **draw) < 0.1
    weight = torch.where(strange, odd[torch.randint(5, weight.shape, **draw)], weight)
    zeros = torch.tensor([0.0, -0.0], dtype=dtype, device=device)[torch.randint(2, weight.shape, **draw)]
    return torch.where(torch.rand(weight.shape, **draw) < sparsity, zeros, weight)


def nm_weight(
    rows: int,
    columns: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    odd: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Tensor:
    """At most n of every m are not zero; zeros of both signs and more of them than need be, if `odd`."""
    g = torch.Generator(device).manual_seed(seed)
    draw = {"generator": g, "device": device}
    shape = (rows, columns // m, m)
    kept = torch.zeros(shape, dtype=torch.bool, device=device)
    kept.scatter_(2, torch.rand(shape, **draw).argsort(2)[..., :n], True)
    if odd:
        weight = odd_weight(rows, columns, dtype, 0.3, seed, device)
    else:
        weight = torch.randn(rows, columns, **draw).to(dtype)
    zeros = torch.tensor([0.0, -0.0], dtype=dtype, device=device)
    zeros = zeros[torch.randint(2 if odd else 1, weight.shape, **draw)]
    return torch.where(kept.view(rows, columns), weight, zeros)


def nm_prune(
    launchers: Launchers, scores: Tensor, n: int, m: int, previous: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = scores.shape
    inputs = [launchers.copy(scores), None if previous is None else launchers.copy(previous)]
    bits = poisoned(launchers, rows, -(-columns // 8), dtype=torch.uint8)
    flips, first = launchers.copy(torch.zeros(1, dtype=torch.int64)), launchers.copy(torch.tensor([-1]))
    code = DTYPE_CODES[scores.dtype]
    tensors = addresses(*inputs, bits, flips, first)
    launchers.cuda.nm_prune((rows, columns, n, m), code, *tensors, launchers.stream())
    return bits.cpu().clone(), flips.cpu()[0].clone(), first.cpu()[0].clone()


def nm_compress(launchers: Launchers, weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = weight.shape
    values, metadata, _ = reference.nm_compress(weight, n, m)  # For their shapes.
    values = poisoned(launchers, *values.shape, dtype=weight.dtype)
    metadata = poisoned(launchers, *metadata.shape, dtype=torch.uint8)
    first = launchers.copy(torch.tensor([-1]))
    dense = launchers.copy(weight)  # lives until the launch
    tensors = addresses(dense, values, metadata, first)
    launchers.cuda.nm_compress((rows, columns, n, m), DTYPE_CODES[weight.dtype], *tensors, launchers.stream())
    return values.cpu().clone(), metadata.cpu().clone(), first.cpu()[0].clone()


def nm_decompress(
    launchers: Launchers, values: Tensor, metadata: Tensor, n: int, m: int, rows: int | None = None
) -> Tensor:
    rows, columns = len(values) if rows is None else rows, values.shape[1] // n * m
    weight = poisoned(launchers, rows, columns, dtype=values.dtype)
    inputs = launchers.copy(values), launchers.copy(metadata)
    tensors = addresses(*inputs, weight)
    launchers.cuda.nm_decompress((rows, columns, n, m), DTYPE_CODES[values.dtype], *tensors, launchers.stream())
    return weight.cpu().clone()


def bitmap_pack(launchers: Launchers, weight: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = len(weight) if rows is None else rows, weight.shape[1]
    tiles, code = -(-rows // 64) * -(-columns // 64), DTYPE_CODES[weight.dtype]
    dense = launchers.copy(weight)
    bitmap = poisoned(launchers, tiles, 64, 8, dtype=torch.uint8)
    sizes = poisoned(launchers, tiles + 1, dtype=torch.int64)
    if tiles == 0:
        sizes.zero_()
    launchers.cuda.bitmap_scan(rows, columns, code, *addresses(dense, bitmap, sizes), launchers.stream())
    offsets = launchers.copy(sizes.cumsum(0))
    values = poisoned(launchers, int(offsets[-1]), dtype=weight.dtype)
    launchers.cuda.bitmap_pack(rows, columns, code, *addresses(dense, bitmap, offsets, values), launchers.stream())
    return values.cpu().clone(), bitmap.cpu().clone(), offsets.cpu().clone()


def bitmap_unpack(
    launchers: Launchers, values: Tensor, bitmap: Tensor, offsets: Tensor, rows: int, columns: int
) -> Tensor:
    weight = poisoned(launchers, rows, columns, dtype=values.dtype)
    inputs = [launchers.copy(tensor) for tensor in (values, bitmap, offsets)]
    first, *others = addresses(*inputs, weight)
    code = DTYPE_CODES[values.dtype]
    launchers.cuda.bitmap_unpack(rows, columns, code, first, len(values), *others, launchers.stream())
    return weight.cpu().clone()


def bits_of(tensor: Tensor) -> Tensor:
    """Its elements as integers, for comparing NaNs."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_same(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for result, right in zip(results, expected, strict=True):
        assert result.dtype == right.dtype and torch.equal(bits_of(result), bits_of(right))


# ---------------------------------------------------------------------------------------------------------------------
# Bitmaps whose places do not fit


DAMAGED_SHAPE = (192, 320)
WHOLE_ROWS = (slice(0, 64), slice(128, 192))
"""Those of `damaged_bitmaps` that stay as they were: of the first and the last of three rows of tiles."""


def damaged_bitmaps(weight: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """values [DAMAGED_SHAPE], and bitmaps with offsets: the right ones, then some with wrong places."""
    values, bitmap, offsets = reference.bitmap_pack(weight)
    everything = bitmap.clone()
    everything[5:10] = 255
    parts = [(bitmap, offsets), (everything, offsets)]
    size, begin, end = len(values), int(offsets[7]), int(offsets[8])
    for damage in (
        (-8, 8),  # a tile that begins before the array,
        (-(1 << 62), end),
        (size - 8, size + 8),  # ends behind it,
        (1 << 40, (1 << 40) + 8),
        ((1 << 63) - 8, -(1 << 63)),
        (end, begin),  # ends before it begins,
        (begin + 3, end),  # is off the alignment,
        (0, size),  # or has more than a tile can
    ):
        elsewhere = offsets.clone()
        elsewhere[7:9] = torch.tensor(damage)
        parts.append((bitmap, elsewhere))
    return values, parts


# ---------------------------------------------------------------------------------------------------------------------
# Products


class Shape(NamedTuple):
    tokens: int
    inputs: int
    outputs: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


SHAPES = (
    Shape(1, 4, 1),  # One group of four: less than anything's unit.
    Shape(1, 128, 64),  # One stage, one block.
    Shape(4, 1032, 65),  # Nine stages, more than are in flight; a second block of one row.
    Shape(9, 300, 70),  # x and W without whole 16-byte pieces; half a byte of metadata at the end of a row.
    Shape(17, 64, 130),  # Half a stage; three tiles of tokens.
    Shape(70, 320, 64),  # Two blocks of tokens, the second of one tile.
)
EMPTY_SHAPES = (Shape(0, 64, 8), Shape(3, 64, 0), Shape(3, 0, 8))


class Product(NamedTuple):
    """One call: a packed weight in either format, and how it is multiplied."""

    op: str  # nm_linear or bitmap_linear
    dtype: torch.dtype
    tensor_cores: bool
    splits: int

    def __str__(self) -> str:
        kernel = "tensor cores" if self.tensor_cores else "plain"
        return f"{self.op}, {str(self.dtype).removeprefix('torch.')}, {kernel}, {self.splits} splits"

    def inputs(self, shape: Shape, seed: int = 0, device: str = "cpu") -> dict[str, Tensor]:
        """x, the dense weight, its packed parts, the bias."""
        g = torch.Generator(device).manual_seed(seed)
        draw = {"generator": g, "device": device}
        tokens, inputs, outputs = shape
        if self.op == "nm_linear":
            weight = nm_weight(outputs, inputs, 2, 4, self.dtype, seed=seed, device=device)
            values, metadata, _ = reference.nm_compress(weight, 2, 4)
            packed = {"values": values, "metadata": metadata}
        else:
            weight = torch.randn(outputs, inputs, **draw).to(self.dtype)
            dropped = torch.rand(weight.shape, **draw) < torch.rand(outputs, 1, **draw)  # Rows of any density.
            weight = weight.masked_fill(dropped, 0)
            packed = dict(zip(("values", "bitmap", "offsets"), reference.bitmap_pack(weight), strict=True))
        x = torch.randn(tokens, inputs, **draw).to(self.dtype)
        return {"x": x, "weight": weight, **packed, "bias": torch.randn(outputs, **draw).to(self.dtype)}

    def run(self, launchers: Launchers, shape: Shape, t: dict[str, Tensor], bias: bool = True) -> Tensor:
        tokens, _, outputs = shape
        operands = [launchers.copy(tensor) for name, tensor in t.items() if name not in ("weight", "bias")]
        inputs = addresses(*operands)
        if self.op == "bitmap_linear":
            inputs.insert(2, len(t["values"]))
        offset = launchers.copy(t["bias"]) if bias else None
        y = poisoned(launchers, tokens, outputs, dtype=self.dtype)
        partial = poisoned(launchers, self.splits, tokens, outputs, dtype=torch.float32)
        getattr(launchers.cuda, self.op)(
            shape,
            self.tensor_cores,
            self.splits,
            DTYPE_CODES[self.dtype],
            *inputs,
            *addresses(offset, y, partial if self.splits > 1 else None),
            launchers.stream(),
        )
        return y.cpu().clone()

    def check(self, t: dict[str, Tensor], result: Tensor, bias: bool = True) -> None:
        """The largest error is at most twice that of plain torch in the same dtype, plus one rounding of the result.

        (Of fp32, four roundings, more from 5,504 inputs on and eight at 11,008: a lane adds its eighth of the terms one
        after the other, whose error grows with them, where cuBLAS cuts the sum into more parts.) A plain result that
        happens to be exact would otherwise demand exactness.
        """
        names = ("x", "weight", "bias") if bias else ("x", "weight")
        exact = torch.nn.functional.linear(*(t[name].double() for name in names))
        plain = torch.nn.functional.linear(*(t[name] for name in names))
        assert result.shape == exact.shape
        assert not result.isnan().any(), f"{self}: NaN: wrong, or never written"
        if exact.numel() == 0:
            return
        roundings = max(4, t["x"].shape[1] / 1376) if self.dtype == torch.float32 else 1
        slack = roundoff(self.dtype) * exact.abs().max() * roundings
        error, allowed = (result.to(exact) - exact).abs().max(), 2 * (plain.double() - exact).abs().max() + slack
        assert error <= allowed, f"{self}: off by {error:.3e}, allowed {allowed:.3e}"


PRODUCTS = tuple(
    Product(op, dtype, tensor_cores, splits)
    for op in ("nm_linear", "bitmap_linear")
    for dtype in DTYPES
    for tensor_cores in (False, True)
    for splits in (1, 2)
    if not (tensor_cores and dtype == torch.float32)
)
