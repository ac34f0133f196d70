"""The compiled module `pyprune._C`, or the reason why there is none. Importing this never fails."""

from __future__ import annotations

import json
import os
from importlib import import_module
from types import ModuleType
from typing import Any

import torch  # noqa: F401  (first: the kernels then share the OpenMP runtime that torch brings)


def _load() -> tuple[ModuleType | None, str]:
    try:
        return import_module("pyprune._C"), ""
    except ImportError as error:
        return None, str(error)


def _choose_isa(kernels: ModuleType) -> None:
    wanted = os.environ.get("PYPRUNE_ISA")
    if not wanted:
        return
    try:
        kernels.set_isa(wanted)
    except ValueError as error:
        raise ValueError(f"PYPRUNE_ISA: {error}") from None


module, why_missing = _load()
"""The compiled module and, when it is None, what the import said."""

cpu: ModuleType | None = module.cpu if module else None
"""The CPU kernels."""

cuda: ModuleType | None = getattr(module, "cuda", None)
"""The CUDA launchers; None too when the module was built without them."""

build_info: dict[str, Any] = json.loads(module.build_info()) if module else {}
"""What the build recorded: compiler, flags, instruction sets, CUDA release and architectures."""

if cpu:
    _choose_isa(cpu)
