"""Masks: exact counts, ties as stated, patterns that do not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune.allocation import apportion, outlier_ratio, owl_rates
from pyprune.patterns import parse
from pyprune.reference.selection import keep_highest


def sorted_mask(scores: list[float], drop: int) -> list[bool]:
    """Python's stable sort: among equal scores the lower index is dropped first."""
    gone = set(sorted(range(len(scores)), key=lambda i: scores[i])[:drop])
    return [i not in gone for i in range(len(scores))]


few_values = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=24, max_size=24)


@settings(max_examples=60, deadline=None)
@given(few_values, st.integers(0, 24))
def test_layer_drops_the_lowest_of_all_and_the_first_of_equal_ones(values: list[float], drop: int) -> None:
    mask = parse("layer").mask(torch.tensor(values).view(4, 6), drop)
    assert mask.flatten().tolist() == sorted_mask(values, drop)


@settings(max_examples=60, deadline=None)
@given(few_values, st.integers(0, 24))
def test_row_drops_the_same_of_every_row_and_one_more_where_it_costs_least(values: list[float], drop: int) -> None:
    rows = [values[i : i + 6] for i in range(0, 24, 6)]
    each, more = divmod(drop, 4)
    cheapest = sorted(range(4), key=lambda r: sorted(rows[r])[each] if each < 6 else 0.0)[:more]
    expected = [sorted_mask(row, each + (r in cheapest)) for r, row in enumerate(rows)]
    assert parse("row").mask(torch.tensor(rows), drop).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(few_values, st.sampled_from(["2:4", "1:4", "3:4", "4:8", "1:2"]))
def test_n_of_m_keeps_the_highest_of_a_group_and_the_first_of_equal_ones(values: list[float], name: str) -> None:
    pattern, scores = parse(name), torch.tensor(values).view(3, 8)
    kept = [
        sorted(sorted(range(pattern.m), key=lambda i: -group[i])[: pattern.n])
        for group in scores.view(-1, pattern.m).tolist()
    ]
    mask = pattern.mask(scores, pattern.count(0, 3, 8))
    assert [group.nonzero().flatten().tolist() for group in mask.view(-1, pattern.m)] == kept
    assert int((~mask).sum()) == pattern.count(0, 3, 8)


def test_balanced_rounds_to_whole_rows() -> None:
    pattern = parse("balanced")
    assert [pattern.count(wanted, 4, 10) for wanted in (19, 21, 23)] == [20, 20, 24]
    mask = pattern.mask(torch.rand(4, 10), 24)
    assert (~mask).sum(1).tolist() == [6, 6, 6, 6]


def test_all_or_nothing() -> None:
    scores = torch.rand(3, 5)
    assert keep_highest(scores, 0).all()
    assert not keep_highest(scores, 5).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused(value: float) -> None:
    scores = torch.ones(2, 4)
    scores[1, 2] = value
    for name in ("layer", "row", "2:4"):
        with pytest.raises(ValueError, match="scores are not finite"):
            parse(name).mask(scores, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows", "pattern is 'rows'; expected layer, row"),
        ("4:4", "0 < N < M"),
        ("0:4", "0 < N < M"),
        ("128:257", "0 < N < M <= 256"),
        ("2:", "expected layer"),
    ],
)
def test_unknown_patterns_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 10**9)), min_size=1, max_size=40))
def test_counts_sum_to_the_rounded_sum_and_none_is_more_than_one_off(entries: list[tuple[float, int]]) -> None:
    rates, sizes = [rate for rate, _ in entries], [size for _, size in entries]
    counts = apportion(rates, sizes)
    assert abs(sum(counts) - sum(rate * size for rate, size in entries)) <= 0.5 + 1e-6
    assert all(abs(count - rate * size) <= 1 + 1e-6 for count, (rate, size) in zip(counts, entries, strict=True))


def test_owl_rates_against_the_authors_formula() -> None:
    """kept = (D - min) / (max - min) 2 lambda, minus its mean, plus 1 - sparsity; here blocks of equal size."""
    outliers, sparsity, spread = [3.0, 1.0, 2.0, 7.0], 0.7, 0.08
    kept = [(value - 1) / 6 * 2 * spread for value in outliers]
    expected = [1 - (value - sum(kept) / 4 + 1 - sparsity) for value in kept]
    assert owl_rates(outliers, [5] * 4, sparsity, spread) == pytest.approx(expected, abs=1e-12)


def test_owl_keeps_the_sparsity_of_the_model_when_blocks_differ_in_size() -> None:
    sizes = [100, 10, 1000]
    rates = owl_rates([1.0, 2.0, 3.0], sizes, 0.6, 0.1)
    assert sum(r * s for r, s in zip(rates, sizes, strict=True)) / sum(sizes) == pytest.approx(0.6, abs=1e-12)
    assert owl_rates([2.0, 2.0], [1, 1], 0.6, 0.1) == [0.6, 0.6]
    with pytest.raises(ValueError, match=r"owl_spread is 0\.6: at sparsity 0\.6 it takes a block's rate to"):
        owl_rates([1.0, 2.0, 3.0], sizes, 0.6, 0.6)


def test_outliers_exceed_the_mean_of_all_linears_of_a_block() -> None:
    scores = [torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([[1.0, 13.0]])]  # mean 3
    assert outlier_ratio(scores, 4) == pytest.approx(1 / 6)
    assert outlier_ratio(scores, 5) == 0
