"""nvcc compiles every .cu for every architecture we ship, without a spilled register."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from emulator import ROOT

NVCC = shutil.which("nvcc")
ARCHS = ("80", "90a", "100", "120")
SOURCES = [source for source in sorted((ROOT / "csrc").glob("*.cu")) if "__global__" in source.read_text()]
FIGURES = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")


def compile_device_code(source: Path, folder: Path, *options: str) -> str:
    """Compiles for every architecture; what ptxas reports."""
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    command = [
        str(NVCC),
        "-std=c++17",
        "-O3",
        "--threads=2",
        *codes,
        *options,
        "-c",
        str(source),
        "-o",
        str(folder / "out.o"),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}"
    return done.stdout


def readable(names: list[str]) -> list[str]:
    """C++ names without namespaces and parameters."""
    if shutil.which("c++filt") is None:
        return names
    done = subprocess.run(["c++filt"], input="\n".join(names), stdout=subprocess.PIPE, text=True, check=True)
    short = [re.sub(r"pyprune::|\(anonymous namespace\)::|^void ", "", name) for name in done.stdout.splitlines()]
    return [re.sub(r"\((?!Epilogue).*", "", name) for name in short]


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_no_spills(source: Path, tmp_path: Path) -> None:
    figures = [match.groupdict() for match in FIGURES.finditer(compile_device_code(source, tmp_path, "-Xptxas", "-v"))]
    kernels = {figure["name"] for figure in figures}
    assert len(figures) == len(kernels) * len(ARCHS) > 0, "ptxas did not report every kernel for every architecture"
    spills = []
    print(f"\n{'registers (bytes spilled)':44}" + "".join(f"{'sm_' + arch:>10}" for arch in ARCHS))
    for mangled, name in sorted(zip(kernels, readable(list(kernels)), strict=True), key=lambda pair: pair[1]):
        row = {figure["arch"]: figure for figure in figures if figure["name"] == mangled}
        cells = [row[f"sm_{arch}"] for arch in ARCHS]
        spilled = [int(cell["stores"]) + int(cell["loads"]) for cell in cells]
        print(f"{name:44}" + "".join(f"{cell['registers']:>6}{s:4}" for cell, s in zip(cells, spilled, strict=True)))
        spills += [f"{name} for sm_{arch}: {s} bytes" for arch, s in zip(ARCHS, spilled, strict=True) if s]
    assert not spills, f"spilled registers: {', '.join(spills)}"


@needs_nvcc
def test_the_device_test_kernels_compile(tmp_path: Path) -> None:
    here = Path(__file__).parent
    compile_device_code(here / "primitives.cu", tmp_path, f"-I{ROOT / 'csrc'}", f"-I{here}")
