"""Run folders as plain data, as far as they go: what is missing or broken becomes a line of `Run.problems`.

Everything is read from the records that a run leaves (pyprune/runs.py, pyprune/oneshot.py); no weight is opened, and
neither torch nor transformers is needed. Strings come from files that anyone may have written: they are cleaned of
control characters here, and escaped where they are shown.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Record = dict[str, Any]
Role = Literal["dense", "baseline", "result"]

NEEDED = "pip install pyprune[report]"  # what brings matplotlib and jinja2
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
LARGEST = 1e30  # of a figure; what is beyond, NaN and infinity are no figures
SAME_DENSE = 0.01  # two runs are of one dense model on one text when its perplexities differ by less than this share


class ReportError(ValueError):
    """There is nothing to report on."""


@dataclass(frozen=True)
class Layer:
    """One linear of a block. `before`, `after`: its weights, and those that are left and not zero; shapes [out, in]
    where the run recorded them."""

    block: int
    name: str
    before: int
    after: int
    shape_before: tuple[int, int] | None = None
    shape_after: tuple[int, int] | None = None

    @property
    def removed(self) -> float:
        """The share of its weights that is gone or zero."""
        return 1 - self.after / self.before


@dataclass
class Model:
    """A model that a run measured: the dense one, a baseline, or a result. What was not measured is None.

    Attributes:
        bytes: of all weights. left: share of the weights of the blocks' linears that is left and not zero.
        prefill, decode: speed over that of the dense model; `*_limit`: what the fewer bytes or operations allow.
        seconds: to tune or prune.
    """

    name: str
    role: Role
    perplexity: float | None = None
    params: float | None = None
    bytes: float | None = None
    left: float | None = None
    prefill: float | None = None
    prefill_limit: float | None = None
    decode: float | None = None
    decode_limit: float | None = None
    seconds: float | None = None
    layers: list[Layer] = field(default_factory=list)


@dataclass
class Run:
    """One run folder. `metrics`: by stage, its lines in the order of the steps. `protocol`: the tokens, window and
    stride that perplexity was measured with."""

    folder: Path
    label: str
    kind: str = "unknown"
    state: str = "unknown"
    problems: list[str] = field(default_factory=list)
    config: Record = field(default_factory=dict)
    summary: Record = field(default_factory=dict)
    stages: dict[str, Record] = field(default_factory=dict)
    metrics: dict[str, list[Record]] = field(default_factory=dict)
    commands: list[Record] = field(default_factory=list)
    models: list[Model] = field(default_factory=list)
    protocol: dict[str, float] = field(default_factory=dict)

    @property
    def dense(self) -> Model | None:
        """The dense model, if it was measured."""
        return next((model for model in self.models if model.role == "dense"), None)

    @property
    def results(self) -> list[Model]:
        """What the run made; a comparison has several."""
        return [model for model in self.models if model.role == "result"]


# ------------------------------------------------------------------------------------------------------- single values


def number(record: Any, *path: str) -> float | None:
    """The number at `path` in nested dictionaries; None when there is none, or one that nothing can have measured."""
    for key in path:
        record = record.get(key) if isinstance(record, dict) else None
    if not isinstance(record, int | float) or isinstance(record, bool) or not abs(record) <= LARGEST:
        return None
    return float(record)


def _perplexity(record: Any, *path: str) -> float | None:
    """As `number`; nothing below one is a perplexity."""
    value = number(record, *path)
    return value if value is None or value >= 1 else None


def clean(value: Any) -> str:
    """Any value as one line of text without control characters."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(str(value).split()))


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _times(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a * b


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


# --------------------------------------------------------------------------------------------------------------- files


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs, each once, and what is wrong with the folders that are none.

    Raises:
        ReportError: no folder can be read; the reasons are named.
    """
    runs, refused = [], []
    for folder in dict.fromkeys(path.resolve() for path in folders):
        reason = _refusal(folder)
        if reason:
            refused.append(f"{clean(folder)}: {reason}")
        else:
            runs.append(_read(folder))
    if not runs:
        raise ReportError("; ".join(refused) or "no run folder was given")
    _label(runs)
    return runs, refused


def _refusal(folder: Path) -> str | None:
    if not folder.exists():
        return "there is no such folder; name a run folder, what --out was"
    if not folder.is_dir():
        return "is a file; name a run folder, what --out was"
    if not any((folder / name).exists() for name in ("config.json", "summary.json", "metrics.jsonl", "stages")):
        inner = sorted(path.parent.name for path in folder.glob("*/config.json") if (path.parent / "stages").exists())
        hint = f"; it holds the run folders {', '.join(inner[:5])}: name those" if inner else ""
        return f"is no run folder (neither config.json, summary.json, metrics.jsonl nor stages/){clean(hint)}"
    if any(folder.glob("*.safetensors")):
        return f"is a model, not a run; name the run folder, what --out was (perhaps {clean(folder.parent)})"
    return None


def _label(runs: list[Run]) -> None:
    """Names folders apart by as few of their last parts as that takes."""
    for count in range(1, max(len(run.folder.parts) for run in runs) + 1):
        for run in runs:
            run.label = clean("/".join(run.folder.parts[-count:]))
        if len({run.label for run in runs}) == len(runs):
            return


def _read(folder: Path) -> Run:
    run = Run(folder, clean(folder.name))
    run.config = _json(run, "config.json") or {}
    run.summary = _json(run, "summary.json") or {}
    run.stages = _stages(run, "stages")
    run.commands = _lines(run, "commands.jsonl")
    for line in _metrics(run):
        run.metrics.setdefault(clean(line["stage"]), []).append(line)
    if not run.config:
        run.problems.append("config.json is missing, so the options of the run are not known")
    run.kind = _kind(run)
    _KINDS[run.kind](run)
    return run


def _json(run: Run, name: str) -> Record | None:
    """An object from a file of the run; None when there is no such file, or, with a problem noted, no such object."""
    path = run.folder / name
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        run.problems.append(f"{clean(name)} cannot be read and is left out: {clean(error)}")
        return None
    if not isinstance(found, dict):
        run.problems.append(f"{clean(name)} holds no JSON object and is left out")
        return None
    return found


def _stages(run: Run, name: str) -> dict[str, Record]:
    """The records by their stages. Each has `seconds` (pyprune/runs.py); what has none was not written by a run."""
    records = {}
    for path in sorted((run.folder / name).glob("*.json")):
        record = _json(run, f"{name}/{path.name}")
        if record is not None and "seconds" not in record:
            run.problems.append(
                f"{clean(name)}/{clean(path.name)} is no record of a stage (it has no `seconds`) and is left out"
            )
        elif record is not None:
            records[path.stem] = record
    return records


def _lines(run: Run, name: str) -> list[Record]:
    """The objects of a file with one on each line. Lines that hold none are counted, and the first is named."""
    path = run.folder / name
    if not path.exists():
        return []
    found, bad = [], []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        run.problems.append(f"{name} cannot be read and is left out: {clean(error)}")
        return []
    for place, line in enumerate(lines, 1):
        try:
            value = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            value = line
        if isinstance(value, dict):
            found.append(value)
        elif value is not None:
            bad.append(place)
    if bad:
        count = "1 line is" if len(bad) == 1 else f"{len(bad)} lines are"
        run.problems.append(f"{name}: {count} not JSON objects and left out, the first is line {bad[0]}")
    return found


def _metrics(run: Run) -> list[Record]:
    """The lines of metrics.jsonl by rising step; of two of one step, the later."""
    lines = _lines(run, "metrics.jsonl")
    good = {
        (line["stage"], line["step"]): line
        for line in lines
        if isinstance(line.get("stage"), str) and number(line, "step") is not None
    }
    unnamed = sum(not isinstance(line.get("stage"), str) or number(line, "step") is None for line in lines)
    if unnamed:
        run.problems.append(f"metrics.jsonl: {unnamed} lines name no stage or step and are left out")
    return sorted(good.values(), key=lambda line: line["step"])


# ------------------------------------------------------------------------------------------------------- kinds of runs


def _kind(run: Run) -> str:
    """By the command that is in the configuration or, in runs from Python, by the stages."""
    by_command = {"tune": "tuning", "demo": "tuning", "compare": "comparison"}
    command = run.config.get("command")
    if isinstance(command, str) and command in by_command:
        return by_command[command]
    for kind, stages in (("cut", {"cut"}), ("one-shot", {"prune"}), ("tuning", {"reload", "speed"})):
        if stages & run.stages.keys():
            return kind
    if command == "prune":
        return "cut" if "calibration_windows" not in run.config else "one-shot"
    return "comparison" if isinstance(run.summary.get("methods"), list) else _by_summary(run.summary)


def _by_summary(summary: Record) -> str:
    if "ppl_tuned_dense" in summary:
        return "tuning"
    return "one-shot" if "zeros" in summary else "cut" if "params_pruned" in summary else "unknown"


def _state(run: Run, expected: Sequence[str], done: Iterable[str]) -> None:
    """Finished, or how far it has come."""
    if run.summary:
        run.state = "finished"
        return
    done = set(done)
    missing = [name for name in expected if name not in done]
    run.state = f"unfinished: {len(expected) - len(missing)} of {len(expected)} stages done"
    if missing:
        run.state += f", next is {clean(missing[0])}{_progress(run, missing[0])}"
    if not (run.folder / "summary.json").exists():  # otherwise it was named as broken
        run.problems.append(f"summary.json is missing: the run is {run.state}")


def _progress(run: Run, stage: str) -> str:
    lines, steps = run.metrics.get(stage), number(run.config, "steps")
    return f" at step {lines[-1]['step']:.0f}{f' of {steps:.0f}' if steps else ''}" if lines else ""


def _tuning(run: Run) -> None:
    summary, method = run.summary, clean(run.config.get("method") or run.summary.get("method") or "result")
    names = run.config.get("baselines")
    baselines = [clean(name) for name in names] if isinstance(names, list) else []
    _state(run, ["dense", *baselines, method, "reload", "speed"], run.stages)
    dense = run.stages.get("dense") or _of_summary(summary, "dense")
    if dense:
        run.models.append(_model("dense", "dense", dense, summary))
    for name, key in (("lora", "ppl_tuned_dense"), ("prune-then-tune", "ppl_prune_then_tune")):
        record = run.stages.get(name)
        if record is None and number(summary, key) is not None:
            record = {"perplexity": {"value": summary[key]}}
        if record is not None and name != method:
            model = _model(name, "baseline", record, summary)
            model.left = _ratio(number(record, "block_params"), number(dense, "block_params"))
            run.models.append(model)
    trained = run.stages.get(method, {})
    pruned = run.stages.get("reload") or _of_summary(summary, "pruned") or trained
    if pruned:
        model = _model(method, "result", pruned, summary)
        model.layers = _shrunk(run, dense, trained, trained.get("zeros"))
        blocks = _ratio(number(pruned, "block_params"), number(dense, "block_params"))
        model.left = _first(_left(model.layers), blocks)
        model.seconds = number(trained, "training", "seconds") or number(summary, "seconds")
        speed = run.stages.get("speed", {}).get("speedup")
        for side in ("prefill", "decode"):
            for name in (side, f"{side}_limit"):
                in_summary = f"{side}_speedup{name.removeprefix(side)}"
                setattr(model, name, _first(number(speed, name), number(summary, in_summary)))
        run.models.append(model)
    _protocol(run, pruned or dense, summary.get("evaluation"))


def _of_summary(summary: Record, side: str) -> Record:
    """What a stage's record would say, as far as the summary has it."""
    keys = {"params": f"params_{side}", "block_params": f"block_params_{side}"}
    found = {name: summary[key] for name, key in keys.items() if key in summary}
    perplexity = _perplexity(summary, f"ppl_{side}")
    return found | ({} if perplexity is None else {"perplexity": {"value": perplexity}})


def _model(name: str, role: Role, record: Record, summary: Record) -> Model:
    """What the record of a stage says of a model."""
    params, dtype = number(record, "params"), record.get("dtype") or summary.get("dtype")
    size = DTYPE_BYTES.get(dtype) if isinstance(dtype, str) else None
    return Model(
        name,
        role,
        perplexity=_perplexity(record, "perplexity", "value"),
        params=params,
        bytes=_first(number(record, "bytes"), _times(params, size)),
        left=1.0 if role == "dense" else None,
        seconds=number(record, "training", "seconds"),
    )


def _oneshot(run: Run) -> None:
    summary, name = run.summary, clean(run.config.get("method") or run.summary.get("method") or "result")
    name += " + reconstruction" if run.config.get("reconstruct") is True else ""
    _state(run, ["prune", "reload"] if run.config.get("eval_data") else ["prune"], run.stages)
    pruned = run.stages.get("prune") or summary
    dense = run.stages.get("dense") or _of_summary(summary, "dense")
    run.models.append(Model("dense", "dense", _perplexity(dense, "perplexity", "value"), left=1.0))
    run.models[0].bytes = number(pruned, "bytes_dense")
    partial = [] if pruned else [record for record in map(_block_file(run), _block_files(run)) if record]
    blocks = pruned.get("blocks") if pruned else partial
    after = run.stages.get("reload") or _of_summary(summary, "pruned")
    run.models.append(_zeroed(run, name, pruned, after, blocks))
    if partial:
        run.problems.append(f"pruning was stopped behind {len(partial)} blocks; the figures of these are shown")
    _protocol(run, after or dense, summary.get("evaluation"))


def _block_files(run: Run) -> list[Path]:
    """The records of the blocks that an unfinished run has done."""
    return sorted((run.folder / "blocks").glob("[0-9]*.json"), key=lambda path: int(path.stem))


def _block_file(run: Run) -> Any:
    return lambda path: _json(run, f"blocks/{path.name}")


def _zeroed(run: Run, name: str, pruned: Record, after: Record, blocks: Any) -> Model:
    """The result of a one-shot method."""
    sparsity = number(pruned, "sparsity")
    layers = _with_zeros(run, blocks)
    return Model(
        name,
        "result",
        perplexity=_perplexity(after, "perplexity", "value"),
        bytes=number(pruned, "bytes_packed"),
        left=_first(None if sparsity is None else 1 - sparsity, _left(layers)),
        seconds=number(pruned, "seconds"),
        layers=layers,
    )


def _cut(run: Run) -> None:
    summary, name = run.summary, clean(run.config.get("method") or run.summary.get("method") or "result")
    measured = "eval_data" in run.config and run.config["eval_data"] is not None
    _state(run, ["cut", "measure"] if measured else ["cut"], run.stages)
    cut, found = run.stages.get("cut", {}), run.stages.get("measure") or summary
    before, after = (cut.get(side) or _of_summary(cut or summary, side) for side in ("dense", "pruned"))
    for side, label, role, record in (("dense", "dense", "dense", before), ("pruned", name, "result", after)):
        if record:
            model = _model(label, role, record, summary)  # type: ignore[arg-type]
            model.perplexity = _perplexity(found, f"ppl_{side}")
            run.models.append(model)
    if run.results:
        result = run.results[0]
        result.layers = _shrunk(run, before, after, None)
        blocks = _ratio(number(after, "block_params"), number(before, "block_params"))
        result.left, result.seconds = _first(_left(result.layers), blocks), number(cut, "seconds")
    window = number(run.config, "eval_window")
    if (tokens := number(found, "eval_tokens")) is not None and window is not None:
        run.protocol = {"tokens": tokens, "window": window, "stride": window}


def _comparison(run: Run) -> None:
    chosen, listed = run.config.get("methods"), run.summary.get("methods")
    rows = {
        clean(row["method"]): row
        for row in (listed if isinstance(listed, list) else [])
        if isinstance(row, dict) and "method" in row
    }
    names = [clean(name) for name in chosen] if isinstance(chosen, dict) else list(rows)
    stages = {name: _stages(run, f"{name}/stages") if _is_plain(name) else {} for name in names}
    done = [*run.stages, *(f"{name}/{stage}" for name in names for stage in stages[name])]
    expected = [stage for name in names for stage in (f"{name}/prune", f"{name}/reload", f"{name}-speed")]
    _state(run, ["dense", *expected], done)
    dense, in_summary = run.stages.get("dense", {}), run.summary.get("dense")
    perplexity = _first(_perplexity(dense, "perplexity", "value"), _perplexity(in_summary, "perplexity"))
    run.models.append(Model("dense", "dense", perplexity, left=1.0))
    run.models[0].bytes = number(in_summary, "bytes")
    for name in names:
        pruned, after, row = stages[name].get("prune", {}), stages[name].get("reload", {}), rows.get(name, {})
        if not pruned and not row:
            continue
        model = _zeroed(run, name, pruned or row | {"bytes_packed": row.get("bytes")}, after, pruned.get("blocks"))
        model.perplexity = _first(model.perplexity, _perplexity(row, "perplexity"))
        model.decode = _first(number(run.stages.get(f"{name}-speed"), "decode_speedup"), number(row, "decode_speedup"))
        run.models[0].bytes = _first(run.models[0].bytes, number(pruned, "bytes_dense"))
        run.models.append(model)
    _protocol(run, dense, run.summary.get("evaluation"))


def _is_plain(name: str) -> bool:
    """Whether a name from a file is that of a folder inside the run, and leads nowhere else."""
    return re.fullmatch(r"[\w-]+", name) is not None


def _unknown(run: Run) -> None:
    command = run.config.get("command")
    what = "names no command" if command is None else f"is of the command {clean(command)!r}"
    run.problems.append(
        f"a run of a kind that this version does not know (its config.json {what}): its options, its training curves "
        "and the numbers of its summary are shown as they stand"
    )
    run.state = "finished" if run.summary else "unknown"


_KINDS = {"tuning": _tuning, "one-shot": _oneshot, "cut": _cut, "comparison": _comparison, "unknown": _unknown}


def _protocol(run: Run, record: Record, evaluation: Any) -> None:
    keys = ("tokens", "window", "stride")
    found = {key: _first(number(record, "perplexity", key), number(evaluation, key)) for key in keys}
    run.protocol = {key: value for key, value in found.items() if value is not None}


# -------------------------------------------------------------------------------------------------------------- layers


def _place(name: str) -> tuple[int, str] | None:
    """Block and name inside it, of a linear's name in the model."""
    match = re.search(r"\.(\d+)\.(.+)", name)
    return (int(match[1]), clean(match[2])) if match else None


def _shape(value: Any) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value):
        return value[0], value[1]
    return None


def _shrunk(run: Run, before: Record, after: Record, zeros: Any) -> list[Layer]:
    """The linears of a model whose shapes became smaller, or, with counted zeros, that was masked."""
    dense, left = before.get("linears"), after.get("linears")
    if not isinstance(dense, dict) or not isinstance(left, dict):
        return []
    if dense.keys() != left.keys():
        run.problems.append(
            "whole blocks are gone, and those behind them have new numbers: no table of layers before and after"
        )
        return []
    layers = []
    for name, value in dense.items():
        place, old, new = _place(name), _shape(value), _shape(left[name])
        if place and old and new:
            kept = math.prod(new) - int(number(zeros, name) or 0)
            layers.append(Layer(*place, math.prod(old), max(kept, 0), old, new))
    return layers


def _with_zeros(run: Run, blocks: Any) -> list[Layer]:
    """The linears of a model that lost single weights, from the records of its blocks."""
    layers = []
    for index, block in enumerate(blocks if isinstance(blocks, list) else []):
        sizes, zeros = (block.get(key) if isinstance(block, dict) else None for key in ("sizes", "zeros"))
        for name in sizes if isinstance(sizes, dict) else []:
            size, gone = number(sizes, name), number(zeros, name)
            if size and gone is not None and 0 <= gone <= size:
                layers.append(Layer(index, clean(name), int(size), int(size - gone)))
    return layers


def _left(layers: list[Layer]) -> float | None:
    return _ratio(sum(layer.after for layer in layers), sum(layer.before for layer in layers)) if layers else None


# ------------------------------------------------------------------------------------------------------ what compares


def comparable(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs in groups within which perplexities may be compared: measured with the same protocol, and the dense
    model has the same perplexity, to a hundredth (dtypes differ by less)."""
    groups: list[list[Run]] = []
    for run in runs:
        group = next((group for group in groups if _compares(group[0], run)), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    return groups


def _compares(a: Run, b: Run) -> bool:
    perplexities = [run.dense.perplexity if run.dense else None for run in (a, b)]
    if a.protocol != b.protocol or not a.protocol or None in perplexities:
        return False
    x, y = perplexities
    return abs(x - y) <= SAME_DENSE * min(x, y)  # type: ignore[operator, type-var]
