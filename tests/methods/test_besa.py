"""BESA: its gradient against autograd through the explicit probability matrix, exact counts, the original's ceiling
gone, joint rounding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from decoders import calibration, decoder
from torch import Tensor, nn
from torch.func import functional_call

from pyprune import methods
from pyprune.allocation import apportion
from pyprune.architectures import describe_blocks
from pyprune.blockwise import prune
from pyprune.methods.besa import BESA, STEPS, exact_counts, mean_rate, ranks, round_to_grid, start_logits


def run(family: str = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, Any]:
    model = decoder(family, dtype=dtype)
    return model, prune(model, BESA(**options), calibration())


# ------------------------------------------------------------------------------------------------------------- the loss


class Stop(Exception):
    pass


def first_gradients(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, batches: list[Tensor], besa: BESA
) -> list[Tensor]:
    """Of the logits of the first block's linears, in the first step."""
    found: list[Tensor] = []

    def step(self: torch.optim.Adam, closure: Any = None) -> None:
        found.extend(p.grad.clone() for p in self.param_groups[0]["params"])
        raise Stop

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    with pytest.raises(Stop):
        prune(copy.deepcopy(model), besa, batches)
    return found


def gradients_by_the_paper(model: nn.Module, batches: list[Tensor], besa: BESA) -> list[Tensor]:
    """Equations 2 to 6 and the authors' program, with the matrix of keep probabilities written out, in fp64."""
    stack, block = describe_blocks(model).stack, describe_blocks(model).blocks[0]
    linears = {x.name: x for branch in block.branches for x in (*branch.reads, branch.write)}
    squares, calls = dict.fromkeys(linears, 0), []
    handles = [
        linear.module.register_forward_pre_hook(
            lambda m, a, n=name: squares.__setitem__(n, squares[n] + a[0].flatten(0, -2).square().sum(0))
        )
        for name, linear in linears.items()
    ]
    handles.append(block.module.register_forward_hook(lambda m, a, k, y: calls.append((a, k, y)), with_kwargs=True))
    with torch.no_grad():
        for ids in batches:
            stack(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    args, kwargs, target = calls[0]
    rates = torch.arange(STEPS + 1, dtype=torch.float64) / STEPS
    thetas, weights, removed = {}, {}, 0
    sizes = [linear.matrix.numel() for linear in linears.values()]
    wanted = sum(apportion([besa.sparsity] * len(sizes), sizes)) / sum(sizes)  # a whole number of weights
    for name, linear in linears.items():
        weight = linear.matrix
        rank = (weight.abs() * squares[name].sqrt()).argsort(1).argsort(1)
        start = start_logits(wanted, besa.spread, besa.temperature)
        thetas[name] = start.repeat(len(weight), 1).requires_grad_()
        beta = (thetas[name] / besa.temperature).softmax(1)
        columns = weight.shape[1]
        exceeds = torch.stack([torch.arange(columns) < columns * d // STEPS for d in range(STEPS + 1)]).double()
        keep = 1 - (beta @ exceeds).gather(1, rank)
        alpha = beta @ rates
        hard = (rank >= (alpha * columns).floor()[:, None]).double()
        weights[f"{name}.weight"] = linear.stored(weight * (hard - keep.detach() + keep))
        removed = removed + alpha.mean() * weight.numel()
    output = functional_call(block.module, weights, args, kwargs)
    share = removed / sum(sizes)
    scale = torch.linalg.vector_norm(target.flatten(0, 1), dim=0)
    error = (((output - target) / scale) ** 2).sum() / target.shape[-1]
    loss = error + besa.penalty * ((share - wanted) / wanted) ** 2
    return list(torch.autograd.grad(loss, list(thetas.values())))


@pytest.mark.parametrize("sparsity", [0.31, 0.71])  # no whole number of any row's weights: at one, rounding decides
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_equals_autograd_through_the_probability_matrix(
    monkeypatch: pytest.MonkeyPatch, family: str, sparsity: float
) -> None:
    model, batches = decoder(family), calibration()
    besa = BESA(sparsity=sparsity, temperature=0.7)
    found = first_gradients(monkeypatch, model, batches, besa)
    expected = gradients_by_the_paper(model, batches, besa)
    assert len(found) == len(expected) >= 4
    for mine, right in zip(found, expected, strict=True):
        assert right.abs().max() > 1e-6
        assert (mine - right).abs().max() <= 1e-6 * right.abs().max()


# ----------------------------------------------------------------------------------------------------------- the counts


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("rates", ["row", "layer"])
def test_the_sparsity_is_the_one_asked_for(rates: str, sparsity: float) -> None:
    """0.7 and 0.9 too: the original's softmax of a sigmoid ends at 0.6237."""
    model, record = run(sparsity=sparsity, rates=rates, epochs=2)
    zeros = sum(int((x.matrix == 0).sum()) for b in describe_blocks(model).blocks for x in linears(b))
    size = sum(x.matrix.numel() for b in describe_blocks(model).blocks for x in linears(b))
    assert zeros == record.zeros == round(sparsity * size)
    assert all(abs(b.figures["learnt"] - sparsity) < 0.1 for b in record.blocks)


def linears(block: Any) -> list[Any]:
    return [x for branch in block.branches for x in (*branch.reads, branch.write)]


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("spread", [0.02, 0.3, 3.0])
def test_the_start_is_the_target(sparsity: float, spread: float) -> None:
    logits = start_logits(sparsity, spread, 2.0)
    assert abs(float(mean_rate((logits / 2.0).softmax(0))) - sparsity) < 1e-9


def test_layers_have_one_rate_and_rows_have_their_own() -> None:
    """Rows of a layer with one rate differ by the one weight that makes the count exact; those with their own, more."""
    spans = {}
    for rates in ("layer", "row"):
        model, _ = run(sparsity=0.5, rates=rates, epochs=4, learning_rate=0.3)
        zeros = [(x.matrix == 0).sum(1) for b in describe_blocks(model).blocks for x in linears(b)]
        spans[rates] = [int(z.max() - z.min()) for z in zeros]
    assert max(spans["layer"]) <= 1
    assert min(spans["row"]) >= 2


def test_what_goes_are_the_lowest_ranks_of_each_row() -> None:
    dense, (model, _) = decoder("llama"), run(sparsity=0.6)
    first, kept = (describe_blocks(m).blocks[0] for m in (dense, model))
    inputs: dict[str, Tensor] = {}
    module = dict(first.module.named_modules())
    handles = [
        module[x.name].register_forward_pre_hook(
            lambda m, a, n=x.name: inputs.__setitem__(n, inputs.get(n, 0) + a[0].flatten(0, -2).square().sum(0))
        )
        for x in linears(first)
    ]
    with torch.no_grad():
        for ids in calibration():
            dense(input_ids=ids)
    for handle in handles:
        handle.remove()
    for before, after in zip(linears(first), linears(kept), strict=True):
        scores = before.matrix.abs() * inputs[before.name].sqrt()
        gone = after.matrix == 0
        highest_gone = scores.masked_fill(~gone, -torch.inf).amax(1)
        lowest_kept = scores.masked_fill(gone, torch.inf).amin(1)
        assert (highest_gone < lowest_kept).all()
        assert torch.equal(after.matrix[~gone], before.matrix[~gone])


def test_exact_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    width = torch.randint(1, 50, (200,), generator=generator).double()
    wanted = torch.rand(200, generator=generator, dtype=torch.float64) * width
    for total in (0, 1, 1234, int(width.sum()) - 1, int(width.sum())):
        counts = exact_counts(wanted, width, total)
        assert counts.sum() == total and (counts >= 0).all() and (counts <= width).all()
        assert torch.equal(counts, counts.floor())
    near = exact_counts(wanted, width, round(float(wanted.sum())))
    assert ((near - wanted).abs() <= 1 + 1e-6).all()


def test_ranks_are_permutations_with_ties_by_index() -> None:
    scores = torch.tensor([[3.0, 1.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    assert ranks(scores).tolist() == [[2, 1, 3, 0], [0, 1, 2, 3]]


# ------------------------------------------------------------------------------------------------------- what it is for


def test_it_learns() -> None:
    """The output error of each first block is well below Wanda's, which is where BESA starts, at the same count."""
    errors = {}
    for epochs, rate in ((1, 1e-9), (10, 0.3)):
        _, record = run(sparsity=0.5, epochs=epochs, learning_rate=rate)
        errors[rate] = record.blocks[0].figures["error"]
    assert errors[0.3] < 0.8 * errors[1e-9]


@pytest.mark.parametrize("targets", ["pruned", "dense"])
def test_both_references(targets: str) -> None:
    besa = BESA(targets=targets)
    assert besa.reference == targets
    _, record = run(sparsity=0.5, targets=targets, epochs=1)
    assert all("error" in block.figures for block in record.blocks)


def test_every_family_and_dtype() -> None:
    for family, dtype in (("gpt2", torch.float32), ("opt", torch.bfloat16), ("qwen3", torch.float32)):
        _, record = run(family, dtype=dtype, sparsity=0.5, epochs=1)
        assert record.zeros == round(0.5 * record.size)


def test_owl_gives_blocks_their_own_sparsity() -> None:
    _, record = run(sparsity=0.5, epochs=1, allocation="owl")
    shares = [sum(b.zeros.values()) / sum(b.sizes.values()) for b in record.blocks]
    assert max(shares) - min(shares) > 0.05
    assert record.zeros == round(0.5 * record.size)


# ------------------------------------------------------------------------------------------------------ joint rounding


def test_rounding_without_clipping_is_the_nearest_level() -> None:
    weight = torch.randn(3, 16, dtype=torch.float64)
    clipping = torch.full((3, 2, 2), 40.0, dtype=torch.float64)  # sigmoid: 1
    rounded = round_to_grid(weight, clipping, 4)
    groups = weight.unflatten(1, (2, 8))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    assert ((rounded.unflatten(1, (2, 8)) - groups).abs() <= scale * (0.5 + 0.5 + 1e-9)).all()
    for row in rounded.unflatten(1, (2, 8)).flatten(0, 1):
        assert len(row.unique()) <= 16
    assert torch.equal(round_to_grid(torch.zeros(1, 4), torch.zeros(1, 1, 2), 4), torch.zeros(1, 4))


def test_clipping_gets_the_straight_through_gradient() -> None:
    """Against the formula written out: codes inside the range follow w / scale and the zero's own rounding."""
    weight = torch.randn(2, 8, dtype=torch.float64)
    clipping = torch.zeros(2, 2, 2, dtype=torch.float64, requires_grad=True)
    seen = torch.randn(2, 8, dtype=torch.float64)
    (grad,) = torch.autograd.grad((round_to_grid(weight, clipping, 3) * seen).sum(), clipping)
    again = clipping.detach().clone().requires_grad_()
    groups, share = weight.unflatten(1, (2, 4)), again.sigmoid()
    high = share[..., :1] * groups.amax(-1, keepdim=True).clamp(min=0)
    low = share[..., 1:] * groups.amin(-1, keepdim=True).clamp(max=0)
    scale = (high - low) / 7
    exact, zero = groups / scale, -low / scale
    noise = exact.round() - exact
    zero_noise = zero.round() - zero
    code = exact + noise.detach() + zero + zero_noise.detach()
    clamped = code.clamp(0, 7)
    out = (clamped - zero - zero_noise.detach()) * scale
    (expected,) = torch.autograd.grad((out.flatten(1) * seen).sum(), again)
    torch.testing.assert_close(grad, expected)


def test_joint_rounding_ends_on_the_grid_at_the_exact_sparsity() -> None:
    model, record = run(sparsity=0.5, bits=2, bits_group=8, epochs=2)
    assert record.zeros >= round(0.5 * record.size)  # kept weights may round to zero too
    for block in describe_blocks(model).blocks:
        for linear in linears(block):
            assert all(len(group.unique()) <= 4 for group in linear.matrix.unflatten(1, (-1, 8)).flatten(0, 1))


def test_learnt_clipping_beats_rounding_afterwards() -> None:
    """At 2 bits, where it matters: the same masks and rounding with the clipping left alone are further from dense."""
    errors = {}
    for rate in (1e-9, 0.05):
        _, record = run(sparsity=0.3, bits=2, bits_group=8, epochs=8, clipping_rate=rate, learning_rate=0.05)
        errors[rate] = record.blocks[0].figures["error"]
    assert errors[0.05] < errors[1e-9]


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:4"}, "pattern is '2:4', but BESA learns how much every row loses"),
        ({"rates": "block"}, "rates is 'block'; expected row or layer"),
        ({"targets": "x"}, "targets is 'x'; expected pruned or dense"),
        ({"epochs": 0}, "epochs is 0; expected at least 1"),
        ({"penalty": -1.0}, "^penalty is -1.0; expected at least 0"),
        ({"bits": 9}, "bits is 9; expected 0 or 2 to 8"),
        ({"temperature": 0.0}, "^temperature is 0.0; expected a positive number"),
        ({"clipping_rate": -0.5}, "^clipping_rate is -0.5; expected a positive number"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BESA(**options)


def test_registered() -> None:
    assert methods.find("besa") is BESA
