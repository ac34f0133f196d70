"""Where the log of a command goes."""

from __future__ import annotations

import logging


def log_to_stderr() -> None:
    """Shows the library's log on stderr, between its progress bars; transformers' bars for loading weights stay away,
    the hub's for downloads do not."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from rich.logging import RichHandler
    from transformers.utils.logging import disable_progress_bar

    from pyprune.console import console

    downloads_shown = not are_progress_bars_disabled()
    disable_progress_bar()  # switches the hub's off too
    if downloads_shown:
        enable_progress_bars()

    logger = logging.getLogger("pyprune")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [RichHandler(console=console, show_path=False, show_level=False, omit_repeated_times=False)]
    logging.getLogger("py.warnings").propagate = False
