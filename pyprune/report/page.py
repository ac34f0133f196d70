"""The page: one HTML file with everything in it. No script, and a policy that forbids the browser every request."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.resources import files

import pyprune
from pyprune.report import figures, tables
from pyprune.report.figures import Picture
from pyprune.report.reading import NEEDED, Run, clean
from pyprune.report.tables import Table

DARK = {
    "ink": "#e8eaed",
    "muted": "#a3abb5",
    "grid": "#343b44",
    "paper": "#12151a",
    **dict(
        zip(
            (f"s{i}" for i in range(len(figures.SERIES))),
            ("#5aaef5", "#ff9350", "#22b487", "#f08fd6", "#f4e79a", "#8a7dff", "#e25368", "#cfe0e8"),
            strict=True,
        )
    ),
}
LIGHT = {name: color for color, name in figures.NAMES.items()}
SECTIONS = {  # a section's title: the tables behind its pictures
    "Quality, size and speed": ("models",),
    "Over the training": ("training",),
    "Where the weights went": ("by-block", "every-layer"),
}


def page(
    runs: Sequence[Run], found: Sequence[Table], pictures: Sequence[tuple[Picture, str]], problems: list[str]
) -> str:
    """The HTML of a report.

    Args:
        pictures: each with its <svg>, or "" where it could not be drawn.
        problems: what is wrong with the runs, in the order in which it is shown.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    sections: dict[str, dict[str, list[tuple[Picture, str]]]] = {title: {} for title in SECTIONS}
    for title, behind in SECTIONS.items():
        for picture, svg in pictures:
            if picture.table in behind:
                sections[title].setdefault(picture.group, []).append((picture, Markup(svg)))
    template = Environment(autoescape=True, trim_blocks=False).from_string(
        files("pyprune.report").joinpath("page.html").read_text(encoding="utf-8")
    )
    return template.render(
        runs=runs,
        tables=found,
        sections=[(title, list(groups.items())) for title, groups in sections.items() if groups],
        problems=problems,
        headline=tables.headline,
        needed=NEEDED,
        options=_options,
        version=pyprune.__version__,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        light=_variables(LIGHT),
        dark=_variables(DARK),
    )


def _variables(colors: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {color};" for name, color in colors.items())


def _options(run: Run) -> str:
    """The configuration as JSON; `clean` would fold its lines, so control characters are left to JSON's own escapes."""
    return json.dumps(run.config, indent=2, ensure_ascii=True) if run.config else clean("config.json is missing")
