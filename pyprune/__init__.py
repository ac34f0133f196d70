"""Makes large language models smaller and faster, and says honestly by how much."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pyprune import _registration

__version__ = "0.1.0"

# Public name -> the module that defines it. Modules load on first use, so that `import pyprune` stays quick.
_EXPORTS = {
    "ADMM": "methods.admm",
    "ALPS": "methods.admm",
    "AST": "methods.ast",
    "BESA": "methods.besa",
    "HSM": "modules",
    "LLMPruner": "methods.llm_pruner",
    "LoRA": "methods.lora",
    "LoRAPrune": "methods.loraprune",
    "Magnitude": "methods.magnitude",
    "PAT": "methods.pat",
    "PruneThenTune": "methods.prune_then_tune",
    "Reconstruction": "reconstruction",
    "SparseLinear": "modules",
    "SliceGPT": "methods.slicegpt",
    "SlimGPT": "methods.slimgpt",
    "SparseGPT": "methods.sparsegpt",
    "Wanda": "methods.wanda",
    "prune": "blockwise",
    "sparsify": "packing",
}
_MODULES = (
    *("checkpoint", "criteria", "data", "evaluation", "info", "models", "modules", "ops", "plan", "reference"),
    *("surgery", "training"),
)

__all__ = ["__version__", *_EXPORTS, *_MODULES]


def __getattr__(name: str) -> Any:
    """Loads a public name, or one of the submodules, when it is first asked for."""
    if name in _EXPORTS:
        return getattr(import_module(f"pyprune.{_EXPORTS[name]}"), name)
    if name in _MODULES:
        return import_module(f"pyprune.{name}")
    raise AttributeError(f"module 'pyprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_registration.register()
