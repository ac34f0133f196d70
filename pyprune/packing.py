"""Packing the linears of a model whose zeros make it worthwhile, and telling what that gives, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pyprune import timing
from pyprune._ops.bitmap import tiles_of
from pyprune.masked import MaskedLinear
from pyprune.modules import SparseLinear
from pyprune.quantizer import attach, packed_linears
from pyprune.reference.bitmap import ALIGNMENT
from pyprune.reference.nm import index_bits, is_nonzero

PATTERNS = ((1, 4), (2, 4), (2, 8), (4, 8))
"""N:M patterns that are looked for, besides the bitmap that takes any zeros."""
WORTHWHILE = 1.15
"""Dense over packed bytes from which on a linear is packed without a measurement."""
DECODE_TOKENS = {"cpu": 16, "cuda": 64}
"""Tokens up to which the kernels multiply from the packed weight; above, it is expanded for the dense product."""
ROUNDS = 7


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear.

    Attributes:
        format: "2:4" and the like, "bitmap", or "dense".
        sparsity: share of zeros among the weights, counted.
        dense_bytes, packed_bytes: of the weight; packed_bytes as it would be if it stayed dense.
        expected_gain: how much faster if only the bytes of the weight counted; 1 above `DECODE_TOKENS`.
        measured_gain: dense over packed time at the expected batch, with the other layers of its kind; None: not
            measured.
        reason: why it stayed dense, or "".
    """

    name: str
    shape: tuple[int, int]
    format: str
    sparsity: float
    dense_bytes: int
    packed_bytes: int
    expected_gain: float
    measured_gain: float | None
    reason: str

    @property
    def bytes(self) -> int:
        """What the weight takes now."""
        return self.dense_bytes if self.format == "dense" else self.packed_bytes


@dataclass(frozen=True)
class Report:
    """What `sparsify` did: `layers` in the model's order."""

    layers: tuple[LayerReport, ...]
    expected_batch: int

    @property
    def packed(self) -> int:
        """How many linears are packed."""
        return sum(layer.format != "dense" for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all linears, were they dense."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Bytes of all linears now."""
        return sum(layer.bytes for layer in self.layers)

    def __str__(self) -> str:
        """A line for every kind of linear, and the sum."""
        kinds: dict[tuple[Any, ...], list[LayerReport]] = {}
        for layer in self.layers:
            kind = (layer.name.rpartition(".")[2], layer.shape, layer.format, layer.reason.partition(":")[0])
            kinds.setdefault(kind, []).append(layer)
        lines = [f"{'linear':18} {'shape':>14} {'zeros':>6} {'format':>7} {'dense MB':>9} {'MB':>8}  gain at batch "]
        timed = any(layer.measured_gain is not None for layer in self.layers)
        lines[0] += f"{self.expected_batch}: by bytes{', measured' if timed else ''}"
        lines += [_line(name, layers) for (name, *_), layers in kinds.items()]
        packed = f"{self.packed} of {len(self.layers)} linears packed"
        return "\n".join([*lines, f"{packed}, {self.dense_bytes / 1e6:.1f} MB -> {self.bytes / 1e6:.1f} MB"])


def _line(name: str, layers: list[LayerReport]) -> str:
    first, count = layers[0], len(layers)
    dense, packed = sum(layer.dense_bytes for layer in layers), sum(layer.bytes for layer in layers)
    zeros = sum(layer.sparsity for layer in layers) / count
    shape = "{}x{}".format(*first.shape)
    measured = "" if first.measured_gain is None else f", {first.measured_gain:.2f}"
    gain = f"{sum(layer.expected_gain for layer in layers) / count:.2f}{measured}"
    label = f"{name} x{count}"
    return (
        f"{label:18} {shape:>14} {zeros:6.1%} {first.format:>7} {dense / 1e6:9.2f} {packed / 1e6:8.2f}  {gain}"
        f"{f'  ({first.reason})' if first.reason else ''}"
    )


# ---------------------------------------------------------------------------------------------------------------------


def sparsify(model: nn.Module, expected_batch: int = 1, *, measure: bool = True) -> Report:
    """Replaces every linear whose zeros make it worthwhile by a `SparseLinear`, in place; the others stay dense.

    The head stays dense, and so does what shares its weight. Afterwards `model.save_pretrained` writes a packed
    checkpoint, and `model.dequantize()` goes back.

    Args:
        model: a transformers model with zeros in its weights, without adapters.
        expected_batch: how many tokens a forward pass has where speed counts: sequences that are decoded together.
        measure: times dense and packed linears of each shape and format on the device they are on, with all layers of
            the kind in turn, and packs those that are faster. Otherwise the bytes decide, alike on every machine.

    Returns:
        For every linear what became of it, and why.

    Raises:
        ValueError: the model has adapters, or a batch below 1.
    """
    if expected_batch < 1:
        raise ValueError(f"expected_batch is {expected_batch}; expected at least 1 token")
    refuse_adapters(model)
    names = [name for name, _ in _linears(model)]
    reports = {}
    for group in _groups(model):
        for report, packed in _decide(group, expected_batch, measure):
            reports[report.name] = report
            if packed is not None:
                model.set_submodule(report.name, packed)
    for name, packed in packed_linears(model).items():
        reports.setdefault(name, _packed_before(name, packed, expected_batch))
    if packed_linears(model):
        attach(model)
    order = {name: place for place, name in enumerate(names)}
    return Report(tuple(sorted(reports.values(), key=lambda report: order[report.name])), expected_batch)


def refuse_adapters(model: nn.Module) -> None:
    """Raises ValueError when the model has some: they would not be packed, or not be written."""
    if hasattr(model, "peft_config"):
        raise ValueError("model has adapters; fold them with pyprune.surgery.fold_adapters, or add them after sparsify")


@dataclass(frozen=True)
class Packing:
    """How a weight would be packed in the fewest bytes: `pattern` (n, m) or None for a bitmap, its `bytes` (a bitmap's
    with the padding that is to be expected), and how many weights are `kept`."""

    pattern: tuple[int, int] | None
    bytes: int
    kept: int

    @classmethod
    def of(cls, weight: Tensor) -> Packing:
        """The best one for a weight [out, in]; an N:M pattern goes before a bitmap of the same size."""
        nonzero = is_nonzero(weight)
        kept = int(nonzero.sum())
        fitting = [pattern for pattern in PATTERNS if _fits(nonzero, *pattern)]
        choices = [cls(pattern, _bytes(weight, kept, pattern), kept) for pattern in (*fitting, None)]
        return min(choices, key=lambda choice: choice.bytes)

    def is_worthwhile(self, weight: Tensor) -> bool:
        """Whether that is clearly less than the dense weight."""
        return weight.nbytes >= WORTHWHILE * self.bytes


def _fits(nonzero: Tensor, n: int, m: int) -> bool:
    columns = nonzero.shape[1]
    return columns % m == 0 and bool((nonzero.unflatten(1, (-1, m)).sum(-1, dtype=torch.uint8) <= n).all())


def _bytes(weight: Tensor, kept: int, pattern: tuple[int, int] | None) -> int:
    bits = weight.element_size() * 8
    if pattern is None:
        padding = (8 + (ALIGNMENT - 1) / 2 * weight.element_size()) * tiles_of(*weight.shape)  # and an offset, per tile
        return (kept * bits + weight.numel()) // 8 + int(padding)
    n, m = pattern
    return weight.numel() // m * n * (bits + index_bits(m)) // 8


@dataclass(frozen=True)
class _Candidate:
    """A dense linear and how it could be packed."""

    name: str
    module: Any
    packing: Packing
    kind: tuple[Any, ...]

    @classmethod
    def of(cls, name: str, module: nn.Module) -> _Candidate:
        """Looks at a linear's zeros."""
        weight = _matrix(module)
        packing = Packing.of(weight)
        density = round(10 * packing.kept / max(weight.numel(), 1))
        return cls(name, module, packing, (weight.shape, weight.dtype, weight.device, packing.pattern, density))

    @property
    def slorb(self) -> nn.Module | None:
        """The low-rank part beside a masked weight."""
        return self.module.slorb if isinstance(self.module, MaskedLinear) else None

    def pack(self, weight: Tensor) -> SparseLinear:
        """The packed linear."""
        masked, linear = isinstance(self.module, MaskedLinear), isinstance(self.module, nn.Linear)
        transposed = self.module.transposed if masked else not linear
        options = {"slorb": self.slorb, "transposed": transposed}
        return SparseLinear.pack(weight, self.module.bias, self.packing.pattern, **options)


def _matrix(module: Any) -> Tensor:
    """The weight of a linear as [out, in], masked ones zero."""
    if isinstance(module, MaskedLinear):
        return module.masked_weight()
    weight = module.weight.detach()
    return weight if isinstance(module, nn.Linear) else weight.T.contiguous()


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linears of a model that are not its head and share their weight with nothing."""
    from transformers.pytorch_utils import Conv1D

    head = getattr(model, "get_output_embeddings", lambda: None)()
    uses: dict[int, int] = {}
    for module in model.modules():
        if isinstance(weight := module._parameters.get("weight"), nn.Parameter):
            uses[id(weight)] = uses.get(id(weight), 0) + 1
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear | Conv1D) and module is not head and uses.get(id(weight), 1) == 1:
            yield name, module


def _groups(model: nn.Module) -> list[list[_Candidate]]:
    """Candidates of one shape, format and dtype together, with about as many zeros: they are as fast as each other."""
    groups: dict[Any, list[_Candidate]] = {}
    for name, module in list(_linears(model)):
        if not isinstance(module, SparseLinear):
            found = _Candidate.of(name, module)
            groups.setdefault(found.kind, []).append(found)
    return list(groups.values())


def _decide(group: list[_Candidate], batch: int, measure: bool) -> Iterator[tuple[LayerReport, SparseLinear | None]]:
    """For every candidate of a group its report, and the packed linear if it is worthwhile."""
    weights = [_matrix(found.module) for found in group]
    packed = [
        found.pack(weight) if found.slorb is not None or found.packing.is_worthwhile(weight) else None
        for found, weight in zip(group, weights, strict=True)
    ]
    pairs = [(weight, module) for weight, module in zip(weights, packed, strict=True) if module is not None]
    gain = _measure(pairs, batch) if measure and pairs else None
    for found, weight, module in zip(group, weights, packed, strict=True):
        size = found.packing.bytes if module is None else module.nbytes
        reason = ""
        if module is None:
            reason = f"too dense: packed it would take {size / max(weight.nbytes, 1):.0%} of the bytes"
        elif gain is not None and gain <= 1:
            reason, module = f"slower packed: {gain:.2f} of the dense speed", None
        rows, columns = weight.shape
        report = LayerReport(
            name=found.name,
            shape=(rows, columns),
            format="dense" if module is None else _format(module.pattern),
            sparsity=1 - found.packing.kept / max(weight.numel(), 1),
            dense_bytes=weight.nbytes,
            packed_bytes=size,
            expected_gain=_expected_gain(weight.nbytes, size, weight.device, batch),
            measured_gain=gain,
            reason=reason,
        )
        yield report, module


def _expected_gain(dense: int, packed: int, device: torch.device, batch: int) -> float:
    return dense / max(packed, 1) if batch <= DECODE_TOKENS.get(device.type, 0) else 1.0


def _packed_before(name: str, linear: SparseLinear, batch: int) -> LayerReport:
    rows, columns = linear.out_features, linear.in_features
    dense = rows * columns * linear.values.element_size()
    kept = int(is_nonzero(linear.values).sum())
    return LayerReport(
        name=name,
        shape=(rows, columns),
        format=_format(linear.pattern),
        sparsity=1 - kept / max(rows * columns, 1),
        dense_bytes=dense,
        packed_bytes=linear.nbytes,
        expected_gain=_expected_gain(dense, linear.nbytes, linear.values.device, batch),
        measured_gain=None,
        reason="",
    )


def _format(pattern: tuple[int, int] | None) -> str:
    return "bitmap" if pattern is None else "{}:{}".format(*pattern)


@torch.no_grad()
def _measure(pairs: list[tuple[Tensor, SparseLinear]], batch: int) -> float:
    """Dense over packed time of all these linears, one after the other and launched one by one, as a model does it:
    each at its fastest in interleaved rounds, which other work on the machine disturbs least."""
    weight = pairs[0][0]
    x = torch.randn(batch, weight.shape[1], device=weight.device).to(weight.dtype)
    runs: dict[str, timing.Run] = {"dense": lambda i: linear(x, pairs[i][0]), "packed": lambda i: pairs[i][1](x)}
    found = timing.interleave(runs, ROUNDS, x.device, dict.fromkeys(runs, len(pairs)), graphs=False)
    return min(found["dense"].seconds) / min(found["packed"].seconds)
