"""Makes `from_pretrained` know packed checkpoints after `import pyprune`, whichever of the two is imported first.

transformers has a registry for quantisation methods, but no entry point that would ask packages for theirs, and it
takes seconds to import. So when transformers' registry is loaded already, ours is added at once. Otherwise a finder on
`sys.meta_path`, the place that Python's import system has for this, waits for the registry to be imported, adds ours
right after, and is gone. Nothing of transformers is changed or replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Now, or when transformers' registry is imported."""
    if REGISTRY in sys.modules:
        import_module("pyprune.quantizer")
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the registry as Python does, with a loader that registers after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Another loader, and the registration once it has run the module."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        import_module("pyprune.quantizer")
