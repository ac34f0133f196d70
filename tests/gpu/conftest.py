"""Tests that need a CUDA device. They share inputs, maths and tolerances with the emulator's tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pyprune import _native

sys.path.insert(0, str(Path(__file__).parents[1] / "simt"))
from hsm_checks import Launchers


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """The GPU, whose memory goes back after every test: other processes may run tests on it."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    yield torch.device("cuda")
    torch.cuda.empty_cache()


@pytest.fixture
def launchers(device: torch.device) -> Launchers:
    """The compiled launchers on device memory, for the checks that the emulator runs too."""
    if _native.cuda is None:
        pytest.skip("pyprune was built without CUDA kernels")

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    return Launchers(
        _native.cuda, lambda t: t.to(device, copy=True), empty, lambda: torch.cuda.current_stream().cuda_stream
    )
