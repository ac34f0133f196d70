"""ADMM and ALPS against independent fp64 implementations of their formulas, and against least squares."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from decoders import calibration, decoder
from oneshot_oracle import counts, mask_all, mask_n_of_m, prune_model, random_hessian
from torch import Tensor

from pyprune.blockwise import prune
from pyprune.methods.admm import ADMM, ALPS, conjugate_gradients


def masked(pattern: str, matrix: Tensor, drop: int) -> Tensor:
    if ":" in pattern:
        return mask_n_of_m(matrix.abs(), *map(int, pattern.split(":")))
    return mask_all(matrix.abs(), drop)


def admm(weight: Tensor, x: Tensor, drop: int, pattern: str, iterations: int, closing: int, damping: float) -> Tensor:
    """Boza's algorithm as its paper has it, solving a linear system in every iteration; rho = 1."""
    norm = x.square().sum(0).sqrt()
    scaled = x / norm
    gram = scaled.T @ scaled
    gram += damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    dense = weight * norm
    w, u = dense.clone(), torch.zeros_like(dense)
    for i in range(iterations):
        if i < closing:
            mask = masked(pattern, w + u, round(drop * (1 - (1 - (i + 1) / closing) ** 3)))
        z = (w + u) * mask
        u = u + w - z
        w = torch.linalg.solve(gram + torch.eye(len(gram), dtype=torch.float64), (dense @ gram + z - u).T).T
    return (w + u) * mask / norm


def alps(weight: Tensor, x: Tensor, drop: int, pattern: str, damping: float) -> Tensor:
    """The unscaled form: W = (H + rho I)^-1 (H W0 - V + rho D), D = top(W + V / rho), V += rho (W - D)."""
    gram = x.T @ x
    norm = gram.diagonal().sqrt()
    gram = gram / norm[:, None] / norm[None]
    gram += damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    dense = weight * norm
    d, v, rho = dense * masked(pattern, dense, drop), torch.zeros_like(dense), 0.1
    before = d != 0
    for i in range(1, 301):
        w = torch.linalg.solve(gram + rho * torch.eye(len(gram), dtype=torch.float64), (dense @ gram - v + rho * d).T).T
        moved = w + v / rho
        d = moved * masked(pattern, moved, drop)
        v = v + rho * (w - d)
        if i % 3 == 0:
            changed = int(((d != 0) != before).sum()) / int((d != 0).sum())
            if not changed:
                break
            rho *= 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
            before = d != 0
    return d / norm


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("pattern", ["layer", "2:4"])
@pytest.mark.parametrize("method", [ADMM(refine=0), ALPS(refine=0, true_sequential=False)], ids=["admm", "alps"])
def test_weights_equal_an_independent_implementation(family: str, pattern: str, method: ADMM | ALPS) -> None:
    method = copy.copy(method)
    method.pattern = pattern
    model, batches = decoder(family), calibration(6)
    expected, drop = copy.deepcopy(model), iter(counts(model, family, 0.5))

    def solve(weight: Tensor, x: Tensor, name: str) -> Tensor:
        if isinstance(method, ADMM):
            return admm(weight, x, next(drop), pattern, method.iterations, method.closing, method.damping)
        return alps(weight, x, next(drop), pattern, method.damping)

    prune_model(expected, family, batches, solve, method.true_sequential)
    result = prune(model, method, batches)
    assert result.zeros == round(0.5 * result.size)
    for name, value in expected.state_dict().items():
        found = model.state_dict()[name]
        assert torch.equal(found == 0, value == 0), name
        assert torch.allclose(found, value, rtol=1e-8, atol=1e-10), name


def test_conjugate_gradients_reach_least_squares_on_what_stays() -> None:
    """Row by row against the normal equations of the kept columns."""
    torch.manual_seed(0)
    dense, gram = torch.randn(5, 12, dtype=torch.float64), random_hessian(12)
    gram /= gram.diagonal().sqrt() * gram.diagonal().sqrt()[:, None]
    mask = torch.rand(5, 12) > 0.5
    mask[3] = False  # a row that lost everything
    expected = torch.zeros_like(dense)
    for r in range(5):
        kept = mask[r].nonzero().flatten()
        if len(kept):
            expected[r, kept] = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ dense[r])
    found = conjugate_gradients(dense * mask, dense, gram, mask, 60)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)
    assert not found[~mask].any()


def test_each_step_of_refinement_lowers_the_error() -> None:
    torch.manual_seed(0)
    dense, gram = torch.randn(5, 40, dtype=torch.float64), random_hessian(40)
    mask = torch.rand(5, 40) > 0.5
    errors = []
    for steps in range(6):
        lost = conjugate_gradients(dense * mask, dense, gram, mask, steps) - dense
        errors.append(float(((lost @ gram) * lost).sum()))
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == 6


def test_the_mask_closes_by_a_cubic_schedule() -> None:
    """The counts that the selection is asked for, the defect of the authors' program (a mask closed from the start)."""
    shares: list[float] = []

    def select(matrix: Tensor, share: float) -> Tensor:
        shares.append(share)
        return torch.ones_like(matrix, dtype=torch.bool)

    ADMM(iterations=6, closing=4).split(torch.ones(2, 3), torch.eye(3), select)
    assert shares == pytest.approx([1 - 0.75**3, 1 - 0.5**3, 1 - 0.25**3, 1])


def test_dead_inputs_lose_their_weights_first() -> None:
    for method in (ADMM(sparsity=0.3), ALPS(sparsity=0.3)):
        model = decoder("gpt2")
        with torch.no_grad():
            model.transformer.h[0].ln_1.weight[5] = 0
            model.transformer.h[0].ln_1.bias[5] = 0
        result = prune(model, method, calibration(6))
        weight = model.transformer.h[0].attn.c_attn.weight
        assert torch.isfinite(weight).all() and not weight[5].any()
        assert result.zeros == round(0.3 * result.size)


def test_bad_options_are_refused() -> None:
    for options in ({"damping": 0.0}, {"refine": -1}, {"iterations": 0}, {"closing": 0}, {"damping": math.nan}):
        with pytest.raises(ValueError, match="expected"):
            ADMM(**options)
    with pytest.raises(ValueError, match="rho is 0; expected a positive number"):
        ALPS(rho=0)
    with pytest.raises(ValueError, match="closing is 15; expected 1 to 10, the number of iterations"):
        ADMM(iterations=10)
