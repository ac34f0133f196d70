"""The package: what was built, importing without it, the build's errors, `pyprune info`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
import torch

from pyprune import _native, info, ops
from pyprune._cuda import runs_on

ROOT = Path(__file__).parents[1]
needs_module = pytest.mark.skipif(_native.module is None, reason=f"no compiled module: {_native.why_missing}")

HIDE_COMPILED = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "pyprune._C":
            raise ImportError("hidden by the test")
sys.meta_path.insert(0, Hide())
"""


def python(code: str, **environment: str) -> str:
    """Standard output of a fresh interpreter."""
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, text=True, capture_output=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


# ------------------------------------------------------------------------------------------------------------- imports


def test_without_the_compiled_module_the_reference_serves() -> None:
    code = f"""{HIDE_COMPILED}
import torch
import pyprune
from pyprune import info, ops
tensors = [torch.randn(4, 6), torch.randn(2, 6), torch.randn(2), torch.randn(6, 2), torch.randn(6)]
x, l0, v, l1, mask = (t.requires_grad_() for t in tensors)
y = ops.hsm(x, l0, v, l1, mask)
y.sum().backward()
torch.testing.assert_close(y, mask * (x + (x @ l0.T * v) @ l1.T))
assert mask.grad is not None
print(ops.choose("hsm", torch.device("cpu"), torch.bfloat16)[0].name)
print(info.render(info.report()))
"""
    output = python(code)
    assert output.startswith("reference\n")
    assert "compiled   no: hidden by the test" in output
    assert "plain torch; no compiled module: hidden by the test" in output


def test_importing_is_quick() -> None:
    """The package itself pulls in neither torch nor transformers; they load with the first name that needs them."""
    code = """
import sys, pyprune
assert not {"torch", "transformers", "pyprune._C"} & set(sys.modules)
assert "HSM" in dir(pyprune)
pyprune.HSM
assert "torch" in sys.modules and "transformers" not in sys.modules
"""
    python(code)


def test_unknown_names_are_attribute_errors() -> None:
    import pyprune

    with pytest.raises(AttributeError, match="module 'pyprune' has no attribute 'Hsm'"):
        pyprune.Hsm  # noqa: B018


@needs_module
def test_environment_chooses_the_instruction_set() -> None:
    code = "from pyprune import _native; print(_native.cpu.isa())"
    assert python(code, PYPRUNE_ISA="generic") == "generic\n"
    assert python(code, PYPRUNE_ISA="") == f"{_native.cpu.isas()[0]}\n"
    broken = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYPRUNE_ISA": "mmx"}, text=True, capture_output=True, cwd=ROOT
    )
    assert "ValueError: PYPRUNE_ISA: isa 'mmx' does not run on this machine" in broken.stderr


@needs_module
@pytest.mark.skipif(not (shutil.which("nm") and shutil.which("readelf")), reason="binutils are not installed")
def test_module_depends_on_neither_torch_nor_the_driver() -> None:
    """No symbol of torch is undefined, and no CUDA library is loaded: one binary serves every torch and no driver."""
    symbols = subprocess.check_output(["nm", "-D", "--undefined-only", _native.module.__file__], text=True)
    undefined = [line.split()[-1] for line in symbols.splitlines()]
    assert "GOMP_parallel" in "\n".join(undefined)
    assert not [s for s in undefined if "c10" in s or "torch" in s or s.startswith("_ZN2at") or s.startswith("cu")]
    dynamic = subprocess.check_output(["readelf", "-d", _native.module.__file__], text=True)
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    allowed = ("libstdc++", "libgomp", "libgcc_s", "libc.so", "libm.so", "ld-linux", "libpthread", "libdl", "librt")
    assert all(library.startswith(allowed) for library in needed), needed


# ----------------------------------------------------------------------------------------------------- choice of device


@pytest.mark.parametrize(
    ("capability", "archs", "expected"),
    [
        ((8, 0), ["80", "90a", "100", "120"], True),
        ((8, 9), ["80", "90a", "100", "120"], True),  # machine code of the same major version
        ((9, 0), ["80", "90a", "100", "120"], True),
        ((12, 1), ["80", "90a", "100", "120"], True),
        ((13, 0), ["80", "90a", "100", "120"], True),  # PTX of the newest
        ((7, 5), ["80", "90a", "100", "120"], False),
        ((9, 0), ["80", "100"], False),  # PTX is of the newest only
        ((9, 1), ["90a", "100"], False),  # a suffix ties the code to one version
        ((8, 0), ["86"], False),
        ((8, 0), [], False),
    ],
)
def test_which_devices_the_built_code_runs_on(capability: tuple[int, int], archs: list[str], expected: bool) -> None:
    assert runs_on(capability, archs) is expected


def test_info_tells_what_runs_where() -> None:
    report = info.report()
    cpu_rows = {row["op"]: row for row in report["ops"] if row["device"] == "cpu"}
    implementation, why = ops.choose("hsm", torch.device("cpu"), torch.float32)
    assert set(cpu_rows) == set(ops.OPS)
    assert all(row["runs"] == implementation.name and row["why"] == why for row in cpu_rows.values())
    page = info.render(report)
    assert f"torch {torch.__version__}" in page
    assert len(page.splitlines()) < 50
    with ops.using("reference"):
        assert {row["runs"] for row in info.report()["ops"]} == {"reference"}


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("AMD EPYC", "AMD EPYC (family 25 model 17)"),
        ("AMD EPYC-Milan Processor", "AMD EPYC-Milan Processor (family 25 model 17)"),
        ("Intel(R) Xeon(R) CPU @ 2.900GHz", "Intel(R) Xeon(R) CPU @ 2.900GHz (family 25 model 17)"),
        ("AMD EPYC 7763 64-Core Processor", "AMD EPYC 7763 64-Core Processor"),
        ("Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz", "Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz"),
    ],
)
def test_a_processor_without_a_number_of_its_own_has_family_and_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, shown: str
) -> None:
    monkeypatch.setattr(info, "CPUINFO", tmp_path / "cpuinfo")
    one = f"processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: {name}\nstepping\t: 1\n\n"
    info.CPUINFO.write_text(one + one.replace("17", "18"))
    assert info.processor() == shown
    info.CPUINFO.write_text(f"model name\t: {name}\n\n")
    assert info.processor() == name


def test_a_processor_that_linux_does_not_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(info, "CPUINFO", tmp_path / "nowhere")
    monkeypatch.setattr(info.platform, "processor", lambda: "")
    monkeypatch.setattr(info.platform, "machine", lambda: "aarch64")
    assert info.processor() == "aarch64"


# ------------------------------------------------------------------------------------------------------------ the build


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, without running it."""
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    variables = (
        "PYPRUNE_CUDA",
        "PYPRUNE_CUDA_ARCHS",
        "PYPRUNE_CUTLASS",
        "CUTLASS_PATH",
        "CUDA_HOME",
        "CUDA_PATH",
        "CXX",
    )
    for variable in variables:
        monkeypatch.delenv(variable, raising=False)
    spec = importlib.util.spec_from_file_location("pyprune_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pyprune_setup", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up CUDA 12.0 toolkit whose nvcc on PATH is a wrapper script elsewhere."""
    root, wrappers = tmp_path / "cuda-12.0", tmp_path / "bin"
    (root / "bin").mkdir(parents=True)
    (root / "lib64").mkdir()
    (root / "lib64" / "libcudart_static.a").touch()
    wrappers.mkdir()
    script = f"""#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release 12.0, V12.0.1" ;;
  --list-gpu-arch) printf 'compute_70\\ncompute_80\\ncompute_86\\ncompute_90\\n' ;;
  --dryrun*) echo '#$ TOP={root}/bin/..' ;;
esac
"""
    (wrappers / "nvcc").write_text(script)
    (wrappers / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(wrappers))
    return root


def test_finds_the_toolkit_behind_a_wrapper(build: ModuleType, toolkit: Path) -> None:
    cuda, reason = build.find_cuda()
    assert cuda.root == toolkit
    assert cuda.archs == ("80", "90a"), "the default ones that this nvcc knows"
    assert cuda.link[0] == f"-L{toolkit}/lib64"
    assert cuda.gencode[-1] == "-gencode=arch=compute_90,code=compute_90", "PTX of the newest, without its suffix"
    assert reason == f"CUDA 12.0 at {toolkit}"


def test_architectures_are_chosen_and_checked(
    build: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYPRUNE_CUDA_ARCHS", "90a;86")
    assert build.find_cuda()[0].archs == ("86", "90a")
    monkeypatch.setenv("PYPRUNE_CUDA_ARCHS", "86 120")
    with pytest.raises(SystemExit, match=r"PYPRUNE_CUDA_ARCHS names 120, .*nvcc knows 70, 80, 86, 90"):
        build.find_cuda()


def test_without_nvcc(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.find_cuda() == (None, "no nvcc on PATH or under CUDA_HOME")
    monkeypatch.setenv("PYPRUNE_CUDA", "1")
    with pytest.raises(SystemExit, match="PYPRUNE_CUDA=1 but there is no nvcc; put it on PATH, set CUDA_HOME, or use"):
        build.find_cuda()
    with pytest.raises(
        SystemExit, match="no C\\+\\+ compiler: g\\+\\+ or c\\+\\+ is not on PATH; install one or set CXX"
    ):
        build.find_compiler()


def test_cuda_can_be_switched_off(build: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYPRUNE_CUDA", "0")
    assert build.find_cuda() == (None, "PYPRUNE_CUDA=0")
    monkeypatch.setenv("PYPRUNE_CUDA", "yes")
    with pytest.raises(SystemExit, match="PYPRUNE_CUDA is 'yes'; set it to 0, 1 or auto"):
        build.find_cuda()


def test_missing_static_runtime_is_named(build: ModuleType, toolkit: Path) -> None:
    (toolkit / "lib64" / "libcudart_static.a").unlink()
    with pytest.raises(SystemExit, match=r"no libcudart_static.a under .*cuda-12.0; install the CUDA runtime's"):
        build.find_cuda()[0].link  # noqa: B018


def test_cutlass_is_added_on_request(
    build: ModuleType, toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, _ = build.find_cuda()
    assert build.find_cutlass(cuda) == (None, "PYPRUNE_CUTLASS=1 at build time adds it")
    monkeypatch.setenv("PYPRUNE_CUTLASS", "yes")
    with pytest.raises(SystemExit, match="PYPRUNE_CUTLASS is 'yes'; set it to 0 or 1"):
        build.find_cutlass(cuda)
    monkeypatch.setenv("PYPRUNE_CUTLASS", "1")
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="there are no headers; pip install --no-deps nvidia-cutlass"):
        build.find_cutlass(cuda)
    (tmp_path / "include/cutlass").mkdir(parents=True)
    (tmp_path / "include/cutlass/cutlass.h").touch()
    assert build.find_cutlass(cuda) == (tmp_path / "include", f"headers at {tmp_path}")
    with pytest.raises(SystemExit, match="needs nvcc and 90a among the architectures"):
        build.find_cutlass(None)


def test_source_distribution_holds_the_kernels(tmp_path: Path) -> None:
    """An sdist of a copy of the tree: every file the build reads, without git or network."""
    copy = tmp_path / "tree"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "runs")
    )
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path], cwd=copy, check=True, capture_output=True
    )
    (archive,) = tmp_path.glob("pyprune-*.tar.gz")
    with tarfile.open(archive) as files:
        packed = {Path(*Path(name).parts[1:]) for name in files.getnames()}
    files = (path for path in (ROOT / "csrc").rglob("*") if path.is_file() and not path.name.startswith("."))
    sources = {path.relative_to(ROOT) for path in files}
    assert sources
    assert sources | {Path("pyproject.toml"), Path("setup.py"), Path("LICENSE"), Path("pyprune/ops.py")} <= packed
