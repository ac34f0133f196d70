"""What the families on compiled kernels share."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The element types as csrc/dtype.h numbers them."""


def address(tensor: Tensor | None) -> int:
    """Where a tensor's elements start; 0, a null pointer, for None."""
    return 0 if tensor is None else tensor.data_ptr()


class Kernels:
    """Holds the compiled CPU functions: the submodule `pyprune._C.cpu`."""

    def __init__(self, kernels: ModuleType) -> None:
        self.kernels = kernels
