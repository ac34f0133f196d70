"""The golden test: every primitive of csrc/ptx.cuh on the device, against the PTX ISA, as tests/simt has its twins."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess

import pytest
import torch
from emulator import HERE, ROOT, call_kernel
from primitives import MMA_ATOL, bit_operations, copies, copies_8, fragments, matrices, sparse_fragments
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.sanitizer]
FOLDER = ROOT / "build/gpu"


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    """primitives.cu compiled for the device at hand; taken again as long as nothing it includes has changed."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or not torch.cuda.is_available():
        pytest.skip("needs nvcc on PATH and a CUDA device")
    major, minor = torch.cuda.get_device_capability()
    options = [f"-arch=sm_{major}{minor}", "-std=c++17", f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
    digest = hashlib.sha256(" ".join([nvcc, *options]).encode())
    for source in (HERE / "primitives.cu", HERE / "run.h", ROOT / "csrc/ptx.cuh", ROOT / "csrc/launch.h"):
        digest.update(source.read_bytes())
    path = FOLDER / f"primitives.{digest.hexdigest()[:16]}.so"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")  # another process may be building the same
        command = [nvcc, "-shared", "-Xcompiler", "-fPIC", *options, str(HERE / "primitives.cu"), "-o", str(unfinished)]
        subprocess.run(command, check=True)
        os.replace(unfinished, path)
    return ctypes.CDLL(str(path))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def run(library: ctypes.CDLL, function: str, inputs: tuple[Tensor, ...], out: Tensor, *options: bool) -> Tensor:
    """What the device writes into a copy of `out`."""
    found = out.cuda()
    call_kernel(library, function, *(tensor.cuda() for tensor in inputs), found, *options)
    return found.cpu()


def test_cp_async(library: ctypes.CDLL, generator: torch.Generator) -> None:
    data, size, expected = copies(generator)
    assert torch.equal(run(library, "run_copy", (data, size), torch.full_like(data, 255)), expected)


def test_cp_async_of_8_bytes(library: ctypes.CDLL, generator: torch.Generator) -> None:
    data, size, expected = copies_8(generator)
    assert torch.equal(run(library, "run_copy_8", (data, size), torch.full_like(data, 255)), expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(library: ctypes.CDLL, generator: torch.Generator, transposed: bool) -> None:
    data, expected = matrices(transposed, generator)
    assert torch.equal(run(library, "run_ldmatrix", (data,), torch.full_like(expected, -1), transposed), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mma(library: ctypes.CDLL, generator: torch.Generator, dtype: torch.dtype) -> None:
    for _ in range(20):
        a, b, c, expected = fragments(dtype, generator)
        found = run(library, "run_mma", (a, b, c), torch.full_like(c, torch.nan), dtype == torch.bfloat16)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=MMA_ATOL)


@pytest.mark.parametrize("selector", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mma_sp(library: ctypes.CDLL, dtype: torch.dtype, selector: bool, generator: torch.Generator) -> None:
    for _ in range(20):
        a, b, metadata, c, expected = sparse_fragments(dtype, selector, generator)
        options = (dtype == torch.bfloat16, selector)
        found = run(library, "run_mma_sp", (a, b, metadata, c), torch.full_like(c, torch.nan), *options)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=MMA_ATOL)


def test_bit_operations(library: ctypes.CDLL, generator: torch.Generator) -> None:
    *inputs, expected = bit_operations(generator)
    assert torch.equal(run(library, "run_bits", tuple(inputs), torch.zeros_like(expected)), expected)


def test_atomics(library: ctypes.CDLL) -> None:
    found = run(library, "run_atomics", (torch.arange(7, 39),), torch.tensor([5, -1]))
    assert found.tolist() == [5 + sum(range(7, 39)), 7]
