"""Wanda against an independent fp64 implementation of its formulas."""

from __future__ import annotations

import copy

import pytest
import torch
from decoders import calibration, decoder
from hypothesis import given, settings
from hypothesis import strategies as st
from oneshot_oracle import counts, mask_n_of_m, mask_rows, prune_model
from torch import Tensor

from pyprune.blockwise import prune
from pyprune.methods.wanda import Wanda, shares_of_rows, wanda_scores
from pyprune.patterns import parse


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize(("pattern", "sparsity"), [("row", 0.5), ("row", 0.7), ("2:4", 0.5), ("4:8", 0.5)])
def test_weights_equal_an_independent_implementation(family: str, pattern: str, sparsity: float) -> None:
    """Every block's statistics are those of its dense linears behind the pruned blocks before it."""
    model, batches = decoder(family), calibration()
    expected, drop = copy.deepcopy(model), iter(counts(model, family, sparsity))

    def solve(weight: Tensor, x: Tensor, name: str) -> Tensor:
        scores = weight.abs() * x.square().sum(0).sqrt()
        count = next(drop)
        mask = mask_rows(scores, count) if pattern == "row" else mask_n_of_m(scores, *map(int, pattern.split(":")))
        return weight * mask

    prune_model(expected, family, batches, solve, sequential=False)
    prune(model, Wanda(sparsity=sparsity, pattern=pattern), batches)
    for name, value in expected.state_dict().items():
        assert model.state_dict()[name].equal(value), name


def test_an_even_share_is_the_papers_count_per_row() -> None:
    """Where C * s is a whole number each row loses int(C * s), as in the authors' program."""
    model = decoder("llama")
    prune(model, Wanda(sparsity=0.25), calibration())
    for block in model.model.layers:
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            weight = block.get_submodule(name).weight
            assert (weight == 0).sum(1).tolist() == [int(weight.shape[1] * 0.25)] * len(weight)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from([-2.0, -1.0, 1.0, 2.0]), min_size=24, max_size=24),
    st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=8, max_size=8),
    st.integers(0, 24),
)
def test_ties_go_in_stable_order(values: list[float], norms: list[float], drop: int) -> None:
    """Scores of few values (a weight of 1 at a norm of 2 ties with 2 at 1), dead inputs among them."""
    weight, norm = torch.tensor(values).view(3, 8), torch.tensor(norms)
    scores = wanda_scores(weight, norm)
    assert scores.tolist() == [[abs(w) * n for w, n in zip(row, norms, strict=True)] for row in weight.tolist()]
    expected = mask_rows(scores, min(drop, 21))
    assert parse("row").mask(scores, min(drop, 21)).tolist() == expected.tolist()
    assert parse("2:4").mask(scores, 12).tolist() == mask_n_of_m(scores, 2, 4).tolist()


def test_variant_drops_in_each_row_the_most_whose_sum_is_at_most_alpha_of_the_rows() -> None:
    """Every row against the authors' rule at the alpha that the last dropped weight defines."""
    torch.manual_seed(3)
    scores = torch.rand(6, 10, dtype=torch.float64) * torch.rand(6, 1, dtype=torch.float64).exp()
    shares = shares_of_rows(scores)
    mask = parse("layer").mask(shares, 31)
    alpha = float(shares[~mask].max())
    for row, kept in zip(scores, mask, strict=True):
        ordered = sorted(row.tolist())
        fitting = sum(sum(ordered[: i + 1]) <= alpha * sum(ordered) + 1e-12 for i in range(10))
        assert int((~kept).sum()) == fitting
        assert sorted(row[~kept].tolist()) == ordered[:fitting]


def test_variant_has_the_sparsity_that_was_asked_for_and_uneven_rows() -> None:
    model, batches = decoder("llama"), calibration()
    result = prune(model, Wanda(sparsity=0.6, variant=True), batches)
    assert result.zeros == round(0.6 * result.size)
    weight = model.model.layers[0].mlp.down_proj.weight
    assert len(set((weight == 0).sum(1).tolist())) > 1
    with pytest.raises(ValueError, match="variant chooses its own count for each row; it takes no pattern '2:4'"):
        Wanda(variant=True, pattern="2:4")
