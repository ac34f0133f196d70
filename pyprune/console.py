"""What the user watches: one console on stderr (stdout is for results) and progress bars on it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")

log = logging.getLogger("pyprune")
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
    """`items`, with a progress bar if `shown`; where nobody sees one, lines in the log."""
    if not shown:
        yield from items
    elif console.is_terminal:
        with progress_bar() as bar:
            yield from bar.track(items, description=description)
    else:
        for done, item in enumerate(items, 1):
            yield item
            if is_tenth(done, len(items)):
                log.info("%s: %d of %d", description, done, len(items))


def is_tenth(done: int, total: int) -> bool:
    """Whether with the last of `done` another tenth of `total` is done."""
    return 10 * done // total > 10 * (done - 1) // total
