"""vLLM serves packed checkpoints: its plugin, found by the entry point `vllm.general_plugins`.

vLLM fuses linears that read the same input (q, k and v; gate and up) and splits them over GPUs, which a packed weight
of variable length cannot follow. So every packed tensor is kept as it is read; when a layer is complete, its weights
are unpacked one by one, cut to this process's share, put together, and packed again.

Run in vLLM 0.32.0's build for CPUs (docs/sparse.md), not yet on a GPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from pyprune.formats import CheckpointError, Layer
from pyprune.modules import SparseLinear
from pyprune.packing import Packing
from pyprune.quantizer import METHOD, SparseConfig

PARTS = {"weight": None, "values": None, "metadata": torch.uint8, "bitmap": torch.uint8, "offsets": torch.int64}


class PackedConfig(QuantizationConfig):
    """vLLM's view of the `quantization_config` of a packed checkpoint."""

    def __init__(self, layers: dict[str, Layer]) -> None:
        super().__init__()
        if boosted := [name for name, layer in layers.items() if layer.slorb is not None]:
            raise CheckpointError(
                f"{len(boosted)} linears have a SLoRB part, the first is {boosted[0]}, which this plugin does not "
                "serve; write a dense checkpoint with pyprune export --dense"
            )
        self.layers = layers

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedConfig:
        """From config.json."""
        return cls(SparseConfig.from_dict(config).layers)

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere, the oldest that the kernels are built for."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Renames layers as vLLM renames the model's modules."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The packed method for a linear of which a part is packed; vLLM's own for the others."""
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        if not isinstance(layer, LinearBase):
            return None
        layers = [self.layers.get(name) for name in self._names(prefix)]
        return PackedLinearMethod(prefix, layers) if any(layers) else UnquantizedLinearMethod()

    def _names(self, prefix: str) -> list[str]:
        """Names in the checkpoint of the linears that vLLM fused into one."""
        parent, _, fused = prefix.rpartition(".")
        return [f"{parent}.{name}" if parent else name for name in self.packed_modules_mapping.get(fused, [fused])]


class PackedLinearMethod(QuantizeMethodBase):
    """Loads and multiplies the packed weights of one of vLLM's linears.

    Args:
        name: of the linear, for errors.
        layers: what each fused weight is in the checkpoint, in their order; None for a dense one.
    """

    def __init__(self, name: str, layers: list[Layer | None]) -> None:
        self.name, self.layers = name, layers
        self.read: dict[Any, dict[str, Tensor]] = {}

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Places for everything that the checkpoint may have for this layer, to be filled by `_load`."""
        self.columns, self.rows, self.dtype = input_size_per_partition, output_partition_sizes, params_dtype
        for part, dtype in PARTS.items():
            parameter = nn.Parameter(torch.empty(0, dtype=dtype or params_dtype), requires_grad=False)
            parameter.weight_loader = partial(self._load, part)  # type: ignore[attr-defined]
            layer.register_parameter(part, parameter)

    def _load(self, part: str, parameter: nn.Parameter, loaded_weight: Tensor, loaded_shard_id: Any = None) -> None:
        """Keeps a tensor of the checkpoint; vLLM's `weight_loader`. Shards are "q", "k", "v", or 0, 1, or None."""
        self.read.setdefault(loaded_shard_id, {})[part] = loaded_weight

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Unpacks, cuts and puts together what was read, and packs it again."""
        device = layer.get_parameter("weight").device
        rank, ranks = getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1)
        order = [shard for shard in (None, "q", "k", "v", *range(len(self.layers))) if shard in self.read]
        if len(order) != len(self.layers):
            raise CheckpointError(f"{self.name}: {len(order)} of its {len(self.layers)} weights are in the checkpoint")
        if len(order) < len(self.rows) and ranks > 1:
            raise CheckpointError(f"{self.name} is fused in the checkpoint and cannot be split over {ranks} GPUs")
        whole = len(order) < len(self.rows)
        rows = [sum(self.rows)] if whole else self.rows
        weights = [
            _share(self._dense(self.read[shard], own), size, self.columns, rank, ranks)
            for shard, own, size in zip(order, self.layers, rows, strict=True)
        ]
        weight = torch.cat(weights).to(device, self.dtype)
        self.read.clear()
        for part in PARTS:
            delattr(layer, part)
        packing = Packing.of(weight)
        if packing.is_worthwhile(weight):
            layer.packed = SparseLinear.pack(weight, pattern=packing.pattern)
        else:
            layer.weight = nn.Parameter(weight, requires_grad=False)

    def _dense(self, tensors: dict[str, Tensor], layer: Layer | None) -> Tensor:
        """One weight [out, in] of the checkpoint, checked before it is unpacked."""
        if layer is None:
            return tensors["weight"]
        parts = SparseLinear.parts(layer.pattern)
        if missing := [part for part in parts if part not in tensors]:
            raise CheckpointError(f"{self.name}: {', '.join(missing)} missing in the checkpoint")
        packed = SparseLinear(tensors, layer.shape[1], layer.shape[0], pattern=layer.pattern)
        try:
            packed.check()
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the packed tensors of {self.name} do not agree: {error}") from error
        return packed.matrix()

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out]."""
        packed = getattr(layer, "packed", None)
        if packed is None:
            return linear(x, layer.get_parameter("weight"), bias)
        y = packed(x)
        return y if bias is None else y + bias


def _share(weight: Tensor, rows: int, columns: int, rank: int, ranks: int) -> Tensor:
    """This process's part of a weight: its rows, or its columns. With fewer heads than processes, rows are shared."""
    place = rank * (weight.shape[0] // rows) // ranks
    weight = weight.narrow(0, place * rows, rows)
    return weight if weight.shape[1] == columns else weight.narrow(1, rank * columns, columns)


def register() -> None:
    """What the entry point names; vLLM calls it in every process, perhaps more than once."""
    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(PackedConfig)
