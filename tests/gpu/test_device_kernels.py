"""csrc/hsm_fused.cu on a device: the emulator's numeric checks, larger shapes, streams, and the ops of pyprune.ops."""

from __future__ import annotations

import pytest
import torch
from hsm_checks import DTYPES, EMPTY_SHAPES, OPS, SHAPES, Launchers, Op, Shape, check, make_inputs

from pyprune import ops, reference

LARGE = (Shape(2048, 2048, 104, 2048), Shape(2049, 2048, 104, 1536), Shape(40000, 256, 13, 256))

pytestmark = pytest.mark.gpu


@pytest.mark.sanitizer
@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + EMPTY_SHAPES, ids=str)
def test_agrees_with_fp64(launchers: Launchers, shape: Shape, dtype: torch.dtype, op: Op) -> None:
    tensors = make_inputs(shape, dtype)
    check(op, tensors, op.launch(launchers, shape, tensors))


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_agrees_with_fp64_at_size(launchers: Launchers, shape: Shape, dtype: torch.dtype, op: Op) -> None:
    tensors = make_inputs(shape, dtype, device="cuda")
    check(op, tensors, op.launch(launchers, shape, tensors))


@pytest.mark.parametrize("op", OPS, ids=str)
def test_bitwise_the_same_from_run_to_run(launchers: Launchers, op: Op) -> None:
    tensors = make_inputs(LARGE[0], torch.bfloat16, device="cuda")
    first = op.launch(launchers, LARGE[0], tensors)
    for _ in range(10):
        again = op.launch(launchers, LARGE[0], tensors)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_offsets_past_two_to_the_31(launchers: Launchers) -> None:
    """x of 2.2e9 elements: its last rows are right only if every offset is 64 bits wide."""
    shape = Shape(1_100_000, 2000, 8, 2000)
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free device memory")
    op = OPS[0]
    tail = make_inputs(Shape(64, *shape[1:]), torch.bfloat16)
    device = {name: tail[name].cuda() for name in op.inputs}
    device["x"] = torch.zeros(shape.tokens, shape.hidden, dtype=torch.bfloat16, device="cuda")
    device["x"][-64:] = tail["x"].cuda()
    y = torch.full_like(device["x"], float("nan"))
    h = torch.full((shape.tokens, shape.rank), float("nan"), dtype=torch.bfloat16, device="cuda")
    workspace = torch.empty(launchers.cuda.hsm_workspace(shape, 1), dtype=torch.uint8, device="cuda")
    addresses = [t.data_ptr() for t in (*(device[name] for name in op.inputs), y, h, workspace)]
    launchers.cuda.hsm_forward(shape, 1, *addresses, launchers.stream())
    assert (y[:-64] == 0).all()
    check(op, tail, {"y": y[-64:].cpu(), "h": h[-64:].cpu()})


@pytest.mark.parametrize("op", ["hsm", "hsm_residual_rmsnorm"])
def test_functional_api_runs_on_the_kernels_and_another_stream(device: torch.device, op: str) -> None:
    tensors = make_inputs(Shape(300, 512, 24, 448), torch.bfloat16)
    names = ["x", "l0", "v", "l1", "mask"] + (["residual", "weight"] if op == "hsm_residual_rmsnorm" else [])
    options = (1e-5,) if op == "hsm_residual_rmsnorm" else ()

    def gradients(dtype: torch.dtype | None) -> list[torch.Tensor]:
        inputs = [tensors[name].to(device, dtype).requires_grad_() for name in names]
        outputs = getattr(ops, op)(*inputs, *options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return list(torch.autograd.grad(sum(output.double().square().sum() for output in outputs), inputs))

    assert ops.choose("hsm", device, torch.bfloat16)[0] is not reference, ops.choose("hsm", device, torch.bfloat16)[1]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results = gradients(None)
    stream.synchronize()
    with ops.using("reference"):
        exact, plain = gradients(torch.float64), gradients(None)
    for name, result, right, rough in zip(names, results, exact, plain, strict=True):
        allowed = 2 * (rough - right).abs().max() + torch.finfo(result.dtype).eps / 2 * right.abs().max()
        assert (result - right).abs().max() <= allowed, name
