"""Reconstruction: zeros stay, the units' errors fall, and the step of a linear unit is the one worked out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from decoders import block_inputs, calibration, decoder
from torch import Tensor

from pyprune.architectures import describe_blocks
from pyprune.blockwise import Block, prune
from pyprune.methods.magnitude import Magnitude
from pyprune.methods.wanda import Wanda
from pyprune.reconstruction import Reconstruction


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.float64), ("gpt2", torch.float32), ("opt", torch.bfloat16)]
)
def test_zeros_stay_and_errors_fall(family: str, dtype: torch.dtype) -> None:
    dense, batches = decoder(family, dtype=dtype), calibration()
    plain, better = copy.deepcopy(dense), copy.deepcopy(dense)
    prune(plain, Wanda(sparsity=0.6), batches)
    record = prune(better, Wanda(sparsity=0.6), batches, then=[Reconstruction(epochs=10)])
    first = [(a, b) for a, b in zip(weights(plain, 0), weights(better, 0), strict=True)]
    assert all(((a == 0) <= (b == 0)).all() for a, b in first)  # rounding to 16 bits may make more
    assert any(not torch.equal(a, b) for a, b in first)
    for block in record.blocks:
        for name in ("attention", "mlp"):
            assert block.figures[f"after_{name}"] < 0.9 * block.figures[f"before_{name}"]
    assert record.zeros >= round(0.6 * record.size)


def weights(model: torch.nn.Module, block: int) -> list[Tensor]:
    branches = describe_blocks(model).blocks[block].branches
    return [linear.matrix for branch in branches for linear in (*branch.reads, branch.write)]


def test_the_figures_are_the_units_errors() -> None:
    """|u - t|^2 / |t|^2 of what the MLP adds, t from the dense MLP behind the reconstructed attention, recomputed by
    running the model itself."""
    dense, batches = decoder("llama"), calibration()
    model = copy.deepcopy(dense)
    record = prune(model, Wanda(sparsity=0.6), batches, then=[Reconstruction(epochs=2)])
    mixed = copy.deepcopy(model)  # all of it reconstructed, and a dense first MLP
    blocks = [describe_blocks(m).blocks[0] for m in (mixed, dense)]
    for mine, theirs in zip(*(block.module.mlp.parameters() for block in blocks), strict=True):
        mine.data.copy_(theirs)
    outputs = [block_inputs(m, batches)[1] for m in (model, mixed)]
    attended: list[Tensor] = []
    handle = (
        describe_blocks(mixed)
        .blocks[0]
        .module.post_attention_layernorm.register_forward_pre_hook(lambda m, args: attended.append(args[0].clone()))
    )
    with torch.no_grad():
        for ids in batches:
            mixed(input_ids=ids)
    handle.remove()
    error = sum(float((a - b).square().sum()) for a, b in zip(*outputs, strict=True))
    size = sum(float((b - r).square().sum()) for b, r in zip(outputs[1], attended, strict=True))
    assert record.blocks[0].figures["after_mlp"] == pytest.approx(error / size, rel=1e-9)


def test_the_first_step_is_adams_on_the_survivors() -> None:
    """One step from a block whose attention is dense: each surviving weight moves by the step size against the sign of
    its gradient, which is computed here by autograd through the module, and the pruned ones do not move."""
    dense = decoder("llama")
    batches = calibration(batches=1)
    moved: dict[str, tuple[Tensor, Tensor]] = {}

    def prune_mlp(block: Block) -> None:
        for name, linear in block.linears.items():
            if name.startswith("mlp"):
                linear.matrix.masked_fill_(linear.matrix.abs() < linear.matrix.abs().median(), 0)
        before = {name: linear.matrix.clone() for name, linear in block.linears.items()}
        Reconstruction(epochs=1, learning_rate=1e-4)(block)
        moved.update({name: (before[name], linear.matrix.clone()) for name, linear in block.linears.items()})
        raise Stop

    with pytest.raises(Stop):
        prune(copy.deepcopy(dense), _Nothing(prune_mlp), batches)
    module = copy.deepcopy(describe_blocks(dense).blocks[0].module.mlp)
    hidden: list[Tensor] = []
    handle = describe_blocks(dense).blocks[0].module.mlp.register_forward_pre_hook(lambda m, a: hidden.append(a[0]))
    with torch.no_grad():
        dense(input_ids=batches[0])
        target = module(hidden[0])
    handle.remove()
    for name, (before, after) in moved.items():
        if not name.startswith("mlp"):
            assert torch.equal(before, after)  # dense attention has no error to reduce
    parameters = dict(module.named_parameters())
    for name, (before, _) in moved.items():
        if name.startswith("mlp"):
            parameters[f"{name.removeprefix('mlp.')}.weight"].data.copy_(before)
    loss = (module(hidden[0]) - target).square().sum() / target.square().sum()
    loss.backward()
    for name, (before, after) in moved.items():
        if name.startswith("mlp"):
            survivors = before != 0
            grad = parameters[f"{name.removeprefix('mlp.')}.weight"].grad
            scale = before[survivors].square().mean().sqrt()
            clear = survivors & (grad.abs() > 1e-4 * grad.abs().max())  # Adam's eps is 1e-8
            step = (after - before)[clear] / (1e-4 * scale)
            assert torch.allclose(step, -grad[clear].sign(), atol=0.05)
            assert (after[~survivors] == 0).all()


class Stop(Exception):
    pass


class _Nothing(Magnitude):
    """Hands the block to a function."""

    def __init__(self, function: object) -> None:
        super().__init__(sparsity=0.5)
        self.function = function

    calibrated = True  # type: ignore[misc]

    def solve(self, block: Block) -> None:
        self.function(block)  # type: ignore[operator]


def test_what_does_not_help_is_not_kept() -> None:
    """With a step that is far too large the weights stay as the method left them."""
    dense, batches = decoder("llama"), calibration()
    plain, same = copy.deepcopy(dense), copy.deepcopy(dense)
    prune(plain, Wanda(sparsity=0.5), batches)
    record = prune(same, Wanda(sparsity=0.5), batches, then=[Reconstruction(learning_rate=1e3)])
    for block in range(3):
        if block < len(record.blocks):
            assert all(torch.equal(a, b) for a, b in zip(weights(plain, block), weights(same, block), strict=True))


def test_a_dense_block_is_left_alone() -> None:
    dense, batches = decoder("llama"), calibration()

    def untouched(block: Block) -> None:
        figures = Reconstruction()(block)
        assert max(figures.values()) == 0
        raise Stop

    with pytest.raises(Stop):
        prune(dense, _Nothing(untouched), batches)


@pytest.mark.parametrize("options", [{"epochs": 0}, {"learning_rate": 0.0}])
def test_wrong_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected at least one epoch and a positive step"):
        Reconstruction(**options)  # type: ignore[arg-type]


def test_its_options_tell_runs_apart() -> None:
    assert repr(Reconstruction(epochs=3)) != repr(Reconstruction())
