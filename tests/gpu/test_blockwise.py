"""One-shot pruning with blocks on the GPU and hidden states in host memory, against the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from decoders import calibration, decoder
from surgery.tiny_decoders import tiny

from pyprune.blockwise import Block, prune
from pyprune.calibration import Gram
from pyprune.methods.slimgpt import SlimGPT
from pyprune.methods.sparsegpt import SparseGPT
from pyprune.methods.wanda import Wanda

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gram_matrices_of_half_precision_are_summed_in_fp32(dtype: torch.dtype) -> None:
    """4,096 tokens in 32 parts: fp32 sums are off by at most their number of roundings, bf16 results by 4e-3."""
    x = torch.randn(4096, 96, device="cuda", dtype=dtype)
    gram = Gram(x)
    for part in x.split(128):
        gram.add(part)
    expected = x.double().T @ x.double()
    assert gram.total.dtype == torch.float32
    assert float((gram.total - expected).abs().max()) < 4096 * 2**-24 * float(expected.diagonal().max())


@pytest.mark.parametrize("keep", ["host", "disk", "device"])
def test_blocks_on_the_gpu_end_as_on_the_cpu(keep: str) -> None:
    """In fp64, where both choose the same masks; the model itself stays on the CPU."""
    for method in (Wanda(sparsity=0.5), SparseGPT(sparsity=0.5, damping=0.02)):
        devices: list[str] = []

        def note(block: Block, devices: list[str] = devices) -> None:
            devices.append(block.forward(0).device.type)

        model, batches = decoder("llama"), calibration(5)
        expected = copy.deepcopy(model)
        prune(expected, method, batches, device="cpu")
        prune(model, method, batches, then=[note], keep=keep)  # type: ignore[arg-type]
        assert devices == ["cuda", "cuda"] and next(model.parameters()).device.type == "cpu"
        for name, value in expected.state_dict().items():
            assert torch.equal(model.state_dict()[name] == 0, value == 0), name
            assert torch.allclose(model.state_dict()[name], value, rtol=1e-8, atol=1e-10), name


def test_slimgpt_on_the_gpu_cuts_as_on_the_cpu() -> None:
    """In fp64: the same groups go, and the others become the same, but for transformers' angles and norms, which are
    fp32 in an fp64 model: 1e-7 of noise in them moves a weight by 3e-7 of the largest; allowed is six times that."""
    method = SlimGPT(target="heads=1,channels=12")
    ids = torch.randint(3, 61, (3, 4, 12), generator=torch.Generator().manual_seed(3))
    expected, found = (method.cut(tiny("llama").to(device), list(ids)).state_dict() for device in ("cpu", "cuda"))
    for name, value in expected.items():
        assert found[name].is_cuda and found[name].shape == value.shape, name
        torch.testing.assert_close(found[name].cpu(), value, rtol=0, atol=2e-6 * float(value.abs().max()), msg=name)
