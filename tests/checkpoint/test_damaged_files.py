"""Damaged checkpoints: always an error that names the file and the tensor, never a read outside it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_models import llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pyprune import checkpoint, models
from pyprune.formats import CheckpointError, Layer, check_layer, read_headers
from pyprune.quantizer import SparseConfig

LINEAR = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with N:M and bitmap layers that is as it should be."""
    folder = tmp_path_factory.mktemp("sound") / "packed"
    from packed_models import zero

    checkpoint.save(zero(llama("2:4"), "0.6", only="mlp"), None, folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "damaged"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """A valid safetensors file with other tensors."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def rewrite_header(
    folder: Path, change: Callable[[dict[str, Any]], Any], data: Callable[[bytes], bytes] = bytes
) -> None:
    """The same data behind another header."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data(content[8 + length :]))


def reconfigure(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


def set_item(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda mapping: mapping.__setitem__(name, value)


TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "offsets past the end": (
        lambda state: state[f"{LINEAR}.offsets"][-1:].add_(8),
        "offsets gives tile 5 .* values, its bits ask for",
    ),
    "negative offsets": (lambda state: state[f"{LINEAR}.offsets"].neg_(), "offsets gives tile 0 -"),
    "huge offsets": (lambda state: state[f"{LINEAR}.offsets"].fill_(2**62), "offsets starts with 4611686018427387904"),
    "all bits set": (lambda state: state[f"{LINEAR}.bitmap"].fill_(255), "its bits ask for 4096"),
    "a bit outside": (
        lambda state: (state[f"{LINEAR}.bitmap"].__setitem__((1, 0, 7), 128), shift(state, 1)),
        "bitmap of tile 1 has a bit outside the weight",
    ),
    "short values": (
        lambda state: state.__setitem__(f"{LINEAR}.values", state[f"{LINEAR}.values"][:-8].clone()),
        "values has .* elements, offsets ends at",
    ),
    "indices that fall": (
        lambda state: state["model.layers.0.self_attn.q_proj.metadata"].__setitem__((2, 3), 0x41),
        "metadata of row 2, group 6 is .1, 0., expected 2 rising indices below 4",
    ),
}


def shift(state: dict[str, torch.Tensor], tile: int) -> None:
    """Makes room for 8 more values behind a tile, so that bits and offsets agree."""
    kept = int(sum(byte.item().bit_count() for byte in state[f"{LINEAR}.bitmap"][tile].flatten()))
    offsets, values = state[f"{LINEAR}.offsets"], state[f"{LINEAR}.values"]
    more = (kept + 7) // 8 * 8 - int(offsets[tile + 1] - offsets[tile])
    offsets[tile + 1 :] += more
    state[f"{LINEAR}.values"] = torch.cat([values, values.new_ones(more)])


@pytest.mark.parametrize("damage", TENSORS)
def test_contents_that_do_not_agree(damage: str, folder: Path) -> None:
    change, message = TENSORS[damage]
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: the packed tensors of model\S+ .*{message}"):
        load(folder)
    with pytest.raises(models.ModelError, match=r"it cannot be loaded: .*model\.safetensors"):
        models.open_model(folder)


SHAPES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda state: state.pop(f"{LINEAR}.offsets"), f"tensor {LINEAR}.offsets is missing"),
    "offsets of another dtype": (
        lambda state: state.__setitem__(f"{LINEAR}.offsets", state[f"{LINEAR}.offsets"].int()),
        rf"tensor {LINEAR}.offsets is I32 \[7\], expected I64 \[7\]",
    ),
    "values that are integers": (
        lambda state: state.__setitem__(f"{LINEAR}.values", state[f"{LINEAR}.values"].int()),
        f"tensor {LINEAR}.values is I32 .*, expected BF16 or F16 or F32 or F64 ..any",
    ),
    "a bitmap of another shape": (
        lambda state: state.__setitem__(f"{LINEAR}.bitmap", state[f"{LINEAR}.bitmap"][:-1].clone()),
        rf"tensor {LINEAR}.bitmap is U8 \[5, 64, 8\], expected U8 \[6, 64, 8\]",
    ),
}


@pytest.mark.parametrize("damage", SHAPES)
def test_wrong_tensors(damage: str, folder: Path) -> None:
    change, message = SHAPES[damage]
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=f"model.safetensors: {message}"):
        load(folder)


def test_truncated_and_overlong_files(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for end, message in [(-1, "lies at bytes"), (200, "is truncated or no safetensors file"), (4, "is truncated")]:
        file.write_bytes(content[:end])
        with pytest.raises(CheckpointError, match=rf"damaged/model\.safetensors.* {message}"):
            load(folder)
    file.write_bytes(content + b"\0" * 3)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has \d+ bytes, its tensors end at \d+"):
        load(folder)
    file.write_bytes((2**40).to_bytes(8, "little") + content[8:])
    with pytest.raises(CheckpointError, match="its header claims 1099511627776"):
        load(folder)


def test_misaligned_tensors(folder: Path) -> None:
    """A tensor that starts at an odd byte; safetensors' own reader takes such files."""

    def move(header: dict[str, Any]) -> None:
        header.pop("__metadata__", None)
        for entry in header.values():
            entry["data_offsets"] = [offset + 1 for offset in entry["data_offsets"]]
        header["pad"] = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}

    rewrite_header(folder, move, data=lambda data: b"\0" + data)
    length = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    if length % 2:  # then the data itself starts at an odd byte
        rewrite_header(folder, lambda header: header["pad"].__setitem__("dtype", "BOOL"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor model\S+ starts at byte \d+, no multiple"):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data_offsets": [0, 2**60]}, "lies at bytes"),
        ({"data_offsets": [8, 0]}, "lies at bytes"),
        ({"data_offsets": [-8, 0]}, "expected lists of whole numbers"),
        ({"data_offsets": [0, 8.0]}, "expected lists of whole numbers"),
        ({"shape": [2**40, 2**40]}, r"F32 \[1099511627776, 1099511627776\] takes"),
        ({"shape": "all"}, "expected lists of whole numbers"),
        ({"dtype": "F33"}, "unknown dtype 'F33'"),
        ({"dtype": 3}, "unknown dtype 3"),
    ],
    ids=str,
)
def test_headers_that_lie(fields: dict[str, Any], message: str, folder: Path) -> None:
    rewrite_header(folder, lambda header: header[f"{LINEAR}.values"].update(fields))
    with pytest.raises(CheckpointError, match=f"model.safetensors: tensor {LINEAR}.values .*{message}"):
        load(folder)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another version": (set_item("version", 7), "of version 7, this pyprune reads 1"),
    "no layers": (lambda config: config.pop("layers"), "layers of quantization_config is None"),
    "an unknown format": (
        lambda config: config["layers"][LINEAR].update(format="zip"),
        f"layer {LINEAR} .*'zip' is unknown",
    ),
    "a shape of one": (
        lambda config: config["layers"][LINEAR].update(shape=[8]),
        f"layer {LINEAR} of quantization_config",
    ),
    "a negative shape": (lambda config: config["layers"][LINEAR].update(shape=[-8, 8]), "two whole numbers"),
    "a shape that is not the model's": (
        lambda config: config["layers"][LINEAR].update(shape=[136, 71]),
        rf"lists {LINEAR} as packed of shape \[136, 71\], in the model it is \[136, 72\]|tensor {LINEAR}",
    ),
    "a pattern that does not fit": (
        lambda config: config["layers"][LINEAR].update(format="nm", n=5, m=4),
        "n and m do not fit",
    ),
    "a norm": (
        lambda config: config["layers"].__setitem__("model.norm", config["layers"].pop(LINEAR)),
        "model.norm",
    ),
    "a module that is not there": (
        lambda config: config["layers"].__setitem__("model.nothing", config["layers"].pop(LINEAR)),
        "model.nothing",
    ),
    "a broken slorb": (lambda config: config["layers"][LINEAR].update(slorb={"block": 0, "trained": 1}), "slorb wants"),
}


@pytest.mark.parametrize("damage", CONFIGS)
def test_configs_that_lie(damage: str, folder: Path) -> None:
    change, message = CONFIGS[damage]
    reconfigure(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


# ------------------------------------------------------------------------------------------------------------ fuzzing

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_refused_or_harmless(data: st.DataObject, sound: Path, tmp_path_factory: Any) -> None:
    """Bytes overwritten, cut off or inserted anywhere; a model that loads all the same computes without a crash."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copy(sound / "config.json", folder)
    content = bytearray((sound / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3), label="damages")):
        place = data.draw(st.integers(0, header) | st.integers(0, len(content) - 1), label="place")
        kind = data.draw(st.sampled_from(["overwrite", "cut", "insert"]), label="kind")
        piece = data.draw(st.binary(min_size=1, max_size=9), label="piece")
        if kind == "cut":
            del content[place : place + len(piece)]
        else:
            content[place : place + (len(piece) if kind == "overwrite" else 0)] = piece
    (folder / "model.safetensors").write_bytes(content)
    try:
        model = load(folder)
    except CheckpointError as error:
        assert str(folder / "model.safetensors") in str(error)
        return
    except RuntimeError as error:
        assert "mismatch" in str(error)  # a plain tensor of another shape, which transformers refuses
        return
    with torch.no_grad():
        model(torch.arange(3, 9)[None])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.integers(0), field=st.sampled_from(["dtype", "shape", "data_offsets", None]), value=JSON)
def test_any_header_is_refused_or_true(
    name: int, field: str | None, value: Any, sound: Path, tmp_path_factory: Any
) -> None:
    """What passes is inside the file and has the size that it claims."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copy(sound / "model.safetensors", folder)

    def change(header: dict[str, Any]) -> None:
        chosen = sorted(header)[name % len(header)]
        if field is None or not isinstance(header[chosen], dict):
            header[chosen] = value
        else:
            header[chosen][field] = value

    rewrite_header(folder, change)
    file = folder / "model.safetensors"
    config = json.loads((sound / "config.json").read_text())["quantization_config"]
    try:
        entries = read_headers([file])
        for layer, spec in SparseConfig.from_dict(config).layers.items():
            check_layer(layer, spec, entries)
    except CheckpointError as error:
        assert str(file) in str(error)
        assert re.search(r"tensor \S+ |header|its tensors end at", str(error)), error
        return
    size = file.stat().st_size
    assert all(0 < entry.begin <= entry.end <= size for entry in entries.values())


@settings(max_examples=200, deadline=None)
@given(fields=JSON | st.dictionaries(st.sampled_from(["format", "shape", "n", "m", "slorb"]), JSON | st.just("nm")))
def test_any_layer_of_a_config_is_refused_or_read_back(fields: Any) -> None:
    try:
        layer = Layer.from_dict("layer", fields)
    except CheckpointError as error:
        assert "config.json: layer layer of quantization_config" in str(error)
        return
    assert Layer.from_dict("layer", layer.to_dict()) == layer
