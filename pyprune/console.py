"""What the user watches: one console on stderr (stdout is for results) and progress bars on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")

console = Console(stderr=True)


def progress_bar(*columns: str) -> Progress:
    """A bar that vanishes when done; `columns` are further fields, as `{task.fields[loss]}`."""
    texts = [TextColumn(column) for column in columns]
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *texts,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def track(items: Sequence[Item], shown: bool, description: str) -> Iterable[Item]:
    """`items`, with a progress bar if `shown`."""
    if not shown:
        yield from items
        return
    with progress_bar() as bar:
        yield from bar.track(items, description=description)
