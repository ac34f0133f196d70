"""`pyprune report`: what one or more runs did, as one HTML page, pictures and tables.

    reading.py   run folders as plain data, with what is wrong with them
    tables.py    the numbers
    figures.py   the pictures, by matplotlib
    page.py      the page: page.html with all of it inside

Nothing here needs torch: a report is made on any machine from folders that were copied there.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from pyprune.report.reading import NEEDED, ReportError, Run, read_runs
from pyprune.report.tables import Table, all_tables, headline

__all__ = ["ReportError", "make", "show"]


def make(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Writes report.html, report.txt and a PNG for each picture to `out`, over those of an earlier report.

    Without matplotlib the page says what to install in the place of each picture; without jinja2 there is no page, and
    `problems` says so.

    Returns:
        `problems` (one line each), `files` (written), `runs` and `tables` as plain data.

    Raises:
        ReportError: none of the folders is a run, or `out` is a file or the folder of a model.
    """
    if out.exists() and not out.is_dir():
        raise ReportError(f"--out {out} is a file; name a folder")
    if any(out.glob("*.safetensors")):
        raise ReportError(f"--out {out} holds a model; name a folder of its own")
    runs, problems = read_runs(folders)
    problems += [f"{run.label}: {problem}" for run in runs for problem in run.problems]
    problems += [
        f"{run.label} measured no perplexity (--eval-data), so it is in no picture of it"
        for run in runs
        if run.results and all(model.perplexity is None for model in run.results)
    ]
    found = all_tables(runs)
    out.mkdir(parents=True, exist_ok=True)
    written = [*_illustrated(runs, found, problems, out), out / "report.txt"]
    result = {
        "out": str(out),
        "files": [str(path) for path in written],
        "problems": problems,
        "runs": [{"run": run.label, "kind": run.kind, "state": run.state, "summary": headline(run)} for run in runs],
        "tables": [asdict(table) for table in found],
    }
    with (out / "report.txt").open("w", encoding="utf-8") as file:
        show(result, file, width=240, whole=True)
    return result


def _illustrated(runs: Sequence[Run], found: Sequence[Table], problems: list[str], out: Path) -> list[Path]:
    """Writes the pictures and the page, as far as their packages are there; returns their paths."""
    from pyprune.report import figures
    from pyprune.report.page import page

    pictures = figures.pictures(runs)
    paths: list[Path] = []
    drawn = [(picture, "") for picture in pictures]
    if _installed("matplotlib", "pictures", problems):
        paths = [out / f"{picture.name}.png" for picture in pictures]
        drawn = [(picture, figures.draw(picture, path)) for picture, path in zip(pictures, paths, strict=True)]
    if _installed("jinja2", "page", problems):
        (out / "report.html").write_text(page(runs, found, drawn, problems), encoding="utf-8")
        paths.insert(0, out / "report.html")
    return paths


def _installed(package: str, what: str, problems: list[str]) -> bool:
    """Whether the package that makes `what` is there; if not, the problems say so."""
    if find_spec(package) is not None:
        return True
    problems.append(f"no {what}: {package} is not installed; {NEEDED}")
    return False


def show(result: Mapping[str, Any], file: IO[str] | None = None, width: int | None = None, whole: bool = False) -> None:
    """Writes what `make` returned as text: for a terminal, or the `whole` of it, tables of every layer included."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    width = width or max(100, shutil.get_terminal_size((160, 0)).columns)
    console = Console(file=file, width=width, highlight=False, soft_wrap=False)
    for run in result["runs"]:
        console.print(Text(f"{run['run']} ({run['kind']}): {run['summary']}"))
    for problem in result["problems"]:
        console.print(Text(f"! {problem}"))
    for table in map(Table.of, result["tables"]):
        if table.long and not whole:
            continue
        grid = Grid(
            title=Text(table.title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1)
        )
        for column in table.columns:
            side = "right" if column.numeric else "left"
            grid.add_column(Text(column.name), justify=side, overflow="fold")  # type: ignore[arg-type]
        for place, row in enumerate(table.texts()):
            grid.add_row(*map(Text, row), style="bold" if place in table.strong else None)
        console.print(grid)
        if table.note:
            console.print(Text(table.note), width=min(width, 120), style="dim")
            console.print()
