"""Builds pyprune._C: CPU kernels always, CUDA kernels when an nvcc is found. Needs a C++17 compiler, no torch.

PYPRUNE_CUDA        auto (default: CUDA when nvcc is found), 1 (CUDA or an error), 0 (CPU only)
PYPRUNE_CUDA_ARCHS  architectures, e.g. "80;90a", the newest also as PTX (default: those of DEFAULT_ARCHS nvcc knows)
PYPRUNE_CUTLASS     1: also 2:4 prefill on sm_90a by CUTLASS's sparse kernels, with the headers of the nvidia-cutlass
                    wheel (pip install --no-deps nvidia-cutlass) or under CUTLASS_PATH/include; a minute more, 4 GB of
                    memory (default: 0)
CXX, CUDA_HOME      the compiler and the toolkit, when the ones on PATH are not wanted
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from sysconfig import get_path

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("csrc")
DEFAULT_ARCHS = ("80", "90a", "100", "120")
CXX_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
)
BINDING_FLAGS = tuple("-O1" if flag == "-O3" else flag for flag in CXX_FLAGS)  # they only convert arguments
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v,-warn-spills")
ISA_FLAGS = {"generic": ()}
if platform.machine() in ("x86_64", "AMD64"):
    AVX2 = ("-mavx2", "-mfma", "-mf16c")
    AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
    BF16 = ("-mavx512bf16", "-mavx512vbmi", "-mavx512vbmi2")
    ISA_FLAGS |= {"avx2": AVX2, "avx512": AVX2 + AVX512, "avx512_bf16": AVX2 + AVX512 + BF16}


class BuildError(SystemExit):
    """Ends the build with one sentence instead of a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"pyprune: {message}")


def output_of(*command: str) -> str:
    """Standard output and error of a command that must succeed."""
    try:
        return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{' '.join(command)} failed with exit code {error.returncode}:\n{error.stdout}") from error


def find_compiler() -> str:
    """The C++ compiler: CXX, else g++, else c++."""
    wanted = os.environ.get("CXX")
    for candidate in [wanted] if wanted else ["g++", "c++"]:
        if found := shutil.which(candidate):
            return found
    raise BuildError(f"no C++ compiler: {wanted or 'g++ or c++'} is not on PATH; install one or set CXX to its path")


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit and the architectures to compile for."""

    nvcc: str
    root: Path
    release: str
    archs: tuple[str, ...]

    @property
    def gencode(self) -> list[str]:
        """nvcc options: machine code for every architecture, PTX of the newest for GPUs to come."""
        newest = re.sub(r"\D", "", self.archs[-1])
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        return [*codes, f"-gencode=arch=compute_{newest},code=compute_{newest}"]

    @property
    def link(self) -> list[str]:
        """Linker options for the static runtime, which loads the driver only when it is first used."""
        folders = [self.root / name for name in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")]
        libraries = next((folder for folder in folders if (folder / "libcudart_static.a").exists()), None)
        if libraries is None:
            raise BuildError(f"no libcudart_static.a under {self.root}; install the CUDA runtime's development files")
        culibos = ["-lculibos"] if (libraries / "libculibos.a").exists() else []
        return [f"-L{quote(str(libraries))}", "-lcudart_static", *culibos, "-ldl", "-lrt", "-lpthread"]


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME or CUDA_PATH, else the one on PATH."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if (home := os.environ.get(variable)) and (found := shutil.which("nvcc", path=str(Path(home) / "bin"))):
            return found
    return shutil.which("nvcc")


def toolkit_root(nvcc: str) -> Path:
    """The toolkit's folder, as nvcc itself sees it: the nvcc on PATH may be a wrapper script somewhere else."""
    top = re.search(r"^#\$ TOP=(.+)$", output_of(nvcc, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    return Path(top.group(1)).resolve() if top else Path(nvcc).resolve().parent.parent


def choose_archs(nvcc: str) -> tuple[str, ...]:
    """PYPRUNE_CUDA_ARCHS, or the default ones that this nvcc knows, oldest first."""
    known = set(re.findall(r"compute_(\w+)", output_of(nvcc, "--list-gpu-arch")))
    number = lambda arch: int(re.sub(r"\D", "", arch) or 0)  # noqa: E731
    supported = lambda arch: re.sub(r"[af]$", "", arch) in known  # noqa: E731
    wanted = [arch for arch in re.split(r"[;,\s]+", os.environ.get("PYPRUNE_CUDA_ARCHS", "")) if arch]
    if unknown := [arch for arch in wanted if not supported(arch)]:
        raise BuildError(
            f"PYPRUNE_CUDA_ARCHS names {', '.join(unknown)}, {nvcc} knows {', '.join(sorted(known, key=number))}"
        )
    archs = wanted or [arch for arch in DEFAULT_ARCHS if supported(arch)]
    if not archs:
        raise BuildError(
            f"{nvcc} knows none of sm_{', sm_'.join(DEFAULT_ARCHS)}; use CUDA 11.1 or later, or PYPRUNE_CUDA=0"
        )
    return tuple(sorted(archs, key=number))


def find_cuda() -> tuple[Cuda | None, str]:
    """The toolkit to build with, or None, and the reason in words."""
    wanted = os.environ.get("PYPRUNE_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise BuildError(f"PYPRUNE_CUDA is {wanted!r}; set it to 0, 1 or auto")
    if wanted == "0":
        return None, "PYPRUNE_CUDA=0"
    nvcc = find_nvcc()
    if nvcc is None:
        if wanted == "1":
            raise BuildError(
                "PYPRUNE_CUDA=1 but there is no nvcc; put it on PATH, set CUDA_HOME, or use PYPRUNE_CUDA=0"
            )
        return None, "no nvcc on PATH or under CUDA_HOME"
    release = re.search(r"release ([\d.]+)", output_of(nvcc, "--version"))
    cuda = Cuda(nvcc, toolkit_root(nvcc), release.group(1) if release else "unknown", choose_archs(nvcc))
    return cuda, f"CUDA {cuda.release} at {cuda.root}"


def find_cutlass(cuda: Cuda | None) -> tuple[Path | None, str]:
    """CUTLASS's headers, or None, and the reason in words."""
    wanted = os.environ.get("PYPRUNE_CUTLASS", "0")
    if wanted not in ("0", "1"):
        raise BuildError(f"PYPRUNE_CUTLASS is {wanted!r}; set it to 0 or 1")
    if wanted == "0":
        return None, "PYPRUNE_CUTLASS=1 at build time adds it"
    if cuda is None or "90a" not in cuda.archs:
        raise BuildError("PYPRUNE_CUTLASS=1 needs nvcc and 90a among the architectures of PYPRUNE_CUDA_ARCHS")
    package = find_spec("cutlass_library")
    folders = [Path(os.environ["CUTLASS_PATH"])] if "CUTLASS_PATH" in os.environ else []
    if package is not None and package.origin is not None:
        folders.append(Path(package.origin).parent / "source")
    for folder in folders:
        if (folder / "include/cutlass/cutlass.h").exists():
            return (folder / "include").resolve(), f"headers at {folder}"
    raise BuildError(
        "PYPRUNE_CUTLASS=1 but there are no headers; pip install --no-deps nvidia-cutlass (and build with "
        "--no-build-isolation), or set CUTLASS_PATH to a folder with include/cutlass"
    )


class NinjaFile:
    """The text of a build.ninja with the three rules this package needs."""

    def __init__(self, build: Path, compiler: str, cuda: Cuda | None) -> None:
        self.build = build
        self.objects: list[Path] = []
        self.lines = ["ninja_required_version = 1.5"]
        self.rule("cxx", f"{compiler} $flags -MMD -MF $out.d -c $in -o $out", depfile=True)
        self.rule("link", f"{compiler} -shared $in $flags -o $out")
        if cuda:
            self.rule("nvcc", f"{cuda.nvcc} $flags -MMD -MF $out.d -c $in -o $out", depfile=True)

    def rule(self, name: str, command: str, depfile: bool = False) -> None:
        """Adds a rule; with `depfile` an edited header rebuilds what includes it."""
        dependencies = ["  depfile = $out.d", "  deps = gcc"] if depfile else []
        self.lines += [f"rule {name}", f"  command = {command}", *dependencies]

    def compile(self, rule: str, source: Path, name: str, *flags: str) -> None:
        """Adds one object file."""
        target = self.build / f"{name}.o"
        self.objects.append(target)
        self.edge(rule, target, [source.resolve()], *flags)

    def edge(self, rule: str, target: Path, inputs: list[Path], *flags: str) -> None:
        """Adds one build step. Paths may hold spaces, colons and dollars."""
        escape = lambda path: re.sub(r"([$ :])", r"$\1", str(path))  # noqa: E731
        options = " ".join(flags).replace("$", "$$")
        self.lines += [f"build {escape(target)}: {rule} {' '.join(map(escape, inputs))}", f"  flags = {options}"]

    def run(self) -> None:
        """Compiles everything, as many files at a time as there are cores."""
        self.build.mkdir(parents=True, exist_ok=True)
        (self.build / "build.ninja").write_text("\n".join(self.lines) + "\n")
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(self.build), "-v"]
        if subprocess.run(command).returncode != 0:
            raise BuildError("compilation failed; the compiler's message is above")


class BuildKernels(build_ext):
    """Compiles csrc/ with ninja into one extension module."""

    def build_extension(self, extension: Extension) -> None:
        """Writes build.ninja, runs it, and says what came out."""
        compiler = find_compiler()
        cuda, reason = find_cuda()
        cutlass, cutlass_reason = find_cutlass(cuda)
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build = Path(self.build_temp).resolve()
        info = self.build_info(compiler, cuda, reason)
        info |= {"cutlass": cutlass is not None, "cutlass_reason": cutlass_reason}
        file = NinjaFile(build, compiler, cuda)

        for source in sorted(SOURCES.glob("*_cpu.cpp")):
            for isa, flags in ISA_FLAGS.items():
                options = (*CXX_FLAGS, "-fopenmp", *flags, f"-DPYPRUNE_ISA={isa}")
                file.compile("cxx", source, f"{source.stem}_{isa}", *options)
        defines = ["-DPYPRUNE_WITH_CPU"]
        includes = [f"-isystem {quote(path)}" for path in (pybind11.get_include(), get_path("include"))]
        if cuda:
            defines.append("-DPYPRUNE_WITH_CUDA")
            for source in sorted(SOURCES.glob("*.cu")):
                file.compile(
                    "nvcc",
                    source,
                    f"{source.stem}_cuda",
                    *NVCC_FLAGS,
                    *cuda.gencode,
                    f"--threads={len(cuda.archs) + 1}",
                )
        if cutlass:
            defines.append("-DPYPRUNE_WITH_CUTLASS")
            options = (*NVCC_FLAGS, "--expt-relaxed-constexpr", "-gencode=arch=compute_90a,code=sm_90a")
            source = SOURCES / "cutlass/sparse_gemm.cu"
            file.compile("nvcc", source, "sparse_gemm_cutlass", *options, f"-isystem {quote(str(cutlass))}")
        described = f"-include {quote(str(self.write_info(build, info)))}"
        file.compile("cxx", SOURCES / "bindings.cpp", "bindings", *BINDING_FLAGS, *defines, *includes, described)
        file.edge("link", target, file.objects, "-fopenmp", *(cuda.link if cuda else []))
        file.run()
        self.report(info, target)

    def build_info(self, compiler: str, cuda: Cuda | None, reason: str) -> dict[str, object]:
        """What `pyprune info` shows about this build."""
        return {
            "compiler": output_of(compiler, "--version").splitlines()[0],
            "cxx_flags": " ".join(CXX_FLAGS),
            "isas": list(ISA_FLAGS),
            "cuda": cuda.release if cuda else None,
            "cuda_reason": reason,
            "cuda_archs": list(cuda.archs) if cuda else [],
            "nvcc_flags": " ".join([*NVCC_FLAGS, *cuda.gencode]) if cuda else "",
            "python": platform.python_version(),
        }

    def write_info(self, build: Path, info: dict[str, object]) -> Path:
        """The build's description as a header; rewritten only when it changed, so that nothing recompiles for it."""
        header = build / "build_info.h"
        text = f"#define PYPRUNE_BUILD_INFO {json.dumps(json.dumps(info))}\n"
        build.mkdir(parents=True, exist_ok=True)
        if not header.exists() or header.read_text() != text:
            header.write_text(text)
        return header

    def report(self, info: dict[str, object], target: Path) -> None:
        """The last lines of the build."""
        cuda = (
            f"yes, {info['cuda_reason']}, sm_{', sm_'.join(info['cuda_archs'])}"
            if info["cuda"]
            else f"no: {info['cuda_reason']}"
        )
        print(f"pyprune: built {target.name} ({target.stat().st_size / 2**20:.1f} MiB) with {info['compiler']}")
        print(f"pyprune:   CPU kernels: {', '.join(info['isas'])}\npyprune:   CUDA kernels: {cuda}")
        if info["cuda"]:
            print(f"pyprune:   CUTLASS: {'yes' if info['cutlass'] else 'no'}, {info['cutlass_reason']}")
        sys.stdout.flush()


setup(ext_modules=[Extension("pyprune._C", sources=[])], cmdclass={"build_ext": BuildKernels})
