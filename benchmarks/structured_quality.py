"""Structured pruning on a real model: LLM-Pruner, SliceGPT, LoRAPrune and PAT at equal parameters and equal tokens.

    python benchmarks/structured_quality.py                           hours; stop it at will, the same command goes on
    python benchmarks/structured_quality.py --steps 48 --removed 0.25 --seeds 0 --methods lora llm-pruner loraprune
    python benchmarks/structured_quality.py --jobs 8                  eight at a time, on a GPU; no speed is measured
    python benchmarks/structured_quality.py --speed                   then: how fast what is finished is here
    python benchmarks/structured_quality.py --collect                 csv, picture and table of what is finished
    python benchmarks/structured_quality.py --table                   the table, from structured_quality.csv

Every trial, a method at a share of parameters removed and a seed, is tuned on the same tokens of the demo's text,
exported, loaded again as a stock checkpoint and measured on the same held-out text. PAT's hidden size is the one that
meets the same number of parameters. Each trial is one run folder under --out, and one row of structured_quality.csv.
There is a table for each protocol (another budget or dtype is no comparison); the picture of that name shows the one
with most rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import trials
from csvs import Cell, read_csv
from models import conditions
from pat_quality import recipe_of, run, run_all, speed, speed_on, summary_of, time_alone, times
from trials import add_rows, protocols

from pyprune import data
from pyprune.architectures import describe
from pyprune.cli.demo import DEMO
from pyprune.cli.fields import add_fields
from pyprune.methods import find
from pyprune.models import open_skeleton
from pyprune.plan import Rules, Target, widths_for
from pyprune.runs import Recipe

CSV = Path(__file__).with_name("structured_quality.csv")
COLUMNS = (
    "method removed_requested removed seed perplexity perplexity_dense params bytes hidden heads channels layers "
    "prefill_speedup decode_speedup speed_on peak_training_bytes steps tokens_trained seconds eval_tokens eval_window "
    "dtype date hardware threads torch transformers peft pyprune commit"
)
DEFAULTS = DEMO | {"steps": 600, "warmup": 20, "eval_tokens": None, "save_every": None}
LORA = {name: DEMO[name] for name in ("lora_rank", "lora_alpha", "lora_dropout")}
PROTOCOL = ("steps", "tokens_trained", "eval_tokens", "eval_window", "dtype")  # rows that share it are compared
LABELS = {
    "lora": "LoRA, nothing removed",
    "llm-pruner": "LLM-Pruner, then LoRA",
    "llm-pruner-activation": "LLM-Pruner by activations, then LoRA",
    "slimgpt": "SlimGPT, then LoRA",
    "slicegpt": "SliceGPT, then LoRA",
    "slicegpt-untied": "SliceGPT, head untied, then LoRA",
    "loraprune": "LoRAPrune",
    "loraprune-activation": "LoRAPrune by activations",
    "pat-identity": "PAT (identity)",
    "pat-learned": "PAT (learned basis)",
    "pat-learned-untied": "PAT (learned basis), head untied",
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One method with its options, in the run folder `name`; satisfies what `pat_quality.run` asks."""

    name: str
    label: str
    method: Any
    seed: int
    removed: float


def planned(arguments: argparse.Namespace, dense: Path) -> list[Trial]:
    """What has to be run, each once, seed by seed; LoRA depends on no share."""
    cells = [(label, removed, seed) for seed in arguments.seeds for removed in arguments.removed for label in LABELS]
    found = [trial(*cell, dense) for cell in cells if cell[0] in arguments.methods]
    return list({one.name: one for one in found}.values())


def trial(label: str, removed: float, seed: int, dense: Path) -> Trial:
    """A method that leaves `1 - removed` of the dense model's parameters."""
    target = f"params={1 - removed:g}"
    exact = {"target": target, "round_to": 1}  # so that all of them have the same number of parameters
    if label == "lora":
        return Trial(f"lora-{seed}", label, find("lora")(**LORA), seed, 0)
    name = label.removesuffix("-untied")
    untie = name != label
    if label.startswith("pat-"):
        options = LORA | {"ratio": hidden_ratio(target, untie, dense), "round_to": 1, "untie": untie}
        method = find("pat")(**options, basis=name.removeprefix("pat-"), milestone=DEMO["milestone"])
    else:
        options = {"untie": True} if untie else {}
        name = name.removesuffix("-activation")
        options |= {"criterion": "activation"} if label.endswith("-activation") else {}
        options |= {"mask_every": 2} if name == "loraprune" else {}
        method = find(name)(**LORA, **exact, **options)
    return Trial(f"{label}-{removed:g}-{seed}", label, method, seed, removed)


def hidden_ratio(target: str, untied: bool, dense: Path) -> float:
    """The share of hidden channels to drop for a number of parameters, a head that becomes untied among them."""
    decoder = describe(open_skeleton(dense))
    rules = Rules(("hidden",), round_to=decoder.width_multiple)
    widths = widths_for(decoder, Target.parse(target), rules, untied=untied)
    return 1 - widths.hidden / decoder.hidden_size


# ------------------------------------------------------------------------------------------------------------ the csv


def row(found: Trial, summary: dict[str, Any]) -> dict[str, Any]:
    """One line of the csv."""
    hardware, versions = summary["hardware"], summary["versions"]
    return {
        "method": found.label,
        "removed_requested": found.removed,
        "removed": f"{summary['params_removed']:.4f}",
        "seed": found.seed,
        "perplexity": f"{summary['ppl_pruned']:.4f}",
        "perplexity_dense": f"{summary['ppl_dense']:.4f}",
        "params": summary["params_pruned"],
        "bytes": summary["params_pruned"] * (2 if "16" in summary["dtype"] else 4),
        **{name: summary["widths_pruned"][name] for name in ("hidden", "heads", "channels", "layers")},
        **{f"{phase}_speedup": speed(summary, phase) for phase in ("prefill", "decode")},
        "speed_on": speed_on(summary),
        "peak_training_bytes": summary["peak_bytes"],
        "steps": summary["steps"],
        "tokens_trained": summary["tokens_trained"],
        "seconds": f"{summary['seconds']:.0f}",
        "eval_tokens": summary["evaluation"]["tokens"],
        "eval_window": summary["evaluation"]["window"],
        "dtype": summary["dtype"],
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "hardware": hardware["gpu"] or hardware["cpu"],
        "threads": hardware["threads"],
        **{name: versions[name] for name in ("torch", "transformers", "peft", "pyprune")},
        "commit": (summary["commit"] or "unknown")[:12],
    }


# ------------------------------------------------------------------------------------------- the table and the picture


def tables(cells: Sequence[Cell]) -> str:
    """One table for each protocol."""
    return "\n\n".join(map(table, protocols(cells, PROTOCOL)))


def table(cells: Sequence[Cell]) -> str:
    """Markdown: a line for each method and share, the mean over seeds (with their spread, if there are several).

    Memory is counted otherwise on a GPU than on a CPU, so only trials on the hardware of most rows stand in its column.
    """
    hardware = statistics.mode(c["hardware"] for c in cells)
    lines = [
        "| removed | method | perplexity | parameters | prefill | decode | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for removed, label in sorted({(c["removed_requested"], c["method"]) for c in cells}, key=_order):
        same = [c for c in cells if (c["removed_requested"], c["method"]) == (removed, label)]
        numbers = {key: [float(c[key]) for c in same if _is_number(c[key])] for key in same[0]}
        mean = {key: statistics.mean(values) for key, values in numbers.items() if values}  # not all were timed
        spread = f" ± {statistics.stdev(float(c['perplexity']) for c in same):.2f}" if len(same) > 1 else ""
        figures = [
            f"{mean['removed']:.1%}",
            LABELS[label],
            f"{mean['perplexity']:.2f}{spread}",
            f"{mean['params'] / 1e6:.1f} M",
            *(times(mean.get(f"{phase}_speedup", "")) for phase in ("prefill", "decode")),
            _gibibytes([float(c["peak_training_bytes"]) for c in same if c["hardware"] == hardware]),
        ]
        lines.append(f"| {' | '.join(figures)} |")
    elsewhere = [
        f"{LABELS[c['method']]} at {float(c['removed_requested']):.0%}, seed {c['seed']}, on {c['hardware']}"
        for c in cells
        if c["hardware"] != hardware
    ]
    first, timed = cells[0], dict.fromkeys(c["speed_on"] for c in cells if c["speed_on"])
    lines.append(
        f"\nSmolLM2-135M-Instruct (4-bit-rounded weights), dense {float(first['perplexity_dense']):.2f}; every method "
        f"tuned on {int(first['tokens_trained']):,} tokens ({first['steps']} steps), {first['dtype']}; perplexity on "
        f"{int(first['eval_tokens']):,} held-out tokens, window {first['eval_window']}; seeds "
        f"{', '.join(sorted({c['seed'] for c in cells}))}; {hardware}"
        f"{' (' + '; '.join(elsewhere) + ')' if elsewhere else ''}."
        f"{' Speed beside the dense model: ' + '; '.join(timed) + '.' if timed else ''}"
    )
    return "\n".join(lines)


def _order(key: tuple[str, str]) -> tuple[float, int]:
    return float(key[0]), list(LABELS).index(key[1])


def _gibibytes(sizes: Sequence[float]) -> str:
    return f"{statistics.mean(sizes) / 2**30:.2f} GiB" if sizes else ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def picture(cells: Sequence[Cell], path: Path) -> None:
    """Perplexity over the share of parameters removed, a line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for label in LABELS:
        mine = [c for c in cells if c["method"] == label]
        shares = sorted({c["removed_requested"] for c in mine}, key=float)
        points = [
            [statistics.mean(float(c[key]) for c in mine if c["removed_requested"] == share) for share in shares]
            for key in ("removed", "perplexity")
        ]
        if mine and label == "lora":
            axes.axhline(points[1][0], color="gray", linestyle="-.", label=f"{LABELS[label]}: {points[1][0]:.1f}")
        elif mine:
            axes.plot([100 * x for x in points[0]], points[1], marker="o", linewidth=2, label=LABELS[label])
    axes.set_yscale("log")
    axes.set_xlabel("parameters removed (%)")
    axes.set_ylabel(f"perplexity, {int(cells[0]['eval_tokens']):,} held-out tokens")
    axes.set_title(
        f"SmolLM2-135M (4-bit-rounded), {int(cells[0]['tokens_trained']):,} tokens of tuning each", fontsize=11
    )
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    figure.savefig(path, dpi=160)
    pyplot.close(figure)


def main() -> None:
    """Runs what is not done yet, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of structured_quality.csv, run nothing")
    parser.add_argument("--speed", action="store_true", help="time what is finished, train nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/structured_quality"), help="where the run folders are")
    parser.add_argument("--model", type=Path, help="folder of the demo's model (default: made under --out)")
    parser.add_argument(
        "--removed", type=float, nargs="+", default=[0.20, 0.25, 0.30, 0.50], help="shares of parameters"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(LABELS), choices=list(LABELS))
    trials.add_options(parser)
    add_fields(parser, Recipe, {name: value for name, value in DEFAULTS.items() if name != "seed"})
    arguments = parser.parse_args()
    if arguments.table:
        print(tables(read_csv(CSV, COLUMNS.split())))
        return
    print(conditions(trials.set_threads(arguments)))
    dense = arguments.model or arguments.out / "dense"
    if not dense.exists():
        data.demo_model(dense)
    chosen, recipe = planned(arguments, dense), recipe_of(arguments)
    if arguments.one:
        run([trial for trial in chosen if trial.name in arguments.one], dense, recipe, arguments.out)
        return
    arguments.collect |= arguments.speed
    missing = run_all(chosen, dense, recipe, arguments)
    if arguments.speed:
        time_alone([trial for trial in chosen if trial.name not in missing], dense, arguments.out)
    found = [(trial, summary_of(trial.name, arguments.out)) for trial in chosen]
    if rows := [row(trial, summary) for trial, summary in found if summary]:
        cells = add_rows(rows, CSV, ("method", "removed_requested", "seed", *PROTOCOL))
        picture(protocols(cells, PROTOCOL)[0], CSV.with_suffix(".png"))
        print(tables(cells))
    trials.finish(missing, arguments.out)


if __name__ == "__main__":
    main()
