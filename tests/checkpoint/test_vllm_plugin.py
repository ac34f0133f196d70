"""The vLLM plugin against stand-ins for vLLM's interfaces, as its published sources have them.

The stand-ins hold what the plugin meets: the registry, `QuantizationConfig`, and linears that create their weights by
the quantisation method, fuse (q, k, v), (gate, up), and share rows or columns among processes.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from packed_models import linears, llama, matrix, zero
from torch import Tensor, nn
from torch.nn.functional import linear

from pyprune import quantizer
from pyprune.formats import CheckpointError
from pyprune.packing import sparsify

MAPPING = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SHARDS = {"qkv_proj": ["q", "k", "v"], "gate_up_proj": [0, 1]}
ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.1.mlp"


class QuantizeMethodBase:
    """vllm.model_executor.layers.quantization.base_config"""


class QuantizationConfig:
    """vllm.model_executor.layers.quantization.base_config"""

    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class UnquantizedLinearMethod(QuantizeMethodBase):
    """vllm.model_executor.layers.linear"""


class LinearBase(nn.Module):
    """vllm.model_executor.layers.linear: its calls of the quantisation method, and what the plugin reads of it."""

    def __init__(self, config: Any, prefix: str, columns: int, rows: list[int], rank: int = 0, ranks: int = 1) -> None:
        super().__init__()
        self.tp_rank, self.tp_size, self.prefix = rank, ranks, prefix
        self.quant_method = config.get_quant_method(self, prefix=prefix)
        if not isinstance(self.quant_method, UnquantizedLinearMethod):
            self.quant_method.create_weights(
                layer=self,
                input_size_per_partition=columns,
                output_partition_sizes=rows,
                input_size=columns,
                output_size=sum(rows),
                params_dtype=torch.float32,
                weight_loader=None,
            )

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.quant_method.apply(self, x, bias)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """pyprune.vllm_plugin, imported beside the stand-ins."""
    registered: dict[str, type] = {}

    def register_quantization_config(name: str) -> Any:
        def wrapper(cls: type) -> type:
            assert name not in registered and issubclass(cls, QuantizationConfig)
            registered[name] = cls
            methods.append(name)
            return cls

        return wrapper

    methods: list[str] = ["awq"]
    root = "vllm.model_executor.layers"
    contents: dict[str, dict[str, Any]] = {
        **{name: {} for name in ("vllm", "vllm.model_executor", root)},
        f"{root}.linear": {"LinearBase": LinearBase, "UnquantizedLinearMethod": UnquantizedLinearMethod},
        f"{root}.quantization": {
            "QUANTIZATION_METHODS": methods,
            "register_quantization_config": register_quantization_config,
            "registered": registered,
        },
        f"{root}.quantization.base_config": {
            "QuantizationConfig": QuantizationConfig,
            "QuantizeMethodBase": QuantizeMethodBase,
        },
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        module.__dict__.update(attributes, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module("pyprune.vllm_plugin")
    sys.modules.pop("pyprune.vllm_plugin")


def packed_model() -> tuple[nn.Module, nn.Module]:
    """A dense model with zeros (2:4 in attention, 60 % in the MLP, up_proj of block 1 dense), and it packed."""
    model = zero(zero(llama("0.0"), "2:4", only="self_attn"), "0.6", only="mlp")
    with torch.no_grad():
        model.get_submodule(f"{MLP}.up_proj").weight.normal_()
    packed = llama("0.0")
    packed.load_state_dict(model.state_dict())
    sparsify(packed, measure=False)
    return model, packed


def configure(plugin: ModuleType, packed: Any) -> Any:
    config = plugin.PackedConfig.from_config(packed.config.quantization_config.to_dict())
    config.packed_modules_mapping = MAPPING
    return config


def fill(layer: LinearBase, packed: nn.Module) -> None:
    """Hands a layer its tensors as vLLM's `load_weights` of a decoder does: by fused name and shard."""
    state = {name: tensor for name, tensor in packed.state_dict().items() if not name.endswith("bias")}
    parent, _, fused = layer.prefix.rpartition(".")
    parameters = dict(layer.named_parameters())
    names = MAPPING.get(fused, [fused])
    for name, shard in zip(names, SHARDS.get(fused, [None]), strict=True):
        for key in [key for key in state if key.startswith(f"{parent}.{name}.")]:
            parameter = parameters[key.rpartition(".")[2]]
            arguments = () if shard is None else (shard,)
            parameter.weight_loader(parameter, state[key], *arguments)
    layer.quant_method.process_weights_after_loading(layer)


def dense(model: nn.Module, *names: str) -> list[Tensor]:
    return [matrix(linears(model)[name]) for name in names]


def test_entry_point_registers_once(plugin: ModuleType) -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.entry-points."vllm.general_plugins"]\npyprune = "pyprune.vllm_plugin:register"\n' in project
    for _ in range(2):
        plugin.register()
    registry = sys.modules["vllm.model_executor.layers.quantization"]
    assert registry.registered == {"pyprune": plugin.PackedConfig}


def test_methods_by_layer(plugin: ModuleType) -> None:
    _, packed = packed_model()
    config = configure(plugin, packed)
    assert isinstance(
        LinearBase(config, f"{ATTENTION}.qkv_proj", 72, [72, 36, 36]).quant_method, plugin.PackedLinearMethod
    )
    assert isinstance(LinearBase(config, "model.visual.fc", 72, [72]).quant_method, UnquantizedLinearMethod)
    assert config.get_quant_method(nn.Embedding(3, 4), "model.embed_tokens") is None
    config.apply_vllm_mapper(SimpleNamespace(apply_dict=lambda d: {f"language_{name}": v for name, v in d.items()}))
    renamed = config.get_quant_method(LinearBase(config, "x", 1, [1]), f"language_{MLP}.down_proj")
    assert isinstance(renamed, plugin.PackedLinearMethod)
    assert (config.get_name(), torch.bfloat16 in config.get_supported_act_dtypes()) == ("pyprune", True)


def test_fused_layers_compute_what_the_dense_ones_do(plugin: ModuleType) -> None:
    model, packed = packed_model()
    config = configure(plugin, packed)
    x, bias = torch.randn(5, 72), torch.randn(144)
    qkv = LinearBase(config, f"{ATTENTION}.qkv_proj", 72, [72, 36, 36])
    fill(qkv, packed)
    assert qkv.packed.pattern == (2, 4)
    weight = torch.cat(dense(model, *(f"{ATTENTION}.{name}_proj" for name in "qkv")))
    assert torch.equal(qkv.packed.matrix(), weight + 0.0)
    torch.testing.assert_close(qkv(x, bias), linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(qkv(x), linear(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [0, 1], ids=["both packed", "one of them dense"])
def test_gate_and_up(plugin: ModuleType, block: int) -> None:
    """A fused weight whose parts are packed differently becomes one bitmap."""
    model, packed = packed_model()
    prefix = f"model.layers.{block}.mlp"
    layer = LinearBase(configure(plugin, packed), f"{prefix}.gate_up_proj", 72, [136, 136])
    fill(layer, packed)
    weight = torch.cat(dense(model, f"{prefix}.gate_proj", f"{prefix}.up_proj"))
    assert torch.equal(layer.packed.matrix(), weight + 0.0) and layer.packed.pattern is None
    assert not {"values", "bitmap", "weight"} & set(dict(layer.named_parameters()))


@pytest.mark.parametrize("ranks", [2, 4])
def test_shares_of_several_processes(plugin: ModuleType, ranks: int) -> None:
    """Rows of q, k, v (2 key/value heads of 18, shared when there are 4 processes) and columns of o and down."""
    model, packed = packed_model()
    config = configure(plugin, packed)
    q, k, v = dense(model, *(f"{ATTENTION}.{name}_proj" for name in "qkv"))
    (down,) = dense(model, f"{MLP}.down_proj")
    for rank in range(ranks):
        heads = 72 // ranks
        layer = LinearBase(config, f"{ATTENTION}.qkv_proj", 72, [heads, 18, 18], rank, ranks)
        fill(layer, packed)
        kv = rank // (ranks // 2)
        share = torch.cat(
            [q[rank * heads : (rank + 1) * heads], k[kv * 18 : (kv + 1) * 18], v[kv * 18 : (kv + 1) * 18]]
        )
        assert torch.equal(layer.packed.matrix(), share + 0.0)
        columns = 136 // ranks
        layer = LinearBase(config, f"{MLP}.down_proj", columns, [72], rank, ranks)
        fill(layer, packed)
        assert torch.equal(layer.packed.matrix(), down[:, rank * columns : (rank + 1) * columns] + 0.0)


def test_a_layer_that_is_not_sparse_enough_is_dense(plugin: ModuleType) -> None:
    _, packed = packed_model()
    layer = LinearBase(configure(plugin, packed), f"{MLP}.gate_up_proj", 72, [136, 136])
    state = packed.state_dict()
    with torch.no_grad():
        thin = zero(nn.Sequential(nn.Linear(72, 136, bias=False)), "0.1")[0].weight.detach()
    for shard, tensors in enumerate([{"weight": thin}, {"weight": state[f"{MLP}.up_proj.weight"]}]):
        for part, tensor in tensors.items():
            getattr(layer, part).weight_loader(getattr(layer, part), tensor, shard)
    layer.quant_method.layers = [None, None]
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(layer.weight, torch.cat([thin, state[f"{MLP}.up_proj.weight"]]))
    x = torch.randn(3, 72)
    torch.testing.assert_close(layer(x), linear(x, layer.weight))


def test_damaged_and_missing_tensors_are_named(plugin: ModuleType) -> None:
    _, packed = packed_model()
    config = configure(plugin, packed)
    with torch.no_grad():
        packed.get_submodule(f"{MLP}.down_proj").offsets[1] += 8
    with pytest.raises(CheckpointError, match=f"the packed tensors of {MLP}.down_proj do not agree: .*tile 0"):
        fill(LinearBase(config, f"{MLP}.down_proj", 136, [72]), packed)
    layer = LinearBase(config, f"{ATTENTION}.o_proj", 72, [72])
    layer.values.weight_loader(layer.values, packed.get_submodule(f"{ATTENTION}.o_proj").values)
    with pytest.raises(CheckpointError, match=f"{ATTENTION}.o_proj: metadata missing in the checkpoint"):
        layer.quant_method.process_weights_after_loading(layer)
    with pytest.raises(CheckpointError, match=f"{ATTENTION}.qkv_proj: 0 of its 3 weights are in the checkpoint"):
        layer = LinearBase(config, f"{ATTENTION}.qkv_proj", 72, [72, 36, 36])
        layer.quant_method.process_weights_after_loading(layer)


def test_slorb_is_refused(plugin: ModuleType) -> None:
    layers = {MLP: {"format": "bitmap", "shape": [8, 16], "slorb": {"block": 8, "trained": False}}}
    with pytest.raises(CheckpointError, match="1 linears have a SLoRB part"):
        plugin.PackedConfig.from_config({"quant_method": quantizer.METHOD, "version": 1, "layers": layers})
