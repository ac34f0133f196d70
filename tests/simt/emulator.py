"""The CUDA sources compiled as host C++ on the SIMT emulator (simt.h): how it is built, its switches, its memory."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import IntEnum
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import pybind11
import torch
from filelock import FileLock
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = (
    *sorted((ROOT / "csrc").glob("*.cu")),
    ROOT / "csrc/bindings.cpp",
    HERE / "controls.cpp",
    HERE / "primitives.cu",
    HERE / "faults.cu",
)
MODULE = "simt_kernels"
FLAGS = (
    "-std=c++17 -O2 -fPIC -fvisibility-inlines-hidden -fno-strict-aliasing -U_FORTIFY_SOURCE "
    f"-DPYPRUNE_SIMT -DPYPRUNE_WITH_CUDA -DPYPRUNE_MODULE={MODULE}"
).split()


def build() -> Path:
    """The emulated kernels as one shared library under build/; what was compiled from the same text is taken again."""
    compiler = os.environ.get("CXX", "g++")
    includes = [pybind11.get_include(), sysconfig.get_path("include"), str(ROOT / "csrc"), str(HERE)]
    command = [compiler, *FLAGS, *(f"-I{folder}" for folder in includes)]
    common = hashlib.sha256(" ".join(command).encode())
    for header in sorted([*(ROOT / "csrc").glob("*.*h"), *HERE.glob("*.h")]):
        common.update(header.read_bytes())

    def digest(source: Path) -> str:
        mine = common.copy()
        mine.update(source.read_bytes())
        return mine.hexdigest()[:16]

    folder = ROOT / "build/simt"
    objects = [folder / f"{source.name}.{digest(source)}.o" for source in SOURCES]
    everything = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
    library = folder / everything / f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if library.exists():
        return library

    library.parent.mkdir(parents=True, exist_ok=True)
    # Another process may be building the same: this one waits, and then takes what it finds.
    with FileLock(folder / "lock"), TemporaryDirectory(dir=folder) as scratch:

        def compile_one(source: Path, target: Path) -> None:
            if not target.exists():
                unfinished = Path(scratch, target.name)
                _run([*command, "-x", "c++", "-c", str(source), "-o", str(unfinished)])
                os.replace(unfinished, target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, SOURCES, objects))
        if not library.exists():
            unfinished = Path(scratch, library.name)
            _run([compiler, "-shared", *map(str, objects), "-o", str(unfinished)])
            os.replace(unfinished, library)
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {done.returncode}:\n{done.stdout}")


class Order(IntEnum):
    """In which order blocks, warps and threads take turns."""

    FORWARD = 0
    REVERSE = 1
    RANDOM = 2


@dataclass(frozen=True)
class Schedule:
    """One way to interleave threads and to land asynchronous copies; the fields are those of simt::Options."""

    order: Order = Order.FORWARD
    greedy: bool = False
    lazy: bool = True
    seed: int = 0
    skip_line: int = 0
    processors: int = 4

    def __str__(self) -> str:
        return f"{'lazy' if self.lazy else 'eager'}-{'greedy-' if self.greedy else ''}{self.order.name.lower()}"


LAZY = Schedule()
EAGER_GREEDY = Schedule(greedy=True, lazy=False)
SCHEDULES = (
    LAZY,
    EAGER_GREEDY,
    Schedule(Order.REVERSE, greedy=True, lazy=False),
    Schedule(Order.REVERSE, lazy=True),
    Schedule(Order.RANDOM, lazy=True, seed=1),
    Schedule(Order.RANDOM, lazy=False, seed=2),
)


class Emulator:
    """The compiled library: `cuda` holds the bound launchers, `call` the extern "C" test kernels."""

    def __init__(self) -> None:
        path = build()
        self._library = ctypes.CDLL(str(path))
        self._library.simt_allocate.restype = ctypes.c_void_p
        self._library.simt_allocate.argtypes = [ctypes.c_size_t, ctypes.c_bool]
        self.cuda = _load(path).cuda
        self.at_end = True
        self.configure(LAZY)

    def configure(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._library.simt_configure(
            int(schedule.order),
            schedule.greedy,
            schedule.lazy,
            ctypes.c_uint(schedule.seed),
            schedule.skip_line,
            schedule.processors,
        )

    @contextmanager
    def using(self, schedule: Schedule) -> Iterator[None]:
        before = self.schedule
        self.configure(schedule)
        try:
            yield
        finally:
            self.configure(before)

    @contextmanager
    def without(self, line: int) -> Iterator[None]:
        """Leaves out the barriers and waits of one source line."""
        with self.using(replace(self.schedule, skip_line=line)):
            yield

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """NaN-filled memory that ends (`at_end`) or starts flush with protected memory; valid until free_all()."""
        count = torch.Size(shape).numel()
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        size = count * dtype.itemsize
        address = self._library.simt_allocate(size, self.at_end)
        return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        return self.empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)

    def free_all(self) -> None:
        self._library.simt_free_all()

    def call(self, function: str, *arguments: Any) -> None:
        """Runs a test kernel; tensors are passed by address. RuntimeError with the emulator's message."""
        call_kernel(self._library, function, *arguments)


def call_kernel(library: ctypes.CDLL, function: str, *arguments: Any) -> None:
    """Calls an extern "C" launcher that returns null or an error's text."""
    run = getattr(library, function)
    run.restype = ctypes.c_char_p
    error = run(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments))
    if error is not None:
        raise RuntimeError(error.decode())


def _load(path: Path) -> ModuleType:
    spec = spec_from_loader(MODULE, ExtensionFileLoader(MODULE, str(path)))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def line_of(source: Path, text: str) -> int:
    """The number of the one line of a source file that contains `text`."""
    found = [number for number, line in enumerate(source.read_text().splitlines(), 1) if text in line]
    if len(found) != 1:
        raise ValueError(f"{source} has {len(found)} lines with {text!r}, expected one")
    return found[0]
