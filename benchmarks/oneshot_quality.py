"""The quality of one-shot pruning on a real model: perplexity of every method at several sparsities, one table.

    python benchmarks/oneshot_quality.py                 an hour and more; stop it at will, the same command goes on
    python benchmarks/oneshot_quality.py --table         the table of docs/oneshot.md, from oneshot_quality.csv
    python benchmarks/oneshot_quality.py --methods wanda --levels 0.5 2:4
    python benchmarks/oneshot_quality.py --jobs 12       twelve at a time, on a GPU
    python benchmarks/oneshot_quality.py --collect       csv, picture and table of the trials that are finished

All methods prune the demo's model on the same calibration windows and are measured on the same held-out text. Sparsity
is counted from the zeros of the blocks' linears. Each trial is kept under --out as soon as it is done, and its blocks
while it runs. The result goes to oneshot_quality.csv, one row for each trial, a table for each protocol (another
dtype, say), and to the picture oneshot_quality.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import trials
from csvs import Cell, read_csv
from models import conditions
from torch import Tensor
from trials import add_rows, protocols

from pyprune import data, evaluation
from pyprune.blockwise import prune
from pyprune.cli.fields import add_fields, from_fields
from pyprune.data import TokenStream
from pyprune.methods import find
from pyprune.models import open_model, open_tokenizer
from pyprune.oneshot import Recipe, calibration_batches
from pyprune.reconstruction import Reconstruction
from pyprune.runs import environment, write_json

CSV = Path(__file__).with_name("oneshot_quality.csv")
COLUMNS = (
    "method level sparsity perplexity calibration eval_tokens eval_window dtype seed date hardware threads torch "
    "transformers pyprune commit options"
)
DEFAULTS = {"calibration_windows": 32, "calibration_window": 512, "eval_window": 512, "eval_tokens": 16384}
DEFAULTS |= {"dtype": "bfloat16"}
LEVELS = ("0.5", "0.6", "0.7", "2:4")
# name -> (method, options)
TRIALS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("magnitude", {}),
    "wanda": ("wanda", {}),
    "wanda-owl": ("wanda", {"allocation": "owl"}),
    "sparsegpt": ("sparsegpt", {}),
    "admm": ("admm", {}),
    "alps": ("alps", {}),
    "besa": ("besa", {}),
    "besa-reconstructed": ("besa", {}),
    "wanda-reconstructed": ("wanda", {}),
}
LABELS = {
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "wanda-owl": "Wanda + OWL",
    "sparsegpt": "SparseGPT",
    "admm": "ADMM",
    "alps": "ALPS",
    "besa": "BESA",
    "besa-reconstructed": "BESA + reconstruction",
    "wanda-reconstructed": "Wanda + reconstruction",
}

PROTOCOL = ("dtype", "calibration", "eval_tokens", "eval_window", "seed")  # rows that share it are compared


@dataclasses.dataclass(frozen=True)
class Trial:
    """One method at one level: a sparsity, or N:M."""

    name: str
    level: str

    @property
    def file(self) -> str:
        """The name of its record."""
        return self.name if self == DENSE else f"{self.name}-{self.level.replace(':', 'of')}"

    @property
    def then(self) -> list[Any]:
        """The steps behind the method."""
        return [Reconstruction()] if self.name.endswith("-reconstructed") else []

    def method(self) -> Any:
        """The method with its options."""
        method, options = TRIALS[self.name]
        if ":" not in self.level:
            return find(method)(sparsity=float(self.level), **options)
        n, m = map(int, self.level.split(":"))
        return find(method)(sparsity=1 - n / m, pattern=self.level, **options)


DENSE = Trial("dense", "0")


def planned(names: Sequence[str], levels: Sequence[str]) -> list[Trial]:
    """Level by level. OWL and BESA spread a sparsity unevenly, which N:M does not allow."""
    return [
        Trial(name, level)
        for level in levels
        for name in names
        if not (":" in level and name.startswith(("wanda-owl", "besa")))
    ]


def run_all(chosen: Sequence[Trial], dense: Path, recipe: Recipe, out: Path) -> None:
    """Works through trials."""
    tokenizer, corpus = open_tokenizer(dense), data.demo_text()
    calibration = calibration_batches(corpus.calibration, tokenizer, recipe)
    text = data.encode(corpus.held_out, tokenizer)
    for trial in chosen:
        run(trial, dense, calibration, text, recipe, out / f"{trial.file}.json")


def run(
    trial: Trial, dense: Path, calibration: Sequence[Tensor], text: TokenStream, recipe: Recipe, path: Path
) -> None:
    """Writes the record of one trial."""
    model, blocks = open_model(dense, recipe.dtype), path.with_suffix("")
    if trial == DENSE:
        found = {"method": "dense", "level": "0", "options": "", "sparsity": 0}
        write_json(path, found | {"perplexity": measure(model, text, recipe)} | environment())
        return
    method = trial.method()
    pruned = prune(
        model,
        method,
        calibration,
        then=trial.then,
        folder=blocks,
        keep=recipe.keep,  # type: ignore[arg-type]
        progress=True,
    )
    record = {
        **{"method": trial.name, "level": trial.level, "options": ", then ".join(map(repr, (method, *trial.then)))},
        **{"sparsity": pruned.sparsity, "zeros": pruned.zeros, "size": pruned.size},
        **{"perplexity": measure(model, text, recipe)},
    }
    write_json(path, record | environment())
    shutil.rmtree(blocks, ignore_errors=True)


def measure(model: Any, text: TokenStream, recipe: Recipe) -> float:
    """Perplexity on the held-out text."""
    ids = text.ids[: recipe.eval_tokens]
    return evaluation.perplexity(model, ids, recipe.eval_window, bos=text.bos, progress=True).value


def check(path: Path, protocol: str) -> None:
    """Ends when the trials of a folder were measured in another way: no comparison."""
    if path.exists() and path.read_text() != protocol:
        raise SystemExit(f"{path.parent} holds trials of {path.read_text()}, not of {protocol}; name another --out")
    path.write_text(protocol)


def rows(records: Sequence[dict[str, Any]], recipe: Recipe) -> list[dict[str, Any]]:
    """What the csv has of each record, and beside it what it was measured with."""
    shared = {
        "calibration": f"{recipe.calibration_windows}x{recipe.calibration_window}",
        "eval_tokens": recipe.eval_tokens,
        "eval_window": recipe.eval_window,
        "dtype": recipe.dtype,
        "seed": recipe.seed,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    return [
        {
            "method": record["method"],
            "level": record["level"],
            "sparsity": f"{record['sparsity']:.6f}",
            "perplexity": f"{record['perplexity']:.4f}",
            **shared,
            "hardware": record["hardware"]["gpu"] or record["hardware"]["cpu"],
            "threads": record["hardware"]["threads"],
            **{name: record["versions"][name] for name in ("torch", "transformers", "pyprune")},
            "commit": (record["commit"] or "unknown")[:12],
            "options": record["options"],
        }
        for record in records
    ]


# ------------------------------------------------------------------------------------------- the table and the picture


def tables(cells: Sequence[Cell]) -> str:
    """One table for each protocol."""
    return "\n\n".join(map(table, protocols(cells, PROTOCOL)))


def table(cells: Sequence[Cell]) -> str:
    """Markdown: a line for each method, a column of perplexity for each level, and below it the protocol."""
    levels = sorted(
        {cell["level"] for cell in cells if cell["method"] != "dense"}, key=lambda level: (":" in level, level)
    )
    dense = next(cell for cell in cells if cell["method"] == "dense")
    found = {(cell["method"], cell["level"]): float(cell["perplexity"]) for cell in cells}
    names = [name for name in LABELS if any(key[0] == name for key in found)]
    best = {level: min(value for (_, other), value in found.items() if other == level) for level in levels}

    def shown(name: str, level: str) -> str:
        if (name, level) not in found:
            return ""
        value = found[name, level]
        text = f"{value:.1f}" if value < 1000 else f"{value:,.0f}"
        return f"**{text}**" if value == best[level] else text

    head = ["", *(level if ":" in level else f"{float(level):.0%}" for level in levels)]
    body = [[LABELS[name], *(shown(name, level) for level in levels)] for name in names]
    text = ["| " + " | ".join(line) + " |" for line in (head, ["---", *["---:"] * len(levels)], *body)]
    calibration = "{} windows of {} tokens".format(*dense["calibration"].split("x"))
    return "\n".join(
        [
            *text,
            "",
            f"{data.DEMO_MODEL}; dense: {float(dense['perplexity']):.1f}. Perplexity on {int(dense['eval_tokens']):,} "
            f"held-out tokens, windows of {dense['eval_window']} without overlap; calibration: {calibration}; both "
            f"from {data.DEMO_TEXT}. {dense['dtype']}, seed {dense['seed']}, {dense['date']}.",
        ]
    )


def picture(cells: Sequence[Cell], path: Path) -> None:
    """Perplexity, logarithmic, over sparsity: a line for each method, crosses for 2:4."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5.2), layout="constrained")
    first, *others = protocols(cells, PROTOCOL)
    for name, label in LABELS.items():
        measured = next((part for part in (first, *others) if any(c["method"] == name for c in part)), None)
        if measured is None:
            continue
        if measured is not first:
            label += f" ({measured[0]['dtype']})"
        points = [
            (":" in c["level"], 100 * float(c["sparsity"]), float(c["perplexity"]))
            for c in measured
            if c["method"] == name
        ]
        line = sorted((sparsity, perplexity) for grouped, sparsity, perplexity in points if not grouped)
        (drawn,) = axes.plot(*zip(*line, strict=True), marker="o", label=label) if line else (None,)
        for grouped, sparsity, perplexity in points:
            if grouped:
                axes.plot(sparsity, perplexity, marker="x", linestyle="", color=drawn.get_color() if drawn else None)
    dense = next(cell for cell in first if cell["method"] == "dense")
    axes.axhline(float(dense["perplexity"]), color="gray", linestyle=":", label="dense")
    axes.set_yscale("log")
    axes.set_xlabel("weights removed from the blocks' linears (%); crosses: 2:4")
    axes.set_ylabel(f"perplexity, {int(dense['eval_tokens']):,} held-out tokens")
    axes.set_title("SmolLM2-135M (4-bit-rounded), pruned without training", fontsize=11)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=160)
    pyplot.close(figure)


def main() -> None:
    """Runs what is not done yet, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of oneshot_quality.csv and run nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/oneshot_quality"), help="where the trials are kept")
    parser.add_argument("--model", type=Path, help="folder of the demo's model (default: made under --out)")
    parser.add_argument("--methods", nargs="+", default=list(TRIALS), choices=list(TRIALS))
    parser.add_argument("--levels", nargs="+", default=list(LEVELS), help="sparsities and N:M patterns")
    trials.add_options(parser)
    add_fields(parser, Recipe, DEFAULTS)
    arguments = parser.parse_args()
    if arguments.table:
        print(tables(read_csv(CSV, COLUMNS.split())))
        return
    print(conditions(trials.set_threads(arguments)))
    recipe: Recipe = from_fields(Recipe, arguments)
    out, dense = arguments.out, arguments.model or arguments.out / "dense"
    chosen = [DENSE, *planned(arguments.methods, arguments.levels)]
    if arguments.one:
        run_all([trial for trial in chosen if trial.file in arguments.one], dense, recipe, out)
        return
    out.mkdir(parents=True, exist_ok=True)
    check(out / "protocol.txt", repr(recipe))

    def result(name: str) -> str | None:
        path = out / f"{name}.json"
        return f"perplexity {json.loads(path.read_text())['perplexity']:.2f}" if path.exists() else None

    names = [trial.file for trial in chosen]
    if arguments.collect:
        missing = [name for name in names if result(name) is None]
    else:
        if not dense.exists():
            data.demo_model(dense)
        missing = trials.run(names, result, out / "logs", arguments.jobs)
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(out.glob("*.json"))]
    if DENSE.file not in missing:
        cells = add_rows(rows(records, recipe), CSV, ("method", "level", *PROTOCOL))
        picture(cells, CSV.with_suffix(".png"))
        print(tables(cells))
    trials.finish(missing, out)


if __name__ == "__main__":
    main()
