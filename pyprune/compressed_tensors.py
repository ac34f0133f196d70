"""Reads the sparse checkpoints of compressed-tensors, which writes and loads them no more itself."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pyprune.formats import CheckpointError, Entry, read_headers
from pyprune.reference.bits import unpack_bits

FORMATS = ("sparse-24-bitmask", "sparse-bitmask")


def is_bitmask(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is a checkpoint that `read` reads."""
    return _format(_config(Path(folder))) in FORMATS


def read(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The dense weights, zeros and all, of a checkpoint in the format sparse-24-bitmask or sparse-bitmask.

    Such a file has NAME.compressed (the values row by row), NAME.bitmask (one bit a weight) and NAME.shape.

    Raises:
        CheckpointError: another or a quantised format, damaged files, tensors that do not agree.
    """
    folder = Path(folder)
    fields = _config(folder)
    if (found := _format(fields)) not in FORMATS:
        raise CheckpointError(
            f"{folder}/config.json: its sparsity format is {found!r}, expected {' or '.join(FORMATS)}"
        )
    if fields["quantization_config"].get("config_groups"):
        raise CheckpointError(f"{folder}/config.json: its weights are quantised too; only plain sparse ones are read")
    return dict(_dense_tensors(read_headers(sorted(folder.glob("*.safetensors")))))


def _config(folder: Path) -> Mapping[str, Any]:
    file = folder / "config.json"
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    return fields if isinstance(fields, dict) else {}


def _format(config: Mapping[str, Any]) -> str | None:
    quantization = config.get("quantization_config")
    sparsity = quantization.get("sparsity_config") if isinstance(quantization, dict) else None
    return sparsity.get("format") if isinstance(sparsity, dict) else None


def _dense_tensors(entries: Mapping[str, Entry]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a bitmask checkpoint by the names that the model knows, read file by file."""
    for file in sorted({entry.file for entry in entries.values()}):
        with safe_open(file, framework="pt") as reader:
            for name in [name for name, entry in entries.items() if entry.file == file]:
                linear, _, part = name.rpartition(".")
                if f"{linear}.bitmask" not in entries:
                    yield name, reader.get_tensor(name)
                elif part == "compressed":
                    yield f"{linear}.weight", _from_bitmask(linear, entries)
                elif part == "bias":
                    yield name, reader.get_tensor(name)


def _from_bitmask(linear: str, entries: Mapping[str, Entry]) -> Tensor:
    parts = {}
    for part in ("compressed", "bitmask", "shape"):
        entry = entries.get(f"{linear}.{part}")
        if entry is None:
            raise CheckpointError(f"{entries[f'{linear}.bitmask'].file}: tensor {linear}.{part} is missing")
        with safe_open(entry.file, framework="pt") as reader:
            parts[part] = reader.get_tensor(f"{linear}.{part}")
    values, bitmask, shape = parts["compressed"].flatten(), parts["bitmask"], parts["shape"].flatten().long().tolist()
    file = entries[f"{linear}.bitmask"].file
    if len(shape) != 2 or bitmask.dtype != torch.uint8 or list(bitmask.shape) != [shape[0], -(-shape[1] // 8)]:
        raise CheckpointError(
            f"{file}: tensor {linear}.bitmask is {bitmask.dtype} {list(bitmask.shape)}, expected one bit a weight of "
            f"{linear}.shape = {shape}"
        )
    mask = unpack_bits(bitmask, shape[1])
    if not values.is_floating_point() or int(mask.sum()) != len(values):
        raise CheckpointError(
            f"{file}: tensor {linear}.compressed has {len(values)} values of {values.dtype}, its bitmask asks for "
            f"{int(mask.sum())} floating-point ones"
        )
    return values.new_zeros(shape).masked_scatter_(mask, values)
