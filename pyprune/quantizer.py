"""What transformers calls to load and save packed models: `AutoModelForCausalLM.from_pretrained` of such a folder.

Importing this module registers `quant_method: "pyprune"` with transformers' own registry. `import pyprune` sees to it
(`pyprune._registration`), without importing transformers where it is not used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pyprune.formats import VERSION, CheckpointError, Layer, check_layer, read_headers
from pyprune.modules import SparseLinear

METHOD = "pyprune"


@register_quantization_config(METHOD)
class SparseConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint: which linears are packed, and how (`pyprune.formats`)."""

    def __init__(self, layers: Any = None, version: int = VERSION, **unknown: Any) -> None:
        if version != VERSION:
            raise CheckpointError(
                f"config.json: quantization_config is of version {version!r}, this pyprune reads {VERSION}; update it"
            )
        if not isinstance(layers, dict):
            raise CheckpointError(f"config.json: layers of quantization_config is {layers!r}, expected an object")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.layers = {name: Layer.from_dict(name, fields) for name, fields in layers.items()}

    def to_dict(self) -> dict[str, Any]:
        """As it stands in config.json."""
        layers = {name: layer.to_dict() for name, layer in self.layers.items()}
        return {"quant_method": METHOD, "version": VERSION, "layers": layers}

    @classmethod
    def of(cls, model: nn.Module) -> SparseConfig:
        """What the packed linears of a model are."""
        config = cls({})
        config.layers = {name: _layer(module) for name, module in packed_linears(model).items()}
        return config


@register_quantizer(METHOD)
class SparseQuantizer(HfQuantizer):
    """Puts packed linears into a model before its weights are read, and looks into what was read."""

    requires_calibration = True  # transformers' word for: reads what is packed, packs nothing itself
    quantization_config: SparseConfig

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        self._entries = read_headers(checkpoint_files or ())
        for name, layer in self.quantization_config.layers.items():
            own = _own_name(model, name)
            shapes = check_layer(name, layer, self._entries)
            model.set_submodule(own, _empty(name, layer, model.get_submodule(own), shapes))
            _leave_alone(model.get_submodule(own.rpartition(".")[0]))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name in self.quantization_config.layers:
            linear = model.get_submodule(_own_name(model, name))
            if any(tensor.is_meta for tensor in linear.packed().values()):
                raise ValueError(f"{name} is packed and cannot be offloaded; pass a device_map without offloading")
            for tensor in linear.packed().values():
                tensor.requires_grad_(False)  # transformers makes a Parameter of every tensor that it reads
            try:
                linear.check()
            except (TypeError, ValueError) as error:
                file = self._entries[f"{name}.values"].file
                raise CheckpointError(f"{file}: the packed tensors of {name} do not agree: {error}") from error
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Before a model is written: its config lists the linears that are packed now."""
        self.quantization_config.layers = SparseConfig.of(model).layers
        return None, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a config's is text once it was written
        for name, linear in packed_linears(model).items():
            model.set_submodule(name, stock_linear(linear, kind))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters on top: the packed weights are constants."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def attach(model: Any) -> None:
    """Makes transformers treat a model with packed linears as one that `from_pretrained` gave: `model.save_pretrained`
    then writes a packed checkpoint, `model.dequantize` unpacks it."""
    model.hf_quantizer = SparseQuantizer(SparseConfig.of(model), pre_quantized=True)
    model.config.quantization_config = model.hf_quantizer.quantization_config
    model.is_quantized, model.quantization_method = True, METHOD


def packed_linears(model: nn.Module) -> dict[str, SparseLinear]:
    """The packed linears of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def stock_linear(linear: SparseLinear, dtype: torch.dtype | None = None) -> nn.Module:
    """The dense layer that a packed one stands for; SLoRB's part is added into its weight."""
    from transformers.pytorch_utils import Conv1D

    matrix = linear.matrix()
    weight = nn.Parameter((matrix.T if linear.transposed else matrix).to(dtype or matrix.dtype).contiguous())
    with torch.device("meta"):
        size = (linear.in_features, linear.out_features)
        stock = Conv1D(*size[::-1]) if linear.transposed else nn.Linear(*size, bias=linear.bias is not None)
    stock.weight, stock.bias = weight, linear.bias
    return stock


# ---------------------------------------------------------------------------------------------------------------------


def _layer(linear: SparseLinear) -> Layer:
    slorb = None if linear.slorb is None else (linear.slorb.block, linear.slorb.x is not None)
    return Layer((linear.out_features, linear.in_features), linear.pattern, slorb)  # type: ignore[arg-type]


def _own_name(model: Any, name: str) -> str:
    """The name in this model of a linear of the checkpoint, which may be of the model with a head."""
    return name if hasattr(model, name.partition(".")[0]) else name.removeprefix(f"{model.base_model_prefix}.")


def _empty(name: str, layer: Layer, stock: nn.Module, shapes: dict[str, tuple[int, ...]]) -> SparseLinear:
    """A packed linear on the meta device in the place of a stock one."""
    from transformers.pytorch_utils import Conv1D

    if not isinstance(stock, nn.Linear | Conv1D):
        raise CheckpointError(f"config.json lists {name} as packed, in the model it is a {type(stock).__name__}")
    transposed = isinstance(stock, Conv1D)
    weight = stock.weight.T if transposed else stock.weight
    if tuple(weight.shape) != layer.shape:
        raise CheckpointError(
            f"config.json lists {name} as packed of shape {list(layer.shape)}, in the model it is {list(weight.shape)}"
        )
    dtypes = {"values": weight.dtype, "offsets": torch.int64}
    packed = {
        part: torch.empty(shape, dtype=dtypes.get(part, torch.uint8), device="meta") for part, shape in shapes.items()
    }
    slorb = None
    if layer.slorb is not None:
        from pyprune.masked import SLoRB

        slorb = SLoRB(torch.empty_like(weight, device="meta"), *layer.slorb)
    rows, columns = layer.shape
    return SparseLinear(packed, columns, rows, stock.bias, layer.pattern, slorb=slorb, transposed=transposed)


def _leave_alone(parent: nn.Module) -> None:
    """Keeps transformers from initialising weights of a module's linears that are not there any more, as GPT-2 does."""
    if not list(parent.parameters(recurse=False)):
        parent._is_hf_initialized = True  # type: ignore[assignment]
