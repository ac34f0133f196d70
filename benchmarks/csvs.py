"""The csv files in git: read and lengthened only where their columns are those that a script knows."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

Cell = dict[str, str]  # one row of a csv


def check_columns(path: Path, columns: Sequence[str]) -> None:
    """Raises SystemExit when the header of a file is another one than `columns`, in their order."""
    with path.open(newline="") as file:
        found = next(csv.reader(file), [])
    if found == list(columns):
        return
    missing = [name for name in columns if name not in found]
    unexpected = [name for name in found if name not in columns]
    parts = {"missing": missing, "unexpected": unexpected} if missing or unexpected else {"in another order": found}
    told = "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)
    raise SystemExit(
        f"{path} has other columns than this script's ({told}); nothing is written to it. Move it away, or take back "
        "the one in git"
    )


def read_csv(path: Path, columns: Sequence[str]) -> list[Cell]:
    """The rows of a csv. Raises SystemExit when there are none yet, or when they have other columns."""
    if not path.exists():
        raise SystemExit(f"{path} does not exist; run the script that writes it first")
    check_columns(path, columns)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
