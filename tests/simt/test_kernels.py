"""csrc/hsm_fused.cu on the emulator: right numbers in every schedule, and every barrier needed and noticed."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from emulator import EAGER_GREEDY, LAZY, ROOT, SCHEDULES, Emulator, Schedule
from hsm_checks import DTYPES, EMPTY_SHAPES, OPS, SHAPES, Launchers, Op, Shape, Tensors, check, make_inputs

from pyprune import ops, reference
from pyprune._cuda import CudaKernels

SOURCE = ROOT / "csrc/hsm_fused.cu"
BUSY = Shape(130, 264, 72, 200)  # Several blocks, pipeline stages and splits in every kernel.
UNALIGNED = Shape(33, 131, 31, 97)


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("schedule", [LAZY, EAGER_GREEDY], ids=str)
def test_agrees_with_fp64(
    emulator: Emulator, launchers: Launchers, schedule: Schedule, shape: Shape, dtype: torch.dtype, op: Op
) -> None:
    tensors = make_inputs(shape, dtype)
    with emulator.using(schedule):
        check(op, tensors, op.launch(launchers, shape, tensors))


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
def test_empty(launchers: Launchers, shape: Shape, dtype: torch.dtype, op: Op) -> None:
    tensors = make_inputs(shape, dtype)
    check(op, tensors, op.launch(launchers, shape, tensors))


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("processors", [1, 1000], ids=["rows owned, no splits", "columns cut, most splits"])
def test_every_division_of_the_work(emulator: Emulator, launchers: Launchers, processors: int, op: Op) -> None:
    tensors = make_inputs(BUSY, torch.bfloat16)
    with emulator.using(Schedule(processors=processors)):
        check(op, tensors, op.launch(launchers, BUSY, tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pieces", [1, 2, 3, 4, 5])
def test_rmsnorm_backward_of_rows_of_any_length(launchers: Launchers, dtype: torch.dtype, pieces: int) -> None:
    """Rows held by up to four pieces of 16 bytes a thread, and longer ones; the last piece is not full."""
    op = next(op for op in OPS if op.function == "rmsnorm_backward")
    width = 256 * 16 // dtype.itemsize
    shape = Shape(5 if pieces == 1 else 3, pieces * width - 40, 0, pieces * width - 40)
    tensors = make_inputs(shape, dtype)
    check(op, tensors, op.launch(launchers, shape, tensors))


@pytest.mark.parametrize("op", OPS, ids=str)
def test_bitwise_the_same_in_every_schedule(emulator: Emulator, launchers: Launchers, op: Op) -> None:
    tensors = make_inputs(BUSY, torch.bfloat16)
    first = op.launch(launchers, BUSY, tensors)
    for schedule in SCHEDULES:
        with emulator.using(schedule):
            again = op.launch(launchers, BUSY, tensors)
        for name in first:
            assert torch.equal(first[name], again[name]), f"{name} differs under {schedule}"


def test_nothing_before_the_start_is_touched(emulator: Emulator, launchers: Launchers) -> None:
    emulator.at_end = False
    for op in OPS:
        tensors = make_inputs(SHAPES[2], torch.float16)
        check(op, tensors, op.launch(launchers, SHAPES[2], tensors))


def test_without_column_dot(launchers: Launchers) -> None:
    op = next(op for op in OPS if op.function == "hsm_backward")
    tensors = make_inputs(BUSY, torch.bfloat16)
    code, arguments = 1, [launchers.copy(tensors[name]) for name in op.inputs]
    results = {name: launchers.poisoned(like) for name, like in op.maths(tensors).items()}
    workspace = launchers.empty(launchers.cuda.hsm_workspace(BUSY, code), dtype=torch.uint8)
    addresses = [0 if name == "column_dot" else result.data_ptr() for name, result in results.items()]
    launchers.cuda.hsm_backward(
        BUSY, code, *(a.data_ptr() for a in arguments), *addresses, workspace.data_ptr(), launchers.stream()
    )
    assert results.pop("column_dot").isnan().all()
    check(op, tensors, results)


def test_invalid_arguments_are_refused(launchers: Launchers) -> None:
    with pytest.raises(RuntimeError, match="invalid argument"):
        launchers.cuda.hsm_workspace((4, 8, 2, 9), 0)
    with pytest.raises(RuntimeError, match="invalid argument"):
        launchers.cuda.hsm_workspace((4, 8, 2, 8), 3)


# What must be noticed


def synchronisations() -> list[int]:
    """The source lines of every barrier and every wait."""
    lines = SOURCE.read_text().splitlines()
    return [i for i, line in enumerate(lines, 1) if re.search(r"__syncthreads\(\);|cp_async_wait<", line)]


def all_outputs(emulator: Emulator, launchers: Launchers, tensors: Tensors) -> Tensors:
    """Every op's outputs on few processors (blocks own rows), many (splits), and by the kernel for unaligned rows."""
    results = {}
    for processors in (1, 1000):
        with emulator.using(replace(emulator.schedule, processors=processors)):
            for op in OPS:
                for name, value in op.launch(launchers, BUSY, tensors).items():
                    results[f"{op}, {name}, {processors} processors"] = value
    for name, value in OPS[-1].launch(launchers, UNALIGNED, make_inputs(UNALIGNED, torch.bfloat16)).items():
        results[f"unaligned {name}"] = value
    return results


@pytest.mark.parametrize("line", synchronisations(), ids="line {}".format)
def test_every_missing_barrier_and_wait_is_noticed(emulator: Emulator, launchers: Launchers, line: int) -> None:
    tensors = make_inputs(BUSY, torch.bfloat16)
    right = all_outputs(emulator, launchers, tensors)
    for schedule in SCHEDULES:
        with emulator.using(schedule), emulator.without(line):
            try:
                wrong = all_outputs(emulator, launchers, tensors)
            except RuntimeError:
                return
        if any(not torch.equal(right[name], wrong[name]) for name in right):
            return
    pytest.fail(f"{SOURCE.name}, line {line}: left out, and no schedule shows it")


@pytest.mark.parametrize(("op", "which"), [(op, name) for op in OPS for name in op.inputs], ids=str)
def test_reading_past_the_end_of_any_input_is_noticed(launchers: Launchers, op: Op, which: str) -> None:
    tensors = make_inputs(BUSY, torch.bfloat16)
    tensors[which] = tensors[which][:-1]
    like = op.maths(make_inputs(BUSY, torch.bfloat16))
    arguments = {"dtype_of": tensors["residual_out"]} | {name: tensors[name] for name in op.inputs}
    with pytest.raises(RuntimeError, match=r"out of bounds access: a buffer of \d+ bytes.*block .*thread"):
        launchers.run(op.function, BUSY, arguments, like, *op.options)


# The ops of pyprune.ops on these kernels


@pytest.mark.parametrize("op", ["hsm", "hsm_residual_rmsnorm"])
def test_gradients_through_the_functional_api(emulator: Emulator, op: str) -> None:
    tensors = make_inputs(Shape(65, 136, 24, 120), torch.float32)
    names = ["x", "l0", "v", "l1", "mask"] + (["residual", "weight"] if op == "hsm_residual_rmsnorm" else [])
    options = (1e-5,) if op == "hsm_residual_rmsnorm" else ()

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [tensors[name].to(dtype).requires_grad_() for name in names]
        outputs = getattr(ops, op)(*inputs, *options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum((output * torch.cos(torch.arange(output.numel()).view_as(output))).sum() for output in outputs)
        return list(torch.autograd.grad(loss, inputs))

    with ops.using(CudaKernels(emulator.cuda, stream=lambda device: 0)):
        on_emulator = gradients(torch.float32)
    with ops.using(reference):
        exact, plain = gradients(torch.float64), gradients(torch.float32)
    for name, result, right, rough in zip(names, on_emulator, exact, plain, strict=True):
        allowed = 2 * (rough - right).abs().max() + 4 * torch.finfo(torch.float32).eps * right.abs().max()
        assert (result - right).abs().max() <= allowed, name
