"""What the families on CUDA launchers share."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import ModuleType

import torch


def runs_on(capability: tuple[int, int], archs: Sequence[str]) -> bool:
    """Whether code built for `archs` ("80", "90a", ...; the newest also as PTX) runs on a device of this capability.

    Machine code runs on later minor versions of its major version, with a suffix on no other version; PTX on all later.
    """
    device = capability[0] * 10 + capability[1]
    numbers = [int(re.sub(r"\D", "", arch)) for arch in archs]
    for arch, number in zip(archs, numbers, strict=True):
        if number == device or (arch.isdigit() and number // 10 == capability[0] and number <= device):
            return True
    return bool(numbers) and max(numbers) <= device


def current_stream(device: torch.device) -> int:
    """The address of torch's current stream on a CUDA device."""
    return torch.cuda.current_stream(device).cuda_stream


class Launchers:
    """Holds the compiled launchers.

    Args:
        kernels: the submodule `pyprune._C.cuda`; the tests pass the same source built for their emulator.
        stream: gives the address of the stream to launch on.
    """

    def __init__(self, kernels: ModuleType, stream: Callable[[torch.device], int] = current_stream) -> None:
        self.kernels = kernels
        self.stream = stream
