"""SparseGPT against an independent fp64 implementation that inverts the Hessian of the remaining columns each time."""

from __future__ import annotations

import copy

import pytest
import torch
from decoders import calibration, decoder
from oneshot_oracle import counts, mask_all, mask_n_of_m, mask_rows, prune_model, random_hessian
from torch import Tensor

from pyprune.blockwise import PruningError, prune
from pyprune.methods.sparsegpt import SparseGPT, inverse_factor, prepare, rounding_grid
from pyprune.ops import sparsegpt_solve
from pyprune.reference.bits import unpack_bits


def solve_by_elimination(
    weight: Tensor, hessian: Tensor, drop: int, slab: int, pattern: str, grid: tuple[Tensor, Tensor, int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """OBS column by column: with R = (H of the columns from j on)^-1, the score of w_j is w^2 / R_00, and what is lost
    at j is made up for by w_k -= (w_j - q_j) R_0k / R_00. Returns weight, mask and the loss (w - q)^2 / (2 R_00)."""
    work, (rows, columns) = weight.clone(), weight.shape
    mask, loss = torch.ones_like(work, dtype=torch.bool), work.new_zeros(())
    spread = torch.stack([torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(columns)])
    for j in range(columns):
        remaining = torch.linalg.inv(hessian[j:, j:])[0]
        if ":" in pattern:
            n, m = map(int, pattern.split(":"))
            if j % m == 0:
                mask[:, j : j + m] = mask_n_of_m(work[:, j : j + m] ** 2 / spread[j : j + m], n, m)
        elif j % slab == 0:
            end, share = min(j + slab, columns), drop // rows if pattern == "balanced" else drop
            here = share * end // columns - share * j // columns
            scores = work[:, j:end] ** 2 / spread[j:end]
            mask[:, j:end] = mask_rows(scores, here * rows) if pattern == "balanced" else mask_all(scores, here)
        kept = work[:, j].clone()
        if grid is not None:
            scale, zero, levels = grid
            g = j // (columns // scale.shape[1])
            code = torch.clamp(torch.round(kept / scale[:, g]) + zero[:, g], 0, levels)
            kept = scale[:, g] * (code - zero[:, g])
        kept = kept * mask[:, j]
        lost = work[:, j] - kept
        loss += (lost**2).sum() / (2 * spread[j])
        work[:, j:] -= lost[:, None] * remaining / remaining[0]
        work[:, j] = kept
    return work, mask, loss


def factor(hessian: Tensor) -> Tensor:
    return torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)


@pytest.mark.parametrize("pattern", ["layer", "balanced", "2:4", "4:8"])
@pytest.mark.parametrize("slab", [8, 24, 128])
@pytest.mark.parametrize("rounded", [False, True], ids=["exact", "4 bits"])
def test_solve_equals_elimination(pattern: str, slab: int, rounded: bool) -> None:
    torch.manual_seed(0)
    weight, hessian = torch.randn(6, 40, dtype=torch.float64), random_hessian(40)
    drop = 6 * 23 if pattern == "balanced" else 133
    n, m = map(int, pattern.split(":")) if ":" in pattern else (0, 0)
    grid = (*rounding_grid(weight, 4, 10), 15) if rounded else None
    scale, zero, levels = grid or (None, None, 0)
    solved, bits, loss = sparsegpt_solve(
        weight, factor(hessian), drop, n, m, pattern == "balanced", slab, scale, zero, levels
    )
    expected, mask, lost = solve_by_elimination(weight, hessian, drop, slab, pattern, grid)
    assert torch.equal(unpack_bits(bits, 40), mask)
    assert torch.allclose(solved, expected, rtol=0, atol=1e-10)
    assert float(loss) == pytest.approx(float(lost), rel=1e-10)
    assert int((~mask).sum()) == (120 if n else drop)
    if pattern == "balanced":
        assert (~mask).sum(1).tolist() == [23] * 6


def test_loss_is_the_squared_error_that_pruning_adds() -> None:
    """|(W - W') X|^2 for H = 2 X X^T."""
    torch.manual_seed(1)
    weight, x = torch.randn(5, 16, dtype=torch.float64), torch.randn(64, 16, dtype=torch.float64)
    solved, _, loss = sparsegpt_solve(weight, factor(2 * x.T @ x), 40)
    assert float(loss) == pytest.approx(float(((weight - solved) @ x.T).square().sum()), rel=1e-10)


def test_ties_in_a_slab_go_in_row_order() -> None:
    """Weights of two sizes and an identity for a Hessian: all scores tie, nothing is made up for."""
    weight = torch.tensor([[1.0, -1, 2, 1], [1, 2, -1, 1], [2, 1, 1, 1]], dtype=torch.float64)
    eye = torch.eye(4, dtype=torch.float64)
    solved, bits, _ = sparsegpt_solve(weight, eye, 4)
    assert unpack_bits(bits, 4).tolist() == mask_all(weight.abs(), 4).tolist()
    assert torch.equal(solved, weight * mask_all(weight.abs(), 4))
    _, bits, _ = sparsegpt_solve(weight, eye, 0, 2, 4)
    assert unpack_bits(bits, 4).tolist() == mask_n_of_m(weight.abs(), 2, 4).tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("pattern", ["layer", "2:4"])
@pytest.mark.parametrize("sequential", [True, False])
def test_weights_equal_an_independent_implementation(family: str, pattern: str, sequential: bool) -> None:
    model, batches, damping = decoder(family), calibration(6), 0.02
    expected, drop = copy.deepcopy(model), iter(counts(model, family, 0.5))

    def solve(weight: Tensor, x: Tensor, name: str) -> Tensor:
        hessian = 2 * sum(torch.outer(row, row) for row in x)
        dead = torch.diag(hessian) == 0  # OPT's ReLU has some
        weight[:, dead] = 0
        hessian[dead, dead] = 1
        hessian += damping * torch.diag(hessian).mean() * torch.eye(len(hessian), dtype=torch.float64)
        return solve_by_elimination(weight, hessian, next(drop), 16, pattern)[0]

    prune_model(expected, family, batches, solve, sequential)
    result = prune(model, SparseGPT(pattern=pattern, damping=damping, slab=16, true_sequential=sequential), batches)
    assert result.zeros == round(0.5 * result.size)
    for name, value in expected.state_dict().items():
        found = model.state_dict()[name]
        assert torch.equal(found == 0, value == 0), name
        assert torch.allclose(found, value, rtol=1e-7, atol=1e-9), name


def test_dead_inputs_lose_their_weights_first() -> None:
    """Beside inputs so small that the 1 on a dead one's diagonal would make its weights the most precious."""
    model = decoder("gpt2")
    with torch.no_grad():
        model.transformer.h[0].ln_1.weight.mul_(0.01)
        model.transformer.h[0].ln_1.bias.mul_(0.01)
        model.transformer.h[0].ln_1.weight[5] = 0
        model.transformer.h[0].ln_1.bias[5] = 0
    result = prune(model, SparseGPT(sparsity=0.3), calibration(6))
    weight = model.transformer.h[0].attn.c_attn.weight
    assert torch.isfinite(weight).all() and not weight[5].any()
    assert result.zeros == round(0.3 * result.size)


def test_a_singular_hessian_is_damped_more_or_named() -> None:
    """Rank 2 of 24, in fp32 and hardly damped: the Cholesky factor fails at first."""
    hessian = random_hessian(24, rank=2).float() * 1e6
    dead = prepare(hessian, 1e-9)
    assert not dead.any() and torch.linalg.cholesky_ex(hessian)[1] > 0
    upper = inverse_factor(hessian, "model.layers.0.mlp.down_proj")
    assert torch.isfinite(upper).all() and torch.equal(upper, upper.triu())
    with pytest.raises(PruningError, match=r"^model\.layers\.0\.mlp\.down_proj: the Hessian of its inputs is singular"):
        inverse_factor(torch.full((24, 24), float("nan")), "model.layers.0.mlp.down_proj")


def test_few_tokens_are_enough() -> None:
    """Four tokens for 24 and 40 inputs: singular but for the damping."""
    model = decoder("llama", dtype=torch.float32)
    result = prune(model, SparseGPT(), [torch.randint(3, 61, (1, 4))])
    assert result.sparsity == 0.5


def test_rounded_weights_lie_on_the_grid_of_their_group_and_pruned_ones_stay_zero() -> None:
    model, dense = decoder("llama"), decoder("llama")
    prune(model, SparseGPT(bits=4, bits_group=8, true_sequential=False), calibration(6))
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        found = model.model.layers[0].get_submodule(name).weight
        scale, zero = rounding_grid(dense.model.layers[0].get_submodule(name).weight.detach(), 4, 8)
        codes = found.unflatten(1, (-1, 8)) / scale[..., None] + zero[..., None]
        assert torch.allclose(codes, codes.round(), atol=1e-9)
        assert codes.min() > -1e-9 and codes.max() < 15 + 1e-9
        assert int((found == 0).sum()) >= found.numel() // 2 - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "row"}, "pattern is 'row', but SparseGPT counts in slabs"),
        ({"pattern": "64:129"}, "pattern is '64:129'; SparseGPT's solve takes N:M with M up to 128"),
        ({"damping": 0.0}, "damping is 0.0"),
        ({"slab": 0}, "slab 0; expected positive"),
        ({"bits": 1}, "bits is 1 and bits_group 128; expected 0 or 2 to 8"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as error:
        SparseGPT(**options)
    assert message in str(error.value)
