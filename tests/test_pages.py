"""README.md and docs/ show commands that the command line takes, and use names that exist. The tutorials are run as
well (test_tutorials.py)."""

from __future__ import annotations

import pkgutil
import re
import shlex
from pathlib import Path

import pytest

from pyprune import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def shown(text: str) -> list[str]:
    """Indented lines that begin with pyprune, and spans in backquotes with options."""
    lines = re.findall(r"^ {4}pyprune (.*)$", text, re.MULTILINE)
    spans = re.findall(r"`pyprune ([^`]*\s--[^`]*)`", text)
    return lines + spans


def words(command: str) -> list[str]:
    """Of alternatives the first, options in brackets too, a number for N."""
    plain = re.sub(r"\|[^\s]*", "", re.sub(r"[\[\]]|\.\.\.", "", command))
    return ["5" if word == "N" else word for word in shlex.split(plain, comments=True)]


COMMANDS = [pytest.param(words(c), id=f"{page.stem}: {c[:60]}") for page in PAGES for c in shown(page.read_text())]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_takes_what_the_pages_show(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        cli._parser(command).parse_args(command)
    except SystemExit as error:
        pytest.fail(f"exit {error.code}: {capsys.readouterr().err.splitlines()[-1]}")


def test_names_exist() -> None:
    names = {name for page in PAGES for name in re.findall(r"(?<![\w/.-])pyprune(?:\.[a-zA-Z_]\w*)+", page.read_text())}
    for name in names:
        pkgutil.resolve_name(name)
    assert len(names) > 10 and len(COMMANDS) > 20
