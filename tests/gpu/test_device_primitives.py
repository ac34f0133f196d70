"""The golden test: every primitive of csrc/ptx.cuh on the device, against the PTX ISA and against its emulated twin."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator

import pytest
import torch
from emulator import HERE, ROOT, Emulator, call_kernel
from primitives import MMA_ATOL, bit_operations, copies, copies_8, fragments, matrices, sparse_fragments
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.sanitizer]


@pytest.fixture(scope="module")
def device_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """primitives.cu compiled for the device at hand."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or not torch.cuda.is_available():
        pytest.skip("needs nvcc on PATH and a CUDA device")
    major, minor = torch.cuda.get_device_capability()
    path = tmp_path_factory.mktemp("primitives") / "primitives.so"
    options = [f"-arch=sm_{major}{minor}", "-std=c++17", f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
    command = [nvcc, "-shared", "-Xcompiler", "-fPIC", *options, str(HERE / "primitives.cu"), "-o", str(path)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(path))


@pytest.fixture(scope="module")
def twins() -> Iterator[Emulator]:
    emulator = Emulator()
    yield emulator
    emulator.free_all()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def both(
    device_library: ctypes.CDLL, twins: Emulator, function: str, inputs: tuple[Tensor, ...], out: Tensor, *options: bool
) -> tuple[Tensor, Tensor]:
    """What the device and what the emulator write, from the same inputs into the same poison."""
    on_device = out.cuda()
    call_kernel(device_library, function, *(tensor.cuda() for tensor in inputs), on_device, *options)
    emulated = twins.copy(out)
    twins.call(function, *map(twins.copy, inputs), emulated, *options)
    return on_device.cpu(), emulated


def test_cp_async(device_library: ctypes.CDLL, twins: Emulator, generator: torch.Generator) -> None:
    data, size, expected = copies(generator)
    device, emulated = both(device_library, twins, "run_copy", (data, size), torch.full_like(data, 255))
    assert torch.equal(device, expected)
    assert torch.equal(device, emulated)


def test_cp_async_of_8_bytes(device_library: ctypes.CDLL, twins: Emulator, generator: torch.Generator) -> None:
    data, size, expected = copies_8(generator)
    device, emulated = both(device_library, twins, "run_copy_8", (data, size), torch.full_like(data, 255))
    assert torch.equal(device, expected)
    assert torch.equal(device, emulated)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(device_library: ctypes.CDLL, twins: Emulator, generator: torch.Generator, transposed: bool) -> None:
    data, expected = matrices(transposed, generator)
    device, emulated = both(device_library, twins, "run_ldmatrix", (data,), torch.full_like(expected, -1), transposed)
    assert torch.equal(device, expected)
    assert torch.equal(device, emulated)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mma(device_library: ctypes.CDLL, twins: Emulator, generator: torch.Generator, dtype: torch.dtype) -> None:
    for _ in range(20):
        a, b, c, expected = fragments(dtype, generator)
        poison = torch.full_like(c, float("nan"))
        device, emulated = both(device_library, twins, "run_mma", (a, b, c), poison, dtype == torch.bfloat16)
        torch.testing.assert_close(device.double(), expected, rtol=0, atol=MMA_ATOL)
        torch.testing.assert_close(device, emulated, rtol=0, atol=MMA_ATOL)


@pytest.mark.parametrize("selector", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mma_sp(
    device_library: ctypes.CDLL, twins: Emulator, dtype: torch.dtype, selector: bool, generator: torch.Generator
) -> None:
    a, b, metadata, c, expected = sparse_fragments(dtype, selector, generator)
    options = (dtype == torch.bfloat16, selector)
    device, emulated = both(
        device_library, twins, "run_mma_sp", (a, b, metadata, c), torch.full_like(c, torch.nan), *options
    )
    torch.testing.assert_close(device.double(), expected, rtol=0, atol=MMA_ATOL)
    torch.testing.assert_close(device, emulated, rtol=0, atol=MMA_ATOL)


def test_bit_operations(device_library: ctypes.CDLL, twins: Emulator, generator: torch.Generator) -> None:
    *inputs, expected = bit_operations(generator)
    device, emulated = both(device_library, twins, "run_bits", tuple(inputs), torch.zeros_like(expected))
    assert torch.equal(device, expected)
    assert torch.equal(device, emulated)


def test_atomics(device_library: ctypes.CDLL, twins: Emulator) -> None:
    device, emulated = both(device_library, twins, "run_atomics", (torch.arange(7, 39),), torch.tensor([5, -1]))
    assert device.tolist() == emulated.tolist() == [5 + sum(range(7, 39)), 7]
