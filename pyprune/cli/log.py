"""Where the log of a command goes."""

from __future__ import annotations

import logging


def log_to_stderr() -> None:
    """Shows the library's log on stderr, between the progress bars."""
    from rich.logging import RichHandler

    from pyprune.console import console

    logger = logging.getLogger("pyprune")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [RichHandler(console=console, show_path=False, show_level=False, omit_repeated_times=False)]
    logging.getLogger("py.warnings").propagate = False
