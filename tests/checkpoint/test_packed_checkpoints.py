"""Packed checkpoints: what is written loads in a fresh process, and computes what the dense model computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_models import gpt2, linears, llama, logits, matrix, zero
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import pyprune
from pyprune import checkpoint, models, packing, quantizer, removal
from pyprune.masked import MaskedLinear, MaskRule
from pyprune.modules import SparseLinear

CLOSE = {"rtol": 1e-5, "atol": 2e-5}  # sums in another order, logits of the order of 1
MODELS = {"bitmap": llama, "2:4": lambda: llama("2:4"), "conv1d": gpt2}


def load(folder: Path, **options: Any) -> nn.Module:
    """As a user does, with an error for any key that is missing or unexpected."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_round_trip(kind: str, tmp_path: Path) -> None:
    """Every weight comes back bit for bit, every linear is packed as its zeros allow, and the caller's model stays."""
    model = MODELS[kind]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = checkpoint.save(model, None, tmp_path / "packed")
    assert {layer.format for layer in report.layers} == {"2:4" if kind == "2:4" else "bitmap"}
    assert report.packed == len(linears(model)) == len(report.layers)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not hasattr(model.config, "quantization_config")

    loaded = load(tmp_path / "packed")
    assert type(loaded) is type(model)
    for name, module in linears(model).items():
        packed = loaded.get_submodule(name)
        assert isinstance(packed, SparseLinear)
        assert torch.equal(packed.matrix(), matrix(module) + 0.0), name
    torch.testing.assert_close(logits(loaded), logits(model), **CLOSE)
    packed_tensors = [
        tensor for linear in quantizer.packed_linears(loaded).values() for tensor in linear.packed().values()
    ]
    assert not any(tensor.requires_grad for tensor in packed_tensors)
    assert report.bytes == sum(tensor.nbytes for tensor in packed_tensors)


def test_bytes_on_disk_are_those_of_the_format(tmp_path: Path) -> None:
    model = llama("2:4", torch.bfloat16)
    checkpoint.save(model, None, tmp_path / "packed")
    model.save_pretrained(tmp_path / "dense")
    sizes = [
        sum(t.nbytes for t in load_file(tmp_path / name / "model.safetensors").values()) for name in ("dense", "packed")
    ]
    weights = sum(matrix(module).nbytes for module in linears(model).values())
    assert sizes[0] - sizes[1] == weights * 7 // 16


@pytest.mark.parametrize("first", ["import pyprune", "from transformers import AutoModelForCausalLM"])
def test_loads_in_a_fresh_process(first: str, tmp_path: Path) -> None:
    """Whichever of the two libraries is imported first; and `import pyprune` alone imports neither torch nor it."""
    model = llama(dtype=torch.bfloat16)
    checkpoint.save(model, None, tmp_path / "packed")
    torch.save(logits(load(tmp_path / "packed")), tmp_path / "logits.pt")
    code = f"""
{first}
import sys
import pyprune
assert "transformers" in sys.modules or "torch" not in sys.modules
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained("packed")
assert type(model.model.layers[0].mlp.up_proj) is pyprune.SparseLinear and model.dtype == torch.bfloat16
ids = torch.randint(3, 61, (2, 8), generator=torch.Generator().manual_seed(1))
assert torch.equal(model(ids).logits, torch.load("logits.pt"))
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_shards(tmp_path: Path) -> None:
    model = llama()
    checkpoint.save(model, None, tmp_path / "packed", max_shard_size="40KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 3
    torch.testing.assert_close(logits(load(tmp_path / "packed")), logits(model), **CLOSE)


def test_another_dtype_and_the_model_without_head(tmp_path: Path) -> None:
    model = llama()
    checkpoint.save(model, None, tmp_path / "packed")
    half = load(tmp_path / "packed", dtype=torch.bfloat16)
    assert half.get_submodule("model.layers.0.mlp.up_proj").values.dtype == torch.bfloat16
    # a packed product may round otherwise than torch's; neither is further from fp64 than twice the other
    exact = logits(llama(dtype=torch.bfloat16).double())
    dense = (logits(llama(dtype=torch.bfloat16)) - exact).abs().max()
    assert (logits(half) - exact).abs().max() <= 2 * dense
    trunk = AutoModel.from_pretrained(tmp_path / "packed")
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        expected = model.model(ids).last_hidden_state
        torch.testing.assert_close(trunk(ids).last_hidden_state, expected, **CLOSE)


def test_what_was_loaded_is_written_again(tmp_path: Path) -> None:
    """By transformers' own save_pretrained, after loading and after sparsify; the config lists what is packed then."""
    model = llama()
    checkpoint.save(model, None, tmp_path / "packed")
    loaded = load(tmp_path / "packed")
    loaded.set_submodule("model.layers.1.mlp.up_proj", quantizer.stock_linear(loaded.model.layers[1].mlp.up_proj))
    loaded.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert type(again.model.layers[1].mlp.up_proj) is nn.Linear
    assert len(again.config.quantization_config.layers) == len(linears(model)) - 1
    torch.testing.assert_close(logits(again), logits(model), **CLOSE)

    fresh = llama()
    pyprune.sparsify(fresh, measure=False)
    fresh.save_pretrained(tmp_path / "sparsified")
    torch.testing.assert_close(logits(load(tmp_path / "sparsified")), logits(model), **CLOSE)


@pytest.mark.parametrize("kind", MODELS)
def test_dense_again(kind: str, tmp_path: Path) -> None:
    """`save_dense` writes a checkpoint of which no trace of ours is left, equal to the model before packing."""
    model = MODELS[kind]()
    checkpoint.save(model, None, tmp_path / "packed")
    checkpoint.save_dense(load(tmp_path / "packed"), None, tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    written, expected = load_file(tmp_path / "dense" / "model.safetensors"), model.state_dict()
    assert written.keys() <= expected.keys()
    assert all(torch.equal(tensor, expected[name] + 0.0) for name, tensor in written.items())
    assert torch.equal(logits(load(tmp_path / "dense")), logits(model))


def test_what_is_too_dense_stays_dense(tmp_path: Path) -> None:
    mixed = zero(llama("0.05"), "0.6", only="mlp")
    report = checkpoint.save(mixed, None, tmp_path / "mixed")
    dense = [layer for layer in report.layers if layer.format == "dense"]
    assert {layer.name.split(".")[3] for layer in dense} == {"self_attn"} and len(dense) == 8
    assert all(layer.reason.startswith("too dense: packed it would take 9") for layer in dense)
    torch.testing.assert_close(logits(load(tmp_path / "mixed")), logits(mixed), **CLOSE)

    report = checkpoint.save(llama("0.0"), None, tmp_path / "none")
    assert report.packed == 0 and report.bytes == report.dense_bytes
    assert "quantization_config" not in json.loads((tmp_path / "none" / "config.json").read_text())


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_stays_dense(tied: bool, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=tied)
    with torch.no_grad():
        model.lm_head.weight[:, ::2] = 0
    report = checkpoint.save(model, None, tmp_path / "packed")
    assert not [layer for layer in report.layers if "lm_head" in layer.name]
    loaded = load(tmp_path / "packed")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    torch.testing.assert_close(logits(loaded), logits(model), **CLOSE)


@pytest.mark.parametrize("trained", [False, True])
def test_slorb_is_stored_beside_the_packed_weight(trained: bool, tmp_path: Path) -> None:
    model = llama("0.0")
    for name, linear in linears(model).items():
        masked = MaskedLinear(linear.weight, linear.bias, MaskRule(2, 4))
        masked.boost(8, trained)
        model.set_submodule(name, masked)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "slorb" in name:
                parameter += 0.05 * torch.randn_like(parameter)
    expected = logits(model)
    report = checkpoint.save(model, None, tmp_path / "packed")
    assert {layer.format for layer in report.layers} == {"2:4"}
    loaded = load(tmp_path / "packed")
    assert loaded.model.layers[0].mlp.up_proj.slorb.block == 8
    torch.testing.assert_close(logits(loaded), expected, **CLOSE)
    checkpoint.save_dense(loaded, None, tmp_path / "dense")
    torch.testing.assert_close(logits(load(tmp_path / "dense")), expected, **CLOSE)


def test_a_failure_leaves_no_folder_and_the_model_dense(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError(28, "No space left on device")

    model = llama()
    with pytest.raises(OSError, match=r"the disk filled while writing .*packed; nothing was left there"):
        checkpoint.save(model, Tokenizer(), tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []
    assert not quantizer.packed_linears(model) and not hasattr(model, "hf_quantizer")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="full exists and is not an empty folder"):
        checkpoint.save(model, None, tmp_path / "full")


def test_adapters_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    for save in (checkpoint.save, checkpoint.save_dense):
        with pytest.raises(ValueError, match="model has adapters; fold them"):
            save(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_masked_linears_are_not_written_as_dense_ones(tmp_path: Path) -> None:
    model = llama("0.0")
    for name, linear in linears(model).items():
        model.set_submodule(name, MaskedLinear(linear.weight, linear.bias, MaskRule(2, 4)))
    with pytest.raises(ValueError, match=r"q_proj is still trained under a mask; call AST.finalize\(model\) first"):
        checkpoint.save_dense(model, None, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_a_mask_that_drops_too_little_to_pack_is_refused(tmp_path: Path) -> None:
    """What stays dense would be written with the weights that its mask drops."""
    model = llama("0.0")
    rules = {"q_proj": MaskRule(7, 8), "up_proj": MaskRule(2, 4)}
    for name, linear in linears(model).items():
        if rule := rules.get(name.rpartition(".")[2]):
            model.set_submodule(name, MaskedLinear(linear.weight, linear.bias, rule))
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj is still trained under a mask; call AST.finalize"):
        checkpoint.save(model, None, tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []
    masked = [module for module in model.modules() if isinstance(module, MaskedLinear)]
    assert len(masked) == 4 and not quantizer.packed_linears(model)


@pytest.mark.parametrize("save", [checkpoint.save, checkpoint.save_dense])
def test_a_folder_that_is_taken_is_refused_before_any_work(
    save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    pyprune.sparsify(model, measure=False)
    (tmp_path / "file").touch()
    monkeypatch.setattr(checkpoint, "sparsify", lambda *args, **options: pytest.fail("it was packed"))
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        save(model, None, tmp_path)
    assert len(quantizer.packed_linears(model)) == 14  # and not unpacked


def test_lora_trains_on_a_loaded_model(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    checkpoint.save(llama(), None, tmp_path / "packed")
    model = get_peft_model(load(tmp_path / "packed"), LoraConfig(r=4, target_modules="all-linear"))
    ids = torch.arange(3, 35).view(2, 16)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# ----------------------------------------------------------------------------------------- blocks of different widths


@pytest.fixture
def uneven() -> nn.Module:
    """2:4 in the attention, a bitmap in the MLPs and a dense linear; the first block has half of the channels."""
    model = zero(zero(llama("0.0"), "2:4", only="self_attn"), "0.6", only="mlp")
    model.model.layers[1].mlp.up_proj.weight.data.fill_(1.0)
    removal.remove_groups(model, {"block0_heads": [1], "block0_channels": range(0, 136, 2)})
    return model


@pytest.mark.parametrize("shards", ["5GB", "40KB"])
def test_uneven_widths_are_opened_packed(shards: str, uneven: nn.Module, tmp_path: Path) -> None:
    expected = logits(uneven)
    report = checkpoint.save(uneven, None, tmp_path / "packed", max_shard_size=shards)
    assert report.packed == 13
    loaded = models.open_model(tmp_path / "packed").cpu()
    layers = {layer.name: layer.format for layer in report.layers if layer.format != "dense"}
    found = quantizer.packed_linears(loaded)
    assert {name: packing._format(linear.pattern) for name, linear in found.items()} == layers
    assert all(torch.equal(linear.matrix(), uneven.get_submodule(name).weight + 0.0) for name, linear in found.items())
    assert not any(tensor.requires_grad for linear in found.values() for tensor in linear.packed().values())
    torch.testing.assert_close(logits(loaded), expected, **CLOSE)
    # and on: written as it is, in another dtype, unpacked
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(models.open_model(tmp_path / "again").cpu()), logits(loaded))
    half = models.open_model(tmp_path / "packed", dtype="bfloat16").cpu()
    assert {linear.values.dtype for linear in quantizer.packed_linears(half).values()} == {torch.bfloat16}
    checkpoint.save_dense(loaded, None, tmp_path / "dense")
    assert torch.equal(logits(models.open_model(tmp_path / "dense").cpu()), expected)


def test_uneven_widths_with_damage_are_refused(uneven: nn.Module, tmp_path: Path) -> None:
    checkpoint.save(uneven, None, tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    sound, name = load_file(file), "model.layers.0.mlp.up_proj"
    offsets = sound[f"{name}.offsets"].clone()
    offsets[1] += 8
    for changed, message in (
        ({f"{name}.offsets": offsets}, f"model.safetensors: the packed tensors of {name} do not agree"),
        ({f"{name}.values": None}, f"tensor {name}.values is missing, which config.json lists as packed"),
        ({"model.norm.weight": None}, "1 tensors are missing, the first is model.norm.weight"),
        (
            {"model.extra": torch.ones(2)},
            "1 tensors are in the files that the model has no place for, the first is mod",
        ),
    ):
        save_file({key: tensor for key, tensor in (sound | changed).items() if tensor is not None}, file)
        with pytest.raises(models.ModelError, match=message):
            models.open_model(tmp_path / "packed")


# ------------------------------------------------------------------------------------------------- compressed-tensors


def write_bitmask(folder: Path, model: nn.Module, style: str, damage: str = "") -> None:
    """A checkpoint in compressed-tensors' format, packed by numpy as its library did."""
    model.config.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "sparsity_config": {"format": style, "ignore": ["lm_head"], "sparsity_structure": "2:4"},
    }
    model.config.save_pretrained(folder)
    del model.config.quantization_config
    state = {}
    packed = {f"{name}.weight" for name in linears(model)}
    for name, tensor in model.state_dict().items():
        prefix = name.removesuffix(".weight")
        if name not in packed:
            state[name] = tensor
            continue
        dense = tensor.numpy()
        mask = dense != 0
        values = dense[mask].reshape(len(dense), -1) if style == "sparse-24-bitmask" else dense[mask]
        state[f"{prefix}.compressed"] = torch.from_numpy(values[:-1] if damage in name and damage else values)
        state[f"{prefix}.bitmask"] = torch.from_numpy(np.packbits(mask, axis=-1, bitorder="little"))
        state[f"{prefix}.shape"] = torch.tensor(dense.shape).reshape(-1, 1)
        if style == "sparse-bitmask":
            state[f"{prefix}.row_offsets"] = torch.from_numpy(mask.sum(1).cumsum() - mask.sum(1))
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize("style", ["sparse-24-bitmask", "sparse-bitmask"])
def test_reads_bitmask_checkpoints(style: str, tmp_path: Path) -> None:
    model = llama("2:4" if "24" in style else "0.5")
    write_bitmask(tmp_path, model, style)
    loaded = models.open_model(tmp_path).cpu()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(loaded.config, "quantization_config")


def test_damaged_bitmask_checkpoints_are_refused(tmp_path: Path) -> None:
    write_bitmask(tmp_path, llama("2:4"), "sparse-24-bitmask", damage="layers.1.mlp.up_proj")
    with pytest.raises(models.ModelError, match=r"model.safetensors: tensor model.layers.1.mlp.up_proj.compressed has"):
        models.open_model(tmp_path)
