"""Keeps measurements: rows appended to results.csv, with the machine, the versions and the commit they belong to.

python benchmarks/results.py H100                              the newest ones of a kind of hardware as a table
python benchmarks/results.py "AMD EPYC"                        of all kinds with that in their name, a table each
python benchmarks/results.py H100 --picture packed.png         packed linears against dense ones over tokens
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

import torch
from csvs import check_columns, read_csv

import pyprune
from pyprune import _native, timing
from pyprune.info import processor

RESULTS = Path(__file__).with_name("results.csv")
OURS = ("pyprune", "2:4", "bitmap", "50%", "70%")
BOUNDS = ("floor", "limit", "products")
PACKED = re.compile(r".* T=(?P<tokens>\d+) bfloat16 ?(?P<sparsity>\S*)")  # a case of nm_linear or bitmap_linear


@dataclass(frozen=True)
class Row:
    """One measurement of one contender.

    Attributes:
        benchmark: what was run, such as "hsm forward".
        case: its sizes and dtype, such as "T=2048 d=2048 r=104 bfloat16".
        provider: who ran it, such as "eager", "compile", "pyprune", "limit".
        unit: of the three values, such as "ms".
        p20, p50, p80: percentiles over the rounds.
    """

    benchmark: str
    case: str
    provider: str
    unit: str
    p20: float
    p50: float
    p80: float


COLUMNS = [
    *(field.name for field in fields(Row)),
    *("date", "hardware", "driver", "threads", "load", "torch", "pyprune", "commit"),
]
MEASURED = (":/csrc", ":/pyprune", ":/setup.py", ":/benchmarks/*.py")
"""What a row's figures depend on, as git's paths from the top of the checkout."""


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    run = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, text=True, capture_output=True)
    return run.stdout.strip()


def _driver() -> str:
    """The version of the GPU's driver, as its own tool tells it."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, text=True, capture_output=True).stdout.partition("\n")[0].strip()


def _processor() -> str:
    """Its name, and the instruction set that the compiled kernels use, if there are any."""
    return f"{processor()}, {_native.cpu.isa()}" if _native.cpu else processor()


def environment(device: str = "cpu") -> dict[str, str]:
    """The columns that say where a row comes from. A commit with a trailing + had changes that are not in git, of what
    is measured or what measures it."""
    hardware = _processor() if device == "cpu" else torch.cuda.get_device_name(device)
    changed = "+" if _git("status", "--porcelain", "--", *MEASURED) else ""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "hardware": hardware,
        "driver": "" if device == "cpu" else _driver(),
        "threads": str(torch.get_num_threads()),
        "load": f"{timing.load():.1f}",
        "torch": torch.__version__,
        "pyprune": pyprune.__version__,
        "commit": (_git("rev-parse", "--short", "HEAD") or "unknown") + changed,
    }


def check() -> None:
    """Raises SystemExit when results.csv is there and no row can be appended to it."""
    if RESULTS.exists():
        check_columns(RESULTS, COLUMNS)


def append(rows: Iterable[Row], device: str = "cpu") -> None:
    """Adds rows to results.csv, with the header when the file is new; see `check`."""
    check()
    where = environment(device)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow(values | where)


# ------------------------------------------------------------------------------------------------------------ the table


def tables(rows: Iterable[dict[str, str]]) -> str:
    """A table for each kind of hardware; its name stands above where there are several."""
    kinds: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        kinds.setdefault(row["hardware"], []).append(row)
    named = [f"{kind}\n\n{table(found)}" if len(kinds) > 1 else table(found) for kind, found in kinds.items()]
    return "\n\n".join(named)


def table(rows: Iterable[dict[str, str]]) -> str:
    """Markdown: a line for each benchmark and case, with our median, its share of the floor's speed, and every rival's
    median with our gain over it. Of what was measured more than once the newest counts."""
    cases: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        cases.setdefault((row["benchmark"], row["case"], row["unit"]), {})[row["provider"]] = float(row["p50"])
    lines = ["| op | case | | ours | floor | rivals, and our gain |", "|---|---|---|---:|---:|---|"]
    for (benchmark, case, unit), medians in cases.items():
        mine = next((name for name in OURS if name in medians), None)
        bound = next((name for name in BOUNDS if name in medians), None)
        if mine is None:
            continue
        rivals = [name for name in medians if name not in (mine, *BOUNDS)]
        gains = ", ".join(f"{name} {medians[name]:.4g} ({medians[name] / medians[mine]:.2f}x)" for name in rivals)
        share = f"{medians[bound]:.4g} ({medians[bound] / medians[mine]:.0%})" if bound else ""
        lines.append(f"| {benchmark} | {case} | {unit} | {medians[mine]:.4g} | {share} | {gains} |")
    return "\n".join(lines)


def packed_gains(rows: Iterable[dict[str, str]]) -> dict[str, dict[int, list[float]]]:
    """How much faster than torch's dense product in bf16 a packed one is: [kind of packing][tokens], a value for each
    shape; the newest of each."""
    medians: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["benchmark"] in ("nm_linear", "bitmap_linear") and PACKED.fullmatch(row["case"]):
            medians.setdefault((row["benchmark"], row["case"]), {})[row["provider"]] = float(row["p50"])
    found: dict[str, dict[int, list[float]]] = {}
    for (_, case), of in medians.items():
        mine = next((name for name in OURS if name in of), None)
        match = PACKED.fullmatch(case)
        if match and mine and "dense" in of:
            kind = " ".join(filter(None, (mine, match["sparsity"])))
            found.setdefault(kind, {}).setdefault(int(match["tokens"]), []).append(of["dense"] / of[mine])
    return found


def picture(gains: dict[str, dict[int, list[float]]], tokens: Sequence[int], title: str, path: Path) -> None:
    """`packed_gains` at some numbers of tokens: the geometric mean over the shapes as a line, their range as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for kind, values in gains.items():
        at = [count for count in tokens if count in values]
        middle = [math.exp(sum(map(math.log, values[count])) / len(values[count])) for count in at]
        (line,) = axes.plot(at, middle, marker="o", linewidth=2, label=kind)
        ends = ([edge(values[count]) for count in at] for edge in (min, max))
        axes.fill_between(at, *ends, alpha=0.15, color=line.get_color())
    axes.axhline(1, color="gray", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
    axes.set_xlabel("tokens in a forward pass")
    axes.set_ylabel("speed, dense = 1")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def main() -> None:
    """Prints the table of each kind of hardware asked for, or draws a picture of all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("hardware", help='part of its name, such as "H100"')
    parser.add_argument("--benchmarks", nargs="*", help="of these only")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw packed linears over tokens instead")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 16, 32, 64, 256, 2048, 16384])
    arguments = parser.parse_args()
    rows = [row for row in read_csv(RESULTS, COLUMNS) if arguments.hardware in row["hardware"]]
    if arguments.picture:
        title = f"Packed linears against dense bf16 ones, {arguments.hardware}: mean and range of three shapes"
        picture(packed_gains(rows), arguments.tokens, title, arguments.picture)
        return
    print(tables(row for row in rows if not arguments.benchmarks or row["benchmark"] in arguments.benchmarks))


if __name__ == "__main__":
    main()
