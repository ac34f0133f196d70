"""The emulated kernels, compiled once per change of the sources."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
from emulator import LAZY, Emulator
from hsm_checks import Launchers


@pytest.fixture(scope="session")
def compiled_emulator() -> Emulator:
    if platform.system() != "Linux":
        pytest.skip("the emulator needs Linux: protected memory, signal stacks, ucontext")
    return Emulator()


@pytest.fixture
def emulator(compiled_emulator: Emulator) -> Iterator[Emulator]:
    """The emulator in its default schedule; memory taken from it lives until the end of the test."""
    compiled_emulator.configure(LAZY)
    compiled_emulator.at_end = True
    yield compiled_emulator
    compiled_emulator.free_all()


@pytest.fixture
def launchers(emulator: Emulator) -> Launchers:
    """The emulated launchers on guarded memory."""
    return Launchers(emulator.cuda, emulator.copy, emulator.empty)
