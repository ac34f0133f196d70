"""csrc/rank.cu on a device: the emulator's checks, and a layer of real size."""

from __future__ import annotations

import pytest
import torch
from rank_checks import DTYPES, SHAPES, Launchers, check_gradient, check_mask, make_inputs, rank_bucket_grad, rank_mask

from pyprune import ops

pytestmark = pytest.mark.gpu


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 8)], ids=str)
def test_agrees_with_fp64(launchers: Launchers, shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = make_inputs(*shape, dtype)
    check_mask(inputs, rank_mask(launchers, inputs))
    for steps in (1, 100, 255):
        check_gradient(inputs, steps, rank_bucket_grad(launchers, inputs, steps))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_fp64_at_size(device: torch.device, dtype: torch.dtype) -> None:
    inputs = make_inputs(4096, 11008, dtype, "cuda")
    check_mask(inputs, ops.rank_mask(inputs["weight"], inputs["rank"], inputs["threshold"]))
    check_gradient(inputs, 100, ops.rank_bucket_grad(inputs["grad"], inputs["weight"], inputs["rank"], 100))


def test_gradient_of_the_rates_is_the_cpus(device: torch.device) -> None:
    """`rank_allocate` in fp64, which the reference computes on both."""
    weight, rank = torch.randn(5, 300, dtype=torch.float64), torch.rand(5, 300).argsort(1).to(torch.uint16)
    logits, direction = torch.randn(5, 101, dtype=torch.float64), torch.randn(5, 300, dtype=torch.float64)

    def run(where: str) -> tuple[torch.Tensor, torch.Tensor]:
        beta = logits.to(where).softmax(1).requires_grad_()
        out = ops.rank_allocate(weight.to(where), rank.to(where), beta)
        return out.detach().cpu(), torch.autograd.grad(out, beta, direction.to(where))[0].cpu()

    for ours, right in zip(run("cuda"), run("cpu"), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)
