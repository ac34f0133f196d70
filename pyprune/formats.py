"""What a packed checkpoint holds, and whether a file can be one: read from its header, before any tensor is.

A checkpoint is a folder of a transformers model whose config.json has

    "quantization_config": {"quant_method": "pyprune", "version": 1, "layers": {NAME: LAYER, ...}}

with a LAYER for every packed linear: {"format": "nm", "n": 2, "m": 4, "shape": [out, in]} or {"format": "bitmap",
"shape": [out, in]}, and "slorb": {"block": 16, "trained": false} where a low-rank part stands beside it. In the
*.safetensors its tensors are NAME.values and NAME.metadata, or NAME.values, NAME.bitmap and NAME.offsets, as
docs/architecture.md says under "Packed weights"; NAME.bias, NAME.slorb.s and NAME.slorb.x are plain.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyprune._ops.bitmap import tiles_of
from pyprune._ops.nm import metadata_bytes
from pyprune.reference.bitmap import TILE

VERSION = 1
MAX_HEADER = 100_000_000
"""Bytes; safetensors' own limit."""

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
FLOATS = ("BF16", "F16", "F32", "F64")
"""What the values of a packed weight may be."""


class CheckpointError(ValueError):
    """A checkpoint that is damaged or of a kind we do not read; the message names the file and the tensor."""


# ---------------------------------------------------------------------------------------------------------------------
# Files


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: bytes `begin` to `end`, counted from the start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_headers(files: Iterable[str | os.PathLike[str]]) -> dict[str, Entry]:
    """The tensors of safetensors files, every one inside its file and of the size that its dtype and shape ask for.

    Raises:
        CheckpointError: truncated or overlong files, headers that are not JSON, unknown dtypes, wrong sizes, offsets
            past the end, a tensor in two files.
        OSError: a file cannot be read.
    """
    found: dict[str, Entry] = {}
    for file in map(Path, files):
        for name, entry in _read_header(file).items():
            if name in found:
                raise CheckpointError(f"{file}: tensor {name} is also in {found[name].file}")
            found[name] = entry
    return found


def _read_header(file: Path) -> dict[str, Entry]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
            raise CheckpointError(
                f"{file} is truncated or no safetensors file: it has {size} bytes, its header claims {length}"
            )
        text = stream.read(length)
    header = _parse(file, text)
    entries = {name: _entry(file, name, fields, 8 + length, size) for name, fields in header.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise CheckpointError(f"{file}: tensor {name} starts at byte {entry.begin}, the one before ends at {end}")
        end = entry.end
    if end != size:
        raise CheckpointError(f"{file} has {size} bytes, its tensors end at {end}; it was not written completely")
    return entries


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    """A header without its metadata: the fields of every tensor by name."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(fields := dict(pairs)) != len(pairs):
            raise ValueError("a name is there twice")
        return fields

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: its header is not JSON: {error}") from error
    if not isinstance(header, dict) or not text.startswith(b"{"):
        raise CheckpointError(f"{file}: its header is {type(header).__name__}, expected an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ of its header is {metadata!r}, expected texts by name")
    return header


def _entry(file: Path, name: str, fields: Any, start: int, size: int) -> Entry:
    """One tensor of a header; `start` is where the file's data begin."""

    def refuse(problem: str) -> CheckpointError:
        return CheckpointError(f"{file}: tensor {name} {problem}")

    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise refuse("has no dtype, shape and data_offsets in the header")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise refuse(f"has the unknown dtype {dtype!r}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise refuse(f"has shape {shape!r} at {offsets!r}, expected lists of whole numbers from 0")
    begin, end = start + offsets[0], start + offsets[1]
    if not begin <= end <= size:
        raise refuse(f"lies at bytes {begin} to {end}, the file has {size}")
    wanted = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != wanted:
        raise refuse(f"has {end - begin} bytes, {dtype} {shape} takes {wanted}")
    return Entry(file, dtype, tuple(shape), begin, end)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


# ---------------------------------------------------------------------------------------------------------------------
# Packed linears


@dataclass(frozen=True)
class Layer:
    """A packed linear as the config describes it.

    Attributes:
        shape: (out, in).
        pattern: (n, m), or None for a bitmap.
        slorb: (block, trained) of the low-rank part beside it, or None.
    """

    shape: tuple[int, int]
    pattern: tuple[int, int] | None = None
    slorb: tuple[int, bool] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in config.json."""
        fields: dict[str, Any] = {"format": "bitmap", "shape": list(self.shape)}
        if self.pattern is not None:
            fields |= {"format": "nm", "n": self.pattern[0], "m": self.pattern[1]}
        if self.slorb is not None:
            fields["slorb"] = {"block": self.slorb[0], "trained": self.slorb[1]}
        return fields

    @classmethod
    def from_dict(cls, name: str, fields: Any) -> Layer:
        """Reads what `to_dict` wrote.

        Raises:
            CheckpointError: anything else.
        """
        try:
            return cls(
                shape=_pair(*fields["shape"]),
                pattern=_pattern(fields),
                slorb=_slorb(fields["slorb"], *fields["shape"]) if "slorb" in fields else None,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f'config.json: layer {name} of quantization_config is {fields}, expected {{"format": "bitmap" or "nm" '
                f'(with "n" and "m"), "shape": [out, in]}}: {error}'
            ) from error

    def sizes(self) -> dict[str, tuple[tuple[str, ...], tuple[int | None, ...]]]:
        """Of each packed tensor the dtypes it may have and its shape, None where the zeros decide."""
        rows, columns = self.shape
        if self.pattern is None:
            tiles = tiles_of(rows, columns)
            return {
                "values": (FLOATS, (None,)),
                "bitmap": (("U8",), (tiles, TILE, TILE // 8)),
                "offsets": (("I64",), (tiles + 1,)),
            }
        n, m = self.pattern
        kept = columns // m * n
        return {"values": (FLOATS, (rows, kept)), "metadata": (("U8",), (rows, metadata_bytes(kept, m)))}


def _pair(rows: Any, columns: Any) -> tuple[int, int]:
    if not _are_counts([rows, columns]):
        raise ValueError("shape is not two whole numbers from 0")
    return rows, columns


def _pattern(fields: Mapping[str, Any]) -> tuple[int, int] | None:
    if fields["format"] == "bitmap":
        return None
    if fields["format"] != "nm":
        raise ValueError(f"the format {fields['format']!r} is unknown")
    n, m = fields["n"], fields["m"]
    if not _are_counts([n, m]) or not 1 <= n <= m <= 256 or fields["shape"][1] % m:
        raise ValueError("n and m do not fit each other or the shape")
    return n, m


def _slorb(fields: Mapping[str, Any], rows: int, columns: int) -> tuple[int, bool]:
    block, trained = fields["block"], fields["trained"]
    if type(block) is not int or block < 1 or columns % block or not isinstance(trained, bool):
        raise ValueError("slorb wants a block that divides the inputs, and trained true or false")
    return block, trained


def check_layer(name: str, layer: Layer, entries: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
    """Shapes of a packed linear's tensors, all of them present, aligned and as its `Layer` says.

    Raises:
        CheckpointError: a tensor is missing, or of another dtype or shape, or starts at an odd byte.
    """
    shapes = {}
    for part, (dtypes, shape) in layer.sizes().items():
        tensor = f"{name}.{part}"
        if tensor not in entries:
            files = sorted({str(entry.file) for entry in entries.values()})
            raise CheckpointError(f"{', '.join(files)}: tensor {tensor} is missing, which config.json lists as packed")
        entry = entries[tensor]
        fits = len(shape) == len(entry.shape) and all(
            want in (None, have) for want, have in zip(shape, entry.shape, strict=True)
        )
        if entry.dtype not in dtypes or not fits:
            wanted = [size if size is not None else "any" for size in shape]
            raise CheckpointError(
                f"{entry.file}: tensor {tensor} is {entry.dtype} {list(entry.shape)}, expected {' or '.join(dtypes)} "
                f"{wanted} for a weight {list(layer.shape)}"
            )
        if entry.begin % ITEM_BYTES[entry.dtype]:
            raise CheckpointError(
                f"{entry.file}: tensor {tensor} starts at byte {entry.begin}, no multiple of its {entry.dtype}'s size; "
                "write the file again with safetensors"
            )
        shapes[part] = entry.shape
    return shapes
