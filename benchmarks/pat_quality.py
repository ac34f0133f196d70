"""The quality of PAT on a real model: perplexity at several ratios beside prune-then-tune and LoRA on the dense model.

    python benchmarks/pat_quality.py                    hours; stop it at will, the same command goes on
    python benchmarks/pat_quality.py --table            the tables, from pat_quality.csv; the README has the first
    python benchmarks/pat_quality.py --steps 120 --ratios 0.25 --bases learned identity
    python benchmarks/pat_quality.py --jobs 8           eight at a time, on a GPU; no speed is measured then
    python benchmarks/pat_quality.py --speed            then: how fast what is finished is here
    python benchmarks/pat_quality.py --collect          csv, picture and table of the runs that are finished

Every method is tuned on the same tokens of the demo's text, exported, loaded again as a stock checkpoint, and measured
on the same held-out text. LoRA depends on no ratio and is tuned once; prune-then-tune once for each ratio and each
basis to cut in (the one of principal axes serves pca and learned). Each of these is one run folder under --out.
The result goes to pat_quality.csv, one row for each, a table for each protocol (another budget or dtype is no
comparison); the picture pat_quality.png shows the one with most rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import operator
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import trials
from csvs import Cell, read_csv
from models import conditions
from transformers import AutoConfig, AutoModelForCausalLM
from trials import add_rows, protocols

from pyprune import data, evaluation
from pyprune.cli.demo import DEMO
from pyprune.cli.fields import add_fields, from_fields
from pyprune.methods import find, like
from pyprune.models import fast_dtype
from pyprune.runs import Experiment, Recipe, Run, check_folder, hardware, open_run

CSV = Path(__file__).with_name("pat_quality.csv")
COLUMNS = (
    "method basis ratio_requested ratio perplexity params block_params hidden_size tied prefill_speedup "
    "decode_speedup speed_on steps tokens_trained seconds eval_tokens eval_window eval_stride dtype seed date "
    "hardware threads torch transformers peft pyprune commit"
)
# the demo's recipe, longer, on all of the held-out text; round_to 1 keeps the ratios apart
DEFAULTS = DEMO | {"steps": 600, "warmup": 20, "eval_tokens": None, "save_every": None, "round_to": 1}
LABELS = {"pat": "PAT", "prune-then-tune": "prune, then tune", "lora": "dense, LoRA", "dense": "dense, untouched"}
DENSE = ("dense", "lora")
EVALUATION = ("eval_tokens", "eval_window", "eval_stride", "dtype", "seed")
PROTOCOL = ("steps", "tokens_trained", *EVALUATION)  # tuned rows that share it are compared
ALONE = "speed_alone"  # the stage that times a finished trial's shape


@dataclasses.dataclass(frozen=True)
class Trial:
    """One method with its options, in the run folder `name`."""

    name: str
    label: str
    method: Any  # a Method; all of them are dataclasses
    seed: int


def planned(pattern: Any, ratios: Sequence[float], bases: Sequence[str], seed: int) -> list[Trial]:
    """What has to be run, each once: `pattern`, a PAT, at every ratio and basis, and what it is compared with."""
    found = {"lora": Trial("lora", "lora", like("lora", pattern), seed)}
    for ratio in ratios:
        for basis in bases:
            pat = dataclasses.replace(pattern, ratio=ratio, basis=basis)
            cut = like("prune-then-tune", dataclasses.replace(pat, basis=cut_basis(basis)))
            for label, method in (("prune-then-tune", cut), ("pat", pat)):
                name = f"{label}-{method.basis}-{ratio:g}"
                found.setdefault(name, Trial(name, label, method, seed))
    return list(found.values())


def cut_basis(basis: str) -> str:
    """The basis in which prune-then-tune cuts, to be compared with PAT in `basis`."""
    return "identity" if basis == "identity" else "pca"


def run(chosen: Iterable[Any], dense: Path, recipe: Recipe, out: Path) -> None:
    """Works through trials, each of which is resumed or done already."""
    experiment: Experiment | None = None
    for trial in chosen:
        if experiment is None:
            first = dataclasses.replace(recipe, seed=trial.seed)
            experiment = Experiment(dense, data.demo_text(), first, trial.label, trial.method, progress=True)
        else:
            experiment = experiment.another(trial.label, trial.method, trial.seed)
        with open_run(out / trial.name, config(trial, recipe), resume=True) as folder:
            experiment(folder)


def config(trial: Any, recipe: Recipe) -> dict[str, Any]:
    """What defines a trial's result."""
    options = dataclasses.asdict(trial.method) | dataclasses.asdict(recipe)
    return {"method": trial.label} | options | {"seed": trial.seed}


def summary_of(name: str, out: Path) -> dict[str, Any] | None:
    """That of a finished trial; the speeds of `time_alone`, if there are any, in place of its own."""
    summary, alone = out / name / "summary.json", out / name / "stages" / f"{ALONE}.json"
    if not summary.exists():
        return None
    found = json.loads(summary.read_text(encoding="utf-8"))
    if alone.exists():
        speeds = json.loads(alone.read_text(encoding="utf-8"))
        found |= {key: speeds[key] for key in ("prefill_speedup", "decode_speedup", "speed_on")}
    return found


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe of the options; trials that run beside others are not timed."""
    recipe: Recipe = from_fields(Recipe, arguments)
    return recipe if arguments.jobs == 1 else dataclasses.replace(recipe, repeats=0)


def run_all(chosen: Sequence[Any], dense: Path, recipe: Recipe, arguments: argparse.Namespace) -> list[str]:
    """Runs trials in child processes. Returns the names of those that are not finished.

    Raises RunError when a folder holds a run with other options."""
    out: Path = arguments.out

    def result(name: str) -> str | None:
        summary = summary_of(name, out)
        return None if summary is None else f"perplexity {summary['ppl_pruned']:.2f}"

    names = [trial.name for trial in chosen]
    if arguments.collect:
        return [name for name in names if result(name) is None]
    for trial in chosen:
        check_folder(out / trial.name, config(trial, recipe), resume=True)
    if not dense.exists():
        data.demo_model(dense)
    return trials.run(names, result, out / "logs", arguments.jobs)


# ------------------------------------------------------------------------------------------------------------ speed


def time_alone(finished: Sequence[Any], dense: Path, out: Path) -> None:
    """Records for every finished trial how fast a model of its shape is beside one of the dense shape, on this machine,
    which should do nothing else. Weights are random, which changes no time, so that a trial of another machine needs
    no more than its records here. A shape that several trials share is timed once."""
    known: dict[str, dict[str, Any]] = {}
    for one in finished:
        run = Run(out / one.name)
        shape = json.dumps(json.loads((run.model / "config.json").read_text(encoding="utf-8")), sort_keys=True)
        known[shape] = run.stage(ALONE, lambda run=run, shape=shape: known.get(shape) or _time(dense, run.model))


def _time(dense: Path, pruned: Path) -> dict[str, Any]:
    dtype = fast_dtype()
    models = {"dense": _random(dense, dtype), "pruned": _random(pruned, dtype)}
    found = evaluation.speedup(*models.values(), evaluation.latency(models, new_tokens=8, repeats=15, progress=True))
    return {"prefill_speedup": found.prefill, "decode_speedup": found.decode, "speed_on": place(hardware(), dtype)}


def _random(folder: Path, dtype: str) -> Any:
    """A model of a checkpoint's config."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=getattr(torch, dtype))
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def speed(summary: dict[str, Any], phase: str) -> str:
    """How much faster the result is than the dense model; empty where that was not measured."""
    value = summary[f"{phase}_speedup"]
    return "" if value is None else f"{value:.3f}"


def speed_on(summary: dict[str, Any]) -> str:
    """Where, and in which dtype, that was measured; empty where it was not."""
    if not speed(summary, "decode"):
        return ""
    return summary.get("speed_on") or place(summary["hardware"], summary["dtype"])


def place(hardware: dict[str, Any], dtype: str) -> str:
    """The GPU, or the processor and its threads, with the dtype."""
    return f"{hardware['gpu'] or '{threads} threads of {cpu}'.format(**hardware)}, {dtype}"


# ------------------------------------------------------------------------------------------------------------ the csv


def rows(summaries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each summary, and before them one for the dense model as it came."""
    return [_untouched(summaries[0]), *map(_row, summaries)]


def _untouched(summary: dict[str, Any]) -> dict[str, Any]:
    """The dense model's row, from what any trial tells of it."""
    nothing = {"method": "dense", "steps": 0, "tokens_trained": 0, "seconds": 0, "ratio_requested": 0}
    blank = dict.fromkeys(("basis", "prefill_speedup", "decode_speedup", "speed_on"), "")
    sizes = {name: summary[f"{name}_dense"] for name in ("params", "block_params", "hidden_size")}
    figures = {"ratio": f"{0:.4f}", "perplexity": f"{summary['ppl_dense']:.4f}"}
    tied = {} if summary["ratio_achieved"] == 0 else {"tied": ""}  # a pruned model may have become untied
    return _row(summary) | nothing | blank | sizes | figures | tied


def _row(summary: dict[str, Any]) -> dict[str, Any]:
    hardware, versions = summary["hardware"], summary["versions"]
    pruned = summary["ratio_achieved"] > 0
    return {
        "method": summary["method"],
        "basis": summary["basis"] or "",
        "ratio_requested": summary["ratio_requested"] or 0,
        "ratio": f"{summary['ratio_achieved']:.4f}",
        "perplexity": f"{summary['ppl_pruned']:.4f}",
        "params": summary["params_pruned"],
        "block_params": summary["block_params_pruned"],
        "hidden_size": summary["hidden_size_pruned"],
        "tied": summary["tied"],
        **{f"{phase}_speedup": speed(summary, phase) if pruned else "" for phase in ("prefill", "decode")},
        "speed_on": speed_on(summary) if pruned else "",
        "steps": summary["steps"],
        "tokens_trained": summary["tokens_trained"],
        "seconds": f"{summary['seconds']:.0f}",
        "eval_tokens": summary["evaluation"]["tokens"],
        "eval_window": summary["evaluation"]["window"],
        "eval_stride": summary["evaluation"]["stride"],
        "dtype": summary["dtype"],
        "seed": summary["seed"],
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "hardware": hardware["gpu"] or hardware["cpu"],
        "threads": hardware["threads"],
        **{name: versions[name] for name in ("torch", "transformers", "peft", "pyprune")},
        "commit": (summary["commit"] or "unknown")[:12],
    }


def check(summaries: Sequence[dict[str, Any]]) -> None:
    """Ends when the rows cannot be compared: other text, other held-out tokens, another budget or dense model. That
    model's perplexity may differ by a thousandth, as it does in bf16 from one day on a GPU to the next."""
    for key in ("evaluation", "data", "tokens_trained", "steps", "seed", "dtype", "ppl_dense", "params_dense"):
        values = [summary[key] for summary in summaries]
        same = (lambda a, b: abs(a - b) <= 1e-3 * b) if key == "ppl_dense" else operator.eq
        if not all(same(value, values[0]) for value in values):
            raise SystemExit(f"the runs differ in {key}: {values}; they are no comparison, nothing was written")


# ------------------------------------------------------------------------------------------- the table and the picture


def lines(cells: Sequence[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """The pruned rows by (method, basis), each in order of its ratio; PAT first."""
    found: dict[tuple[str, str], list[Cell]] = {}
    pruned = [cell for cell in cells if cell["method"] not in DENSE]
    for cell in sorted(
        pruned, key=lambda cell: (list(LABELS).index(cell["method"]), cell["basis"], float(cell["ratio"]))
    ):
        found.setdefault((cell["method"], cell["basis"]), []).append(cell)
    return found


def comparisons(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The tuned rows that share a protocol, most rows first, behind the dense model as it was measured for them."""
    found = protocols([cell for cell in cells if cell["method"] != "dense"], PROTOCOL)
    dense = [cell for cell in cells if cell["method"] == "dense"]
    return [[*(cell for cell in dense if all(cell[k] == part[0][k] for k in EVALUATION)), *part] for part in found]


def tables(cells: Sequence[Cell]) -> str:
    """One table for each protocol."""
    return "\n\n".join(map(table, comparisons(cells)))


def table(cells: Sequence[Cell]) -> str:
    """Markdown: one line for each ratio, a column of perplexity for each method, and below what it was measured on."""
    columns, dense = lines(cells), {cell["method"]: cell for cell in cells if cell["method"] in DENSE}
    names = [f"{LABELS[method]} ({basis})" for method, basis in columns]
    head = ["hidden channels", "parameters", "dense", *names, "prefill", "decode"]
    body = [
        [
            f"{cell['hidden_size']} ({LABELS[name]})",
            _millions([cell]),
            _short(cell),
            *[""] * len(names),
            "1.00x",
            "1.00x",
        ]
        for name, cell in dense.items()
    ]
    for ratio in sorted({cell["ratio"] for line in columns.values() for cell in line}, key=float):
        here = {key: cell for key, line in columns.items() for cell in line if cell["ratio"] == ratio}
        cell = next(iter(here.values()))
        figures = [_short(here[key]) if key in here else "" for key in columns]
        speeds = [times(cell[f"{phase}_speedup"]) for phase in ("prefill", "decode")]
        name = f"{cell['hidden_size']} (-{float(ratio):.0%})"
        body.append([name, _millions(here.values()), "", *figures, *speeds])
    text = ["| " + " | ".join(line) + " |" for line in (head, ["---", *["---:"] * (len(head) - 1)], *body)]
    tuned = next(cell for cell in cells if cell["method"] != "dense")
    timed = dict.fromkeys(cell["speed_on"] for cell in cells if cell["speed_on"])
    note = (
        f"Perplexity on {int(tuned['eval_tokens']):,} held-out tokens of {data.DEMO_TEXT} (window "
        f"{tuned['eval_window']}, stride {tuned['eval_stride']}); {data.DEMO_MODEL}; every tuned row read "
        f"{int(tuned['tokens_trained']):,} tokens, seed {tuned['seed']}, {tuned['dtype']}. "
        f"{tuned['hardware']}, torch {tuned['torch']}, commit {tuned['commit']}."
        f"{' Speed beside the dense model: ' + '; '.join(timed) + '.' if timed else ''}"
    )
    return "\n".join([*text, "", note])


def times(speedup: str | float) -> str:
    """A factor in a table."""
    return f"{float(speedup):.2f}x" if speedup else ""


def _short(cell: Cell) -> str:
    return f"{float(cell['perplexity']):.2f}"


def _millions(cells: Iterable[Cell]) -> str:
    """Unique parameters; the methods differ in them where one unties the head from the embedding."""
    return " / ".join(dict.fromkeys(f"{int(cell['params']) / 1e6:.1f}M" for cell in cells))


def picture(cells: Sequence[Cell], path: Path) -> None:
    """Perplexity over the share of hidden channels that went: a line for each method, level ones for dense models."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5.6), layout="constrained")
    for (method, basis), line in lines(cells).items():
        x, y = [100 * float(cell["ratio"]) for cell in line], [float(cell["perplexity"]) for cell in line]
        ours = method == "pat"
        style = {"marker": "o", "linestyle": "-"} if ours else {"marker": "s", "linestyle": "--"}
        axes.plot(x, y, label=f"{LABELS[method]} ({basis})", linewidth=2, **style)
        for point in zip(x, y, strict=True):
            beside = {"xytext": (0, -14 if ours else 7), "textcoords": "offset points", "ha": "center", "fontsize": 9}
            axes.annotate(f"{point[1]:.1f}", point, **beside)
    for name, style in (("dense", ":"), ("lora", "-.")):
        for cell in cells:
            if cell["method"] == name:
                value = float(cell["perplexity"])
                axes.axhline(value, color="gray", linestyle=style, label=f"{LABELS[name]}: {value:.1f}")
    tuned = next(cell for cell in cells if cell["method"] != "dense")
    axes.set_xlabel("hidden channels removed (%)")
    axes.set_ylabel(f"perplexity, {int(tuned['eval_tokens']):,} held-out tokens")
    axes.set_title(f"SmolLM2-135M (4-bit-rounded), {int(tuned['tokens_trained']):,} tokens of tuning each", fontsize=11)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    figure.savefig(path, dpi=160)
    pyplot.close(figure)


def main() -> None:
    """Runs what is not done yet, or prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, conflict_handler="resolve"
    )
    parser.add_argument("--table", action="store_true", help="print the tables of pat_quality.csv and run nothing")
    parser.add_argument("--speed", action="store_true", help="time what is finished, train nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/pat_quality"), help="where the run folders are")
    parser.add_argument("--model", type=Path, help="folder of the demo's model (default: made under --out)")
    add_fields(parser, find("pat"), DEFAULTS)
    add_fields(parser, Recipe, DEFAULTS)
    parser.set_defaults(ratio=0.25, basis="learned")  # every trial puts its own in their place
    parser.add_argument("--ratio", "--ratios", dest="ratios", type=float, nargs="+", default=[0.10, 0.20, 0.25, 0.30])
    parser.add_argument(
        "--basis", "--bases", dest="bases", nargs="+", default=["learned"], help="of PAT: identity, pca, learned"
    )
    trials.add_options(parser)
    arguments = parser.parse_args()
    if arguments.table:
        print(tables(read_csv(CSV, COLUMNS.split())))
        return
    print(conditions(trials.set_threads(arguments)))
    pattern = from_fields(find("pat"), arguments)
    chosen = planned(pattern, arguments.ratios, arguments.bases, arguments.seed)
    dense, recipe = arguments.model or arguments.out / "dense", recipe_of(arguments)
    if arguments.one:
        run([trial for trial in chosen if trial.name in arguments.one], dense, recipe, arguments.out)
        return
    arguments.collect |= arguments.speed
    missing = run_all(chosen, dense, recipe, arguments)
    if arguments.speed:
        time_alone([trial for trial in chosen if trial.name not in missing], dense, arguments.out)
    summaries = [found for trial in chosen if (found := summary_of(trial.name, arguments.out))]
    if summaries:
        check(summaries)
        cells = add_rows(rows(summaries), CSV, ("method", "basis", "ratio_requested", *PROTOCOL))
        picture(comparisons(cells)[0], CSV.with_suffix(".png"))
        print(tables(cells))
    trials.finish(missing, arguments.out)


if __name__ == "__main__":
    main()
