"""Packed checkpoints: writing them, and going back to dense ones.

Loading ours needs nothing from here: `AutoModelForCausalLM.from_pretrained(folder)` after `import pyprune`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from pyprune.masked import MaskedLinear
from pyprune.packing import Report, refuse_adapters, sparsify
from pyprune.quantizer import packed_linears
from pyprune.surgery import new_folder, strip_quantization


def save(
    model: nn.Module, tokenizer: Any, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB"
) -> Report:
    """Writes a packed checkpoint of a model whose weights have zeros; `folder` is then complete, or untouched.

    Linears whose zeros fit N:M are packed so, others as bitmaps; one that is too dense to be smaller packed stays
    dense, and the report says so. The model itself is left as it was. SLoRB's parts of `MaskedLinear`s are stored
    beside them; a mask that leaves too much to be packed cannot be written, as in `save_dense`. What is packed depends
    on the zeros alone, not on the machine.

    Args:
        model: a transformers model, without adapters; dense with zeros, or packed already.
        tokenizer: anything with `save_pretrained`, or None.
        folder: must not exist, or be empty.
        max_shard_size: of one *.safetensors file, as of `save_pretrained`.

    Returns:
        What became of every linear; print it.

    Raises:
        ValueError: the model has adapters, or a linear that would stay dense and is still trained under a mask.
        FileExistsError: `folder` is a file or not empty.
        OSError: it could not be written.
    """
    with new_folder(folder) as partial, _packed(model) as report:
        _write(model, tokenizer, partial, max_shard_size)
    return report


def save_dense(
    model: nn.Module, tokenizer: Any, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB"
) -> None:
    """Writes a stock checkpoint, zeros and all, that every tool loads; a packed model is unpacked, in place.

    Arguments and errors as of `save`; also, ValueError for a model that AST still trains. SLoRB's parts are added into
    the weights.
    """
    refuse_adapters(model)
    _refuse_masked(model)
    with new_folder(folder) as partial:
        if packed_linears(model):
            model.dequantize()  # type: ignore[operator]
        strip_quantization(model)
        _write(model, tokenizer, partial, max_shard_size)


def _refuse_masked(model: nn.Module) -> None:
    """Raises ValueError for a linear that would be written with what its mask drops."""
    if masked := [name for name, module in model.named_modules() if isinstance(module, MaskedLinear)]:
        raise ValueError(f"model: {masked[0]} is still trained under a mask; call AST.finalize(model) first")


@contextmanager
def _packed(model: nn.Module) -> Iterator[Report]:
    """The model with its linears packed, and dense again afterwards."""
    dense = dict(model.named_modules(remove_duplicate=False))
    before = set(packed_linears(model))
    try:
        report = sparsify(model, measure=False)
        _refuse_masked(model)
        yield report
    finally:
        for name in packed_linears(model).keys() - before:
            model.set_submodule(name, dense[name])
        if not before:
            strip_quantization(model)


def _write(model: Any, tokenizer: Any, folder: Path, max_shard_size: int | str) -> None:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
