"""What to remove: a target for the whole model, the widths that meet it, and which groups go.

    found = plan.make(model, "params=0.75", score(model, batches))
    print(found.table())          # look at it, save it; nothing has been cut
    found.apply(model)

A target is met from below by the largest shape that the axes, the rounding and stock code allow: one more step of the
finest axis would miss it. With `uniform` widths (the default) the result is a checkpoint of a stock architecture.
"""

from __future__ import annotations

import bisect
import copy
import dataclasses
import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pyprune import evaluation, removal, surgery
from pyprune.architectures import Decoder, describe, size_of, weight_of

AXES = ("heads", "channels", "hidden", "layers")
FINEST = ("channels", "hidden", "heads", "layers")  # the axis that meets a target, the others being rounded first


@dataclass(frozen=True)
class Target:
    """What the whole model is to be: a share of the dense model's parameters, bytes or measured latency, a number of
    parameters or bytes, or an exact shape. Made by `parse`."""

    kind: Literal["params", "bytes", "latency", "shape"]
    value: float = 0.0
    shape: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Target:
        """From "params=0.75", "bytes=2.5e9", "latency=0.8", or "heads=4,channels=8192,hidden=3072,layers=28" (any of
        these; heads counts key/value heads). Raises ValueError for anything else."""
        refusal = ValueError(
            f"target is {text!r}; expected params=, bytes= or latency= with a share of the dense model (up to 1) or, "
            f"for the first two, a number, or a shape such as heads=4,channels=8192; axes are {', '.join(AXES)}"
        )
        pairs = [piece.partition("=")[::2] for piece in text.split(",")]
        names = [name.strip() for name, _ in pairs]
        try:
            if len(pairs) == 1 and names[0] in ("params", "bytes", "latency"):
                value = float(pairs[0][1])
                if not 0 < value < float("inf") or (names[0] == "latency" and value > 1):
                    raise refusal
                return cls(names[0], value)  # type: ignore[arg-type]
            if set(names) <= set(AXES) and len(set(names)) == len(names):
                return cls("shape", shape={name: int(value) for name, (_, value) in zip(names, pairs, strict=True)})
        except ValueError:
            pass
        raise refusal

    def limit(self, dense: int) -> float:
        """The number of parameters or bytes that may be left of a dense model's."""
        return self.value * dense if self.value <= 1 else self.value


@dataclass(frozen=True)
class Widths:
    """The shape of a decoder: its hidden size, and for each block its key/value heads and its MLP's channels, both 0
    where the block is gone."""

    hidden: int
    heads: tuple[int, ...]
    channels: tuple[int, ...]

    @classmethod
    def of(cls, decoder: Decoder) -> Widths:
        """Those of a model."""
        counts = [groups.count for groups in decoder.groups()]
        return cls(decoder.hidden_size, tuple(counts[::2]), tuple(counts[1::2]))

    def largest(self) -> dict[str, int]:
        """By axis, the largest width, and how many blocks there are."""
        blocks = sum(count > 0 for count in self.heads)
        return {"heads": max(self.heads), "channels": max(self.channels), "hidden": self.hidden, "layers": blocks}


class Sizes:
    """Counts the parameters or bytes that a decoder would have at other widths, without building it."""

    def __init__(self, decoder: Decoder, untied: bool = False) -> None:
        """`untied`: count a tied head as a matrix of its own, as it is after a rotation."""
        self.dense = Widths.of(decoder)
        self.axes: dict[nn.Parameter, dict[int, tuple[str, int, int]]] = {}
        for groups in decoder.groups():
            for part in groups.parts:
                for parameter, dim in removal.axes_of(part):
                    width = part.width + self.axes.get(parameter, {}).get(dim, ("", 0, 0))[2]
                    self.axes.setdefault(parameter, {})[dim] = (groups.axis, groups.block, width)
        for linear in [linear for reads in decoder.reads() for linear in reads.linears]:
            self._hidden(surgery.input_axes(linear))
        for writer in decoder.writers().values():
            self._hidden(surgery.output_axes(writer))
        self._hidden((weight_of(reads.norm), 0) for reads in decoder.reads())
        self.block_of = {p: i for i, block in enumerate(decoder.blocks) for p in block.module.parameters()}
        linears = {part.linear for groups in decoder.groups() for part in groups.parts}
        self.shapes = {weight_of(linear): size_of(linear) for linear in linears}
        self.plain_bytes = weight_of(decoder.final_norm).element_size()  # of a quantised weight, once it is dequantised
        self.parameters = list(decoder.model.parameters())
        if untied and decoder.tied:
            self.parameters.append(weight_of(decoder.head))

    def _hidden(self, axes: Any) -> None:
        for parameter, dim in axes:
            self.axes.setdefault(parameter, {})[dim] = ("hidden", 0, 1)

    def count(self, widths: Widths, unit: str = "params") -> int:
        """Parameters, or bytes, of the whole model, shared ones once."""
        return sum(self._one(p, widths) * (self._bytes(p) if unit == "bytes" else 1) for p in self.parameters)

    def _bytes(self, parameter: nn.Parameter) -> int:
        return parameter.element_size() if parameter.is_floating_point() else self.plain_bytes

    def _one(self, parameter: nn.Parameter, widths: Widths) -> int:
        if parameter in self.block_of and not widths.heads[self.block_of[parameter]]:
            return 0
        total = 1
        for dim, size in enumerate(self.shapes.get(parameter, parameter.shape)):
            axis, block, per = self.axes.get(parameter, {}).get(dim, ("", 0, 0))
            total *= {"": size, "hidden": widths.hidden}.get(axis) or getattr(widths, axis)[block] * per
        return total

    def group(self, axis: str, block: int, unit: str) -> int:
        """What one head or channel of a block costs at full hidden size."""
        rows = {"heads": list(self.dense.heads), "channels": list(self.dense.channels)}
        rows[axis][block] -= 1
        fewer = Widths(self.dense.hidden, tuple(rows["heads"]), tuple(rows["channels"]))
        return self.count(self.dense, unit) - self.count(fewer, unit)


# ------------------------------------------------------------------------------------------------------ widths that fit


@dataclass(frozen=True)
class Rules:
    """What widths may be chosen from.

    Attributes:
        axes: what may shrink, of `AXES`.
        uniform: the same widths in every block, as stock code wants.
        round_to: channels and hidden size are multiples of this, unless nothing of them goes.
        skip: blocks that stay as they are; only without `uniform`.
    """

    axes: Sequence[str] = ("heads", "channels")
    uniform: bool = True
    round_to: int = 64
    skip: Collection[int] = ()

    def __post_init__(self) -> None:
        if not self.axes or not set(self.axes) <= set(AXES):
            raise ValueError(f"axes are {', '.join(self.axes) or 'none'}; expected some of {', '.join(AXES)}")
        if self.round_to < 1:
            raise ValueError(f"round_to is {self.round_to}; expected at least 1")
        if self.uniform and self.skip:
            raise ValueError(
                f"skip is {sorted(self.skip)}, but blocks that stay as they are have other widths than the rest, which "
                "stock code cannot load; leave skip empty, or pass uniform=False"
            )

    def options(self, axis: str, dense: Widths) -> list[int]:
        """The widths of an axis, rising, before stock code is asked."""
        full = dense.largest()[axis]
        step = self.round_to if axis in ("channels", "hidden") else 1
        return [*range(step, full, step), full]


def default_skip(blocks: int) -> tuple[int, ...]:
    """The blocks that LoRAPrune leaves alone: the first tenth and the last."""
    return (*range(blocks // 10), blocks - 1)


def widths_for(
    decoder: Decoder,
    target: Target,
    rules: Rules,
    *,
    untied: bool = False,
    layers: Sequence[int] | None = None,
    measure: Callable[[Widths], float] | None = None,
) -> Widths:
    """The widths that meet a target, every axis shrunk by about the same share.

    Args:
        layers: all blocks by rising importance, when blocks may go.
        measure: for a target of latency: that of a model of some widths, over the dense one's.

    Raises:
        ValueError: nothing would be removed, the target lies below what the rules leave possible (the smallest
            possible is named), or an exact shape is not in the rules or not accepted by stock code.
    """
    if bad := [block for block in rules.skip if not 0 <= block < len(decoder.blocks)]:
        raise ValueError(f"skip names blocks {bad}; the model has blocks 0 to {len(decoder.blocks) - 1}")
    search = _Search(decoder, target, rules, Sizes(decoder, untied), list(layers or []))
    if target.kind == "shape":
        return search.exact()
    if target.kind == "latency":
        if not rules.uniform:
            raise ValueError("target latency=: shapes are measured with uniform widths; pass uniform=True and no skip")
        if measure is None:
            raise ValueError("target latency=: it is measured; pass measure=plan.latency_of(model)")
        return search.measured(measure)
    return search.counted()


class _Search:
    """Looks for the widths of one target."""

    def __init__(self, decoder: Decoder, target: Target, rules: Rules, sizes: Sizes, layers: list[int]) -> None:
        self.decoder, self.target, self.rules, self.sizes, self.layers = decoder, target, rules, sizes, layers
        self.dense = sizes.dense
        self.full = self.dense.largest()
        self.options = {axis: rules.options(axis, self.dense) for axis in AXES if axis in rules.axes}
        if "layers" in self.options and not layers:
            self.layers = list(reversed(range(self.full["layers"])))

    def widths(self, shape: Mapping[str, int]) -> Widths:
        """All blocks of one shape but those to skip; the least important blocks gone."""
        shape = self.full | dict(shape)
        gone = set(self.layers[: self.full["layers"] - shape["layers"]])

        def row(axis: str, dense: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(
                0 if i in gone else (n if i in self.rules.skip else min(n, shape[axis])) for i, n in enumerate(dense)
            )

        return Widths(shape["hidden"], row("heads", self.dense.heads), row("channels", self.dense.channels))

    def refusal(self, widths: Widths) -> str | None:
        """Why stock code does not load these widths; None when it does, or is not asked to."""
        heads = self.decoder.groups()[0]
        per_key = heads.writer.width // self.decoder.head_dim
        largest = (widths if self.rules.uniform else self.dense).largest()
        return surgery.stock_refusal(
            self.decoder,
            hidden_size=widths.hidden,
            num_key_value_heads=largest["heads"],
            num_attention_heads=largest["heads"] * per_key,
            intermediate_size=largest["channels"],
        )

    def exact(self) -> Widths:
        shape = self.target.shape
        for axis, value in shape.items():
            if not 1 <= value <= self.full[axis]:
                raise ValueError(f"target {axis}={value}: expected 1 to {self.full[axis]}, what the model has")
        if dict(shape).items() <= self.full.items():
            raise ValueError(f"target {_shape_text(shape)}: the model has this shape already")
        widths = self.widths(shape)
        if reason := self.refusal(widths):
            raise ValueError(f"target {_shape_text(shape)}: {reason}")
        return widths

    def counted(self) -> Widths:
        unit = self.target.kind
        limit = self.target.limit(self.before(unit))
        return self.filled(self.nearest(limit, unit), limit, unit)

    def before(self, unit: str) -> int:
        """What the dense model has; a head that will be untied counts only afterwards."""
        return Sizes(self.decoder).count(self.dense, unit)

    def nearest(self, limit: float, unit: str) -> Widths:
        """The coarse axes nearest to an equal share, the finest as wide as the limit allows."""
        share = self.share(limit, unit)
        finest = next(axis for axis in FINEST if axis in self.options)
        coarse = [axis for axis in self.options if axis != finest]
        around = [sorted(self.options[axis], key=lambda n: abs(n / self.full[axis] - share))[:4] for axis in coarse]
        found: list[tuple[float, Widths]] = []
        for values in itertools.product(*around):
            shape = dict(zip(coarse, values, strict=True))
            width = self.widest(finest, shape, limit, unit)
            if width is not None:
                shape[finest] = width
                distance = sum(abs(n / self.full[axis] - share) for axis, n in shape.items())
                found.append((distance, self.widths(shape)))
        if not found:
            raise ValueError(self.unreachable(unit))
        return min(found, key=lambda pair: pair[0])[1]

    def widest(self, axis: str, shape: dict[str, int], limit: float, unit: str) -> int | None:
        """The largest width of an axis within the limit that stock code accepts beside the others' `shape`. One that
        falls short of the limit although the axis is whole does not count: another shape is nearer."""
        options = self.options[axis]

        def count(width: int) -> int:
            return self.sizes.count(self.widths(shape | {axis: width}), unit)

        fitting = options[: bisect.bisect_right(options, limit, key=count)]
        accepted = (width for width in reversed(fitting) if not self.refusal(self.widths(shape | {axis: width})))
        width = next(accepted, None)
        short = width == options[-1] and len(self.options) > 1 and count(width) < 0.98 * limit
        return None if short else width

    def share(self, limit: float, unit: str) -> float:
        """The share of every axis that is left, as if widths could be any number, by bisection."""
        if limit >= self.sizes.count(self.dense, unit):
            raise ValueError(f"target {unit}={self.target.value:g}: the model is not larger, so nothing would go")
        smallest = self.widths({axis: options[0] for axis, options in self.options.items()})
        if self.sizes.count(smallest, unit) > limit:
            raise ValueError(self.unreachable(unit))
        low, high = 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            shape = {axis: max(1, round(middle * self.full[axis])) for axis in self.options}
            low, high = (low, middle) if self.sizes.count(self.widths(shape), unit) > limit else (middle, high)
        return low

    def unreachable(self, unit: str) -> str:
        shape: dict[str, int] = {}
        for axis, options in self.options.items():
            shape[axis] = next(width for width in options if not self.refusal(self.widths({axis: width})))
            if shape[axis] == self.full[axis]:
                why = f": {self.refusal(self.widths({axis: options[-2]}))}" if options[:-1] else ""
                return (
                    f"target {unit}={self.target.value:g}: no {axis} below {self.full[axis]} is a multiple of round_to="
                    f"{self.rules.round_to} and loads in stock code{why}; take a smaller round_to, such as 1"
                )
        smallest = self.widths(shape)
        count, dense = self.sizes.count(smallest, unit), self.before(unit)
        skipped = f" with blocks {sorted(self.rules.skip)} left alone" if self.rules.skip else ""
        return (
            f"target {unit}={self.target.value:g}: not within reach of {', '.join(self.options)}{skipped}; the "
            f"smallest possible is {count:,} of {dense:,} ({count / dense:.3f}); prune more axes, skip fewer blocks, "
            "or take a smaller round_to"
        )

    def filled(self, widths: Widths, limit: float, unit: str) -> Widths:
        """Blocks that may differ take one more step of channels each as long as the limit allows."""
        if self.rules.uniform or "channels" not in self.options:
            return widths
        for block, count in enumerate(widths.channels):
            wider = min(count + self.rules.round_to, self.dense.channels[block])
            channels = (*widths.channels[:block], wider, *widths.channels[block + 1 :])
            larger = dataclasses.replace(widths, channels=channels)
            if count and wider > count and self.sizes.count(larger, unit) <= limit:
                widths = larger
        return widths

    def measured(self, measure: Callable[[Widths], float]) -> Widths:
        """The largest of the shapes of equal shares whose measured latency is within the target, by bisection."""
        low, high = 1, 16  # shares of sixteenths that are left: low is taken as too small to ask, high is the dense one
        best: Widths | None = None
        while low < high:
            middle = (low + high) // 2
            try:
                widths = self.nearest(middle / 16 * self.before("params"), "params")
            except ValueError:
                low = middle + 1
                continue
            if measure(widths) <= self.target.value:
                best, low = widths, middle + 1
            else:
                high = middle
        if best is None:
            raise ValueError(
                f"target latency={self.target.value:g}: no shape of {', '.join(self.options)} was measured that fast"
            )
        return best


def _shape_text(shape: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={value}" for axis, value in shape.items())


@dataclass(frozen=True)
class _Step:
    """Some groups of one name that may go together: `score` and `cost` per parameter and in all, `place` among them."""

    score: float
    name: str
    place: int
    size: int
    cost: int


def global_widths(decoder: Decoder, target: Target, rules: Rules, scores: Mapping[str, Tensor]) -> Widths:
    """Widths of each block from one ranking of all heads and channels of the model by score per parameter: steps (one
    head, `round_to` channels) go, lowest first, until the target is met. Every block keeps at least one step of each.

    Raises:
        ValueError: uniform widths, other axes or targets than these, or a target that cannot be met.
    """
    if rules.uniform or not set(rules.axes) <= {"heads", "channels"} or target.kind not in ("params", "bytes"):
        raise ValueError(
            "a global ranking gives every block widths of its own: it needs uniform=False, the axes heads and "
            "channels, and a target of params or bytes"
        )
    search = _Search(decoder, target, rules, Sizes(decoder), [])
    unit = target.kind
    limit = target.limit(search.sizes.count(search.dense, unit))
    search.share(limit, unit)  # raises when out of reach
    steps: list[_Step] = []
    for groups in decoder.groups():
        size = rules.round_to if groups.axis == "channels" else 1
        if groups.axis not in rules.axes or groups.block in rules.skip or groups.count <= size:
            continue
        cost = search.sizes.group(groups.axis, groups.block, unit)
        values = _scores_of(scores, groups.name).sort().values
        first = groups.count % size or size  # so that what is left is a multiple
        pieces = list(values[: groups.count - size].split([first, *[size] * ((groups.count - first) // size)][:-1]))
        steps += [
            _Step(float(p.mean()) / cost, groups.name, place, len(p), cost * len(p)) for place, p in enumerate(pieces)
        ]
    left = {groups.name: groups.count for groups in decoder.groups()}
    excess = search.sizes.count(search.dense, unit) - limit
    rising = sorted(steps, key=lambda step: (step.score, step.name, step.place))
    gone = 0
    while excess > 0:
        left[rising[gone].name] -= rising[gone].size
        excess -= rising[gone].cost
        gone += 1
    for step in reversed(rising[:gone]):  # what the last large step made room for comes back
        if step.cost <= -excess:
            left[step.name] += step.size
            excess += step.cost
    counts = list(left.values())
    return Widths(search.dense.hidden, tuple(counts[::2]), tuple(counts[1::2]))


# ------------------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Plan:
    """Which groups stay. Print `table()` and nothing has happened yet; `apply` cuts.

    Attributes:
        target: its text, for the record.
        dense, pruned: widths before and after. params: parameters before and after.
        kept: indices of what stays, for groups by name, "hidden", "layers"; whole axes are left out.
    """

    target: str
    dense: Widths
    pruned: Widths
    params: tuple[int, int]
    kept: dict[str, list[int]]

    def apply(self, model: nn.Module) -> nn.Module:
        """Cuts a stock model, in place: heads and channels, blocks, hidden size, and the config.

        Raises:
            ValueError: the model has other widths than the one planned for, or has adapters; or `kept` was edited to
                what cannot be. Nothing was changed.
        """
        decoder = describe(model)
        if Widths.of(decoder) != self.dense:
            raise ValueError(
                f"the plan is for a model of {_text(self.dense)}; this one has {_text(Widths.of(decoder))}; plan again"
            )
        surgery.refuse_adapters(decoder, "Plan.apply")
        self._check_kept(decoder)
        layers = self.kept.get("layers", range(len(decoder.blocks)))
        groups = {g.name: self.kept[g.name] for g in decoder.groups() if g.name in self.kept and g.block in layers}
        removal.remove_groups(model, groups)
        if "layers" in self.kept:
            removal.remove_blocks(model, self.kept["layers"])
            describe(model).state_widths()
        if "hidden" in self.kept:
            surgery.slice_hidden(model, self.kept["hidden"])
        return surgery.settle_config(model)

    def _check_kept(self, decoder: Decoder) -> None:
        """All of it before the first cut."""
        groups = {g.name: g for g in decoder.groups()}
        if unknown := sorted(self.kept.keys() - groups.keys() - {"layers", "hidden"}):
            raise ValueError(f"kept: unknown groups {unknown}; expected names like {', '.join(list(groups)[:2])}")
        if "layers" in self.kept:
            removal.check_blocks(len(decoder.blocks), self.kept["layers"])
        if "hidden" in self.kept:
            surgery.check_keep(decoder, self.kept["hidden"])
        for name in self.kept.keys() & groups.keys():
            removal.check_groups(groups[name], self.kept[name])

    def table(self) -> str:
        """Before and after, block by block (equal ones in one line), and the whole model."""
        rows = [("blocks", "key/value heads", "MLP channels")]
        pairs = [
            zip(dense, pruned, strict=True)
            for dense, pruned in ((self.dense.heads, self.pruned.heads), (self.dense.channels, self.pruned.channels))
        ]
        blocks = list(enumerate(zip(*pairs, strict=True)))
        for (heads, channels), same in itertools.groupby(blocks, key=lambda item: item[1]):
            numbers = [i for i, _ in same]
            name = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
            gone = heads[1] == 0
            rows.append(
                (
                    name,
                    f"{heads[0]} -> {'gone' if gone else heads[1]}",
                    f"{channels[0]} -> {'gone' if gone else channels[1]}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(f"hidden size {self.dense.hidden} -> {self.pruned.hidden}")
        lines.append(met(self.target, *self.params))
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON."""
        Path(path).write_text(json.dumps({"pyprune_plan": 1, **dataclasses.asdict(self)}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """A plan that `save` wrote. Raises ValueError for anything else."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            if raw.pop("pyprune_plan") != 1:
                raise KeyError("version")
            dense, pruned = (
                Widths(w["hidden"], tuple(w["heads"]), tuple(w["channels"])) for w in (raw["dense"], raw["pruned"])
            )
            return cls(str(raw["target"]), dense, pruned, tuple(raw["params"]), dict(raw["kept"]))
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"plan {path}: not a plan that pyprune wrote ({error}); make one with Plan.save"
            ) from error


def met(target: str, before: int, after: int) -> str:
    """A line for a target and the parameters before and after; one that was met by much less says why."""
    line = f"parameters {before:,} -> {after:,} ({after / before:.4f}); target {target}"
    wanted = Target.parse(target)
    if wanted.kind == "params" and after < 0.98 * wanted.limit(before):
        line += ", met by less because widths come in steps; a smaller round_to or other axes come closer"
    return line


def make(
    model: nn.Module,
    target: str,
    scores: Mapping[str, Tensor],
    rules: Rules = Rules(),
    *,
    ranking: Literal["local", "global"] = "local",
    measure: Callable[[Widths], float] | None = None,
) -> Plan:
    """Chooses what goes, by scores; the model is only looked at. A plan that is not liked is made again: with other
    rules, for instance with `skip` naming the blocks to spare, which still meets the target.

    Args:
        target: see `Target.parse`.
        scores: of `criteria.score`.
        ranking: every block of the same widths (local), or one ranking of the whole model (global).
        measure: for a target of latency, in place of `latency_of(model)`.

    Raises:
        ValueError: the target cannot be met, or there are no scores for an axis that shrinks.
    """
    decoder, wanted = describe(model), Target.parse(target)
    if ranking not in ("local", "global"):
        raise ValueError(f"ranking is {ranking!r}; expected local or global")
    if wanted.kind == "latency" and measure is None:
        measure = latency_of(model)
    if wanted.kind == "shape":
        rules = dataclasses.replace(rules, axes=tuple(wanted.shape))
    if ranking == "global":
        widths = global_widths(decoder, wanted, rules, scores)
    else:
        layers = _scores_of(scores, "layers").argsort().tolist() if "layers" in rules.axes else None
        widths = widths_for(decoder, wanted, rules, layers=layers, measure=measure)
    return choose(decoder, target, widths, scores)


def latency_of(
    model: nn.Module, prompt_tokens: int = 256, new_tokens: int = 16, repeats: int = 3
) -> Callable[[Widths], float]:
    """Measures the time that a prompt and some new tokens take in a model of given uniform widths and random weights,
    over that of `model`, side by side: what a target of latency needs."""

    def measure(widths: Widths) -> float:
        decoder, largest = describe(model), widths.largest()
        config = copy.deepcopy(decoder.config)
        config.head_dim, config.hidden_size = decoder.head_dim, largest["hidden"]
        config.num_key_value_heads, config.num_hidden_layers = largest["heads"], largest["layers"]
        config.num_attention_heads = largest["heads"] * decoder.groups()[0].writer.width // decoder.head_dim
        config.intermediate_size = largest["channels"]
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: largest["layers"]]
        weight = weight_of(decoder.embedding)
        with weight.device:
            other = AutoModelForCausalLM.from_config(config, dtype=weight.dtype)
        times = evaluation.latency({"dense": model, "pruned": other}, prompt_tokens, new_tokens, repeats)
        dense, pruned = (times[name].prefill + new_tokens * times[name].decode for name in ("dense", "pruned"))
        return pruned / dense

    return measure


def choose(decoder: Decoder, target: str, widths: Widths, scores: Mapping[str, Tensor]) -> Plan:
    """The plan that keeps the best groups of every block at given widths; of equal scores the first stay."""
    sizes = Sizes(decoder)
    kept: dict[str, list[int]] = {}
    for groups in decoder.groups():
        count = getattr(widths, groups.axis)[groups.block]
        if 0 < count < groups.count:
            kept[groups.name] = best(_scores_of(scores, groups.name), count)
    if widths.hidden < decoder.hidden_size:
        kept["hidden"] = best(_scores_of(scores, "hidden"), widths.hidden)
    if 0 in widths.heads:
        kept["layers"] = [i for i, count in enumerate(widths.heads) if count]
    return Plan(target, sizes.dense, widths, (sizes.count(sizes.dense), sizes.count(widths)), kept)


def best(scores: Tensor, count: int) -> list[int]:
    """Indices of the `count` highest scores, rising; of equal ones the lower index stays."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values.tolist()


def _scores_of(scores: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in scores:
        known = ", ".join(list(scores)[:3])
        raise ValueError(
            f"scores: none for {name}, which the target shrinks; there are some for {known} ... (of pyprune's criteria "
            "activation and random score all axes, the others heads and channels)"
        )
    return scores[name]


def _text(widths: Widths) -> str:
    largest = widths.largest()
    return ", ".join(f"{axis} {largest[axis]}" for axis in AXES)
