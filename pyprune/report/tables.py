"""What the report says in numbers: one table behind every picture, the same for the page, the terminal and --json."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyprune.report.reading import Layer, Model, Record, Run, clean, number

MISSING = "–"
POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a curve's steps, where a table shows it
FIGURES = {  # of a line of metrics.jsonl: name, unit or range
    "mask": "mask of the subspace that goes",
    "mask_going": "mask of channels that go, mean",
    "mask_going_max": "mask of channels that go, largest",
    "mask_staying_min": "mask of channels that stay, smallest",
    "mask_staying": "mask of channels that stay, mean",
    "mask_count": "channels that count",
    "mask_target": "channels that shall count",
    "groups_left": "groups that count, share",
    "flip_rate": "mask bits that flipped, share",
    "mask_distance": "mask bits unlike the first mask, share",
}


@dataclass(frozen=True)
class Column:
    """A column of values of one unit, a key of `UNITS`."""

    name: str
    unit: str = "text"

    @property
    def numeric(self) -> bool:
        """Whether the values are numbers, which are set to the right."""
        return self.unit not in ("text", "shape", "command")

    def text(self, value: Any) -> str:
        """A value as it is shown, or a dash for none."""
        return MISSING if value is None else UNITS[self.unit](value)


@dataclass(frozen=True)
class Table:
    """Rows of plain values under their columns. `strong`: the rows to look at first. `long`: too long for a terminal;
    the page, report.txt and --json have it."""

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""
    long: bool = False
    strong: tuple[int, ...] = ()

    @classmethod
    def of(cls, plain: Record) -> Table:
        """A table from its `dataclasses.asdict`."""
        return cls(**plain | {"columns": tuple(Column(**column) for column in plain["columns"])})

    def texts(self) -> list[list[str]]:
        """The rows as they are shown."""
        return [[column.text(value) for column, value in zip(self.columns, row, strict=True)] for row in self.rows]


def _table(key: str, title: str, columns: Sequence[Column], rows: Sequence[tuple[Any, ...]], **more: Any) -> Table:
    """Without the columns that no row has a value for."""
    used = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
    kept = tuple(tuple(row[i] for i in used) for row in rows)
    return Table(key, title, tuple(columns[i] for i in used), kept, **more)


# ------------------------------------------------------------------------------------------------------- how it is said


def perplexity(value: float) -> str:
    """Two digits behind the point while they say something."""
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e7 else f"{value:.1e}"


def percent(value: float) -> str:
    """A share as a percentage."""
    return f"{value:.1%}".replace("%", "\N{NARROW NO-BREAK SPACE}%")


def times(value: float) -> str:
    """A ratio of speeds."""
    return f"{value:.2f}×"


def megabytes(value: float) -> str:
    """Bytes in units of a million."""
    return f"{value / 1e6:,.1f}"


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def shape(value: Sequence[int]) -> str:
    """Outputs and inputs."""
    return f"{value[0]} × {value[1]}"


UNITS: dict[str, Callable[[Any], str]] = {
    "text": str,
    "command": str,
    "shape": shape,
    "count": lambda value: f"{value:,.0f}",
    "number": lambda value: f"{value:.4g}",
    "share": percent,
    "ratio": times,
    "perplexity": perplexity,
    "bytes": megabytes,
    "seconds": duration,
}


def name_of(run: Run, model: Model, runs: Sequence[Run]) -> str:
    """What a model is called among those of `runs`, as short as can be."""
    if len(runs) == 1:
        return model.name
    return run.label if model.role == "result" and len(run.results) == 1 else f"{run.label} · {model.name}"


def results(runs: Sequence[Run]) -> Iterator[tuple[str, Run, Model]]:
    """Every result of every run with its name."""
    for run in runs:
        for model in run.results:
            yield name_of(run, model, runs), run, model


def headline(run: Run) -> str:
    """The run in one sentence."""
    if run.state != "finished":
        return run.state
    if len(run.results) != 1:
        return f"{len(run.results)} methods compared on one model" if run.results else run.state
    model, parts = run.results[0], []
    if model.left is not None:
        parts.append(f"{percent(1 - model.left)} of the weights in the blocks gone")
    if model.perplexity is not None:
        before = run.dense.perplexity if run.dense else None
        parts.append(f"perplexity {f'{perplexity(before)} → ' if before else ''}{perplexity(model.perplexity)}")
    if model.decode is not None:
        limit = ""
        if model.decode_limit and model.decode <= model.decode_limit:
            limit = f" of {times(model.decode_limit)} at most"
        elif model.decode_limit:  # where the dense model falls short of the memory's bandwidth, or others were at work
            limit = f" (more than its bytes explain, {times(model.decode_limit)})"
        parts.append(f"decoding {times(model.decode)}{limit}")
    return ", ".join(parts) or run.state


# --------------------------------------------------------------------------------------------------------------- tables


def all_tables(runs: Sequence[Run]) -> list[Table]:
    """All tables that have a row."""
    found = [
        models(runs),
        training(runs),
        by_block(runs),
        by_kind(runs),
        every_layer(runs),
        stages(runs),
        commands(runs),
        summaries(runs),
    ]
    return [table for table in found if table.rows]


def models(runs: Sequence[Run]) -> Table:
    """Every model that was measured: quality, size, speed."""
    rows: list[tuple[Any, ...]] = []
    strong: list[int] = []
    for run in runs:
        dense = run.dense or Model("dense", "dense")
        for model in run.models:
            worse = _over(model.perplexity, dense.perplexity) if model.role != "dense" else None
            sizes = (model.left, model.params, model.bytes, _over(model.bytes, dense.bytes))
            speeds = (model.prefill, model.prefill_limit, model.decode, model.decode_limit)
            strong += [len(rows)] if model.role == "result" else []
            rows.append((run.label, model.name, model.perplexity, worse, *sizes, *speeds, model.seconds))
    columns = (
        Column("run"),
        Column("model"),
        Column("perplexity", "perplexity"),
        Column("over dense", "ratio"),
        Column("weights left in blocks", "share"),
        Column("parameters", "count"),
        Column("MB", "bytes"),
        Column("of dense", "share"),
        Column("prefill", "ratio"),
        Column("prefill limit", "ratio"),
        Column("decode", "ratio"),
        Column("decode limit", "ratio"),
        Column("time", "seconds"),
    )
    note = (
        "Perplexity on held-out text, lower is better. Weights left: of the blocks' linears, those that are there and "
        "not zero, counted. MB: all weights of the model, in millions of bytes; of a packed one, as packed. Speed over "
        "the dense model's in the same run, batch 1; the limit is what fewer bytes or operations allow. Time to tune "
        "or prune."
    )
    return _table("models", "Models", columns, rows, note=note, strong=tuple(strong))


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def curve(lines: Sequence[Record], key: str) -> tuple[list[float], list[float]]:
    """The steps at which a figure was logged, and its values."""
    pairs = [(line["step"], number(line, key)) for line in lines]
    return [step for step, value in pairs if value is not None], [value for _, value in pairs if value is not None]


def loss_key(lines: Sequence[Record]) -> str:
    """The figure that is the cross entropy: of a distilled model `loss` is the mixture, and `ce` stands beside it."""
    return "ce" if any("ce" in line for line in lines) else "loss"


def stage_name(run: Run, stage: str, runs: Sequence[Run]) -> str:
    """What the training of a stage is called among those of `runs`."""
    return name_of(run, next((m for m in run.models if m.name == stage), Model(stage, "baseline")), runs)


def training(runs: Sequence[Run]) -> Table:
    """Loss and masks over the steps, at five points of each curve."""
    rows = []
    for run in runs:
        for stage, lines in run.metrics.items():
            name, loss = stage_name(run, stage, runs), loss_key(lines)
            for key, label in {loss: "loss, nats per token", **FIGURES}.items():
                steps, values = curve(lines, key)
                if values:
                    values = smooth(values) if key == loss else values
                    at = [round(point * (len(values) - 1)) for point in POINTS]
                    rows.append((name, label, len(steps), steps[-1], *(values[i] for i in at)))
    points = [
        Column("first", "number"),
        *(Column(f"at {p:.0%}", "number") for p in POINTS[1:-1]),
        Column("last", "number"),
    ]
    columns = (
        Column("training"),
        Column("figure"),
        Column("points", "count"),
        Column("last step", "count"),
        *points,
    )
    note = "Loss: of the training text, mean of the steps around a point. A mask has no more points once it is final."
    return _table("training", "Over the training", columns, rows, note=note)


def smooth(values: Sequence[float]) -> list[float]:
    """The mean of the values around each, a twentieth of all of them; at the ends, of those on one side."""
    reach = len(values) // 40
    sums = list(itertools.accumulate(values, initial=0.0))
    spans = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in spans]


def _share_removed(layers: Sequence[Layer]) -> float | None:
    before = sum(layer.before for layer in layers)
    return 1 - sum(layer.after for layer in layers) / before if before else None


def block_shares(model: Model) -> dict[int, float]:
    """By block, the share of its linears' weights that is gone or zero."""
    blocks: dict[int, list[Layer]] = {}
    for layer in model.layers:
        blocks.setdefault(layer.block, []).append(layer)
    return {block: _share_removed(layers) or 0.0 for block, layers in sorted(blocks.items())}


def by_block(runs: Sequence[Run]) -> Table:
    """What went of each block, a column for each result."""
    shares = {name: block_shares(model) for name, _, model in results(runs) if model.layers}
    blocks = sorted({block for found in shares.values() for block in found})
    rows = [(block, *(found.get(block) for found in shares.values())) for block in blocks]
    columns = (Column("block", "count"), *(Column(name, "share") for name in shares))
    note = "Share of the weights of a block's linears that is gone or zero, counted from shapes and zeros."
    return _table("by-block", "Removed from each block", columns, rows, note=note)


def by_kind(runs: Sequence[Run]) -> Table:
    """Before and after, the linears of one name in all blocks together."""
    rows = []
    for name, _, model in results(runs):
        kinds: dict[str, list[Layer]] = {}
        for layer in model.layers:
            kinds.setdefault(layer.name, []).append(layer)
        for kind, layers in kinds.items():
            shares = [layer.removed for layer in layers]
            sums = (sum(layer.before for layer in layers), sum(layer.after for layer in layers))
            spread = (_share_removed(layers), min(shares), max(shares))
            rows.append((name, kind, len(layers), *_one_shape(layers), *sums, *spread))
    columns = (
        Column("model"),
        Column("linear"),
        Column("blocks", "count"),
        Column("shape before"),
        Column("after"),
        Column("weights before", "count"),
        Column("left", "count"),
        Column("removed", "share"),
        Column("least", "share"),
        Column("most", "share"),
    )
    note = "Shapes are outputs × inputs. Least and most: the share removed in the single blocks."
    return _table("by-kind", "Before and after, by kind of linear", columns, rows, note=note)


def _one_shape(layers: Sequence[Layer]) -> tuple[str | None, str | None]:
    """The shape that all have, or that they differ."""

    def one(shapes: set[tuple[int, int] | None]) -> str | None:
        if None in shapes:
            return None
        return shape(next(iter(shapes))) if len(shapes) == 1 else "differ"  # type: ignore[arg-type]

    return one({layer.shape_before for layer in layers}), one({layer.shape_after for layer in layers})


def every_layer(runs: Sequence[Run]) -> Table:
    """Before and after, every linear of every block."""
    rows = [
        (name, layer.block, layer.name, layer.shape_before, layer.shape_after, layer.before, layer.after, layer.removed)
        for name, _, model in results(runs)
        for layer in model.layers
    ]
    columns = (
        Column("model"),
        Column("block", "count"),
        Column("linear"),
        Column("shape before", "shape"),
        Column("after", "shape"),
        Column("weights before", "count"),
        Column("left", "count"),
        Column("removed", "share"),
    )
    return _table("every-layer", "Before and after, every linear", columns, rows, long=True)


def _whole(record: Mapping[str, Any]) -> float | None:
    """A stage's seconds; one that trained in several processes counts at least all of its steps."""
    found = [number(record, "seconds"), number(record, "training", "seconds")]
    return max((seconds for seconds in found if seconds is not None), default=None)


def stages(runs: Sequence[Run]) -> Table:
    """What each stage of the runs took."""
    rows = [(run.label, clean(stage), _whole(record)) for run in runs for stage, record in run.stages.items()]
    columns = (Column("run"), Column("stage"), Column("time", "seconds"))
    return _table("stages", "Stages", columns, rows)


def commands(runs: Sequence[Run]) -> Table:
    """The exact commands, when they began, and with what; of an older run, what its summary says of versions."""
    rows = []
    for run in runs:
        for line in run.commands or [run.summary]:
            words = line.get("command")
            if isinstance(words, list):
                command: str | None = shlex.join(map(clean, words))
            else:
                command = "(from Python)" if run.commands else None
            with_what = (_pairs(line.get("versions")), _hardware(line.get("hardware")), _text(line.get("commit"), 12))
            if command or any(with_what):
                rows.append((run.label, _text(line.get("started")), command, *with_what))
    columns = [Column(name) for name in ("run", "started")] + [Column("command", "command")]
    columns += [Column(name) for name in ("versions", "hardware", "commit")]
    return _table("commands", "Commands and versions", columns, rows)


def _text(value: Any, length: int | None = None) -> str | None:
    return None if value is None else clean(value)[:length]


def _pairs(value: Any) -> str | None:
    return clean(", ".join(f"{name} {found}" for name, found in value.items())) if isinstance(value, Mapping) else None


def _hardware(value: Any) -> str | None:
    if not isinstance(value, Mapping):
        return None
    threads, gpu = value.get("threads"), value.get("gpu")
    parts = [value.get("cpu"), None if threads is None else f"{threads} of {value.get('cores')} cores", gpu]
    return clean(", ".join(str(part) for part in parts if part is not None)) or None


def summaries(runs: Sequence[Run]) -> Table:
    """The numbers in the summary of a run of unknown kind, as they stand."""
    rows = [
        (run.label, clean(key), value if isinstance(value, int | float) else clean(value))
        for run in runs
        if run.kind == "unknown"
        for key, value in run.summary.items()
        if isinstance(value, int | float | str) and not (isinstance(value, float) and not math.isfinite(value))
    ]
    columns = [Column(name) for name in ("run", "key", "value")]
    return _table("summaries", "Summaries of unknown runs", columns, rows, long=True)
