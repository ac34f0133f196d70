"""Schedules: a value over the optimiser steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """A value that goes from `start` to `end` between the steps `begin` and `milestone` and is exactly `end` then.

    cubic: end + (start - end) (1 - x)^3, fast at first and slow at the end (Zhu & Gupta, 2017, arXiv 1710.01878,
    eq. 1); linear: start + (end - start) x; constant: `end` at once. x is the share of the ramp that is over.
    """

    start: float
    end: float
    milestone: int
    begin: int = 0
    shape: Literal["cubic", "linear", "constant"] = "cubic"

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.milestone:
            raise ValueError(f"begin is {self.begin} and milestone {self.milestone}; expected 0 <= begin <= milestone")
        if self.shape not in ("cubic", "linear", "constant"):
            raise ValueError(f"shape is {self.shape!r}; expected cubic, linear or constant")

    def __call__(self, step: int) -> float:
        """The value at `step`, counted from 0."""
        if step < self.begin:
            return self.start
        if step >= self.milestone or self.shape == "constant":
            return self.end
        left = 1 - (step - self.begin) / (self.milestone - self.begin)
        return self.end + (self.start - self.end) * (left**3 if self.shape == "cubic" else left)
