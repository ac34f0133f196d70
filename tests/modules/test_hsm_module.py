"""The HSM module: identity at the start, its loss, its transform, early compaction."""

from __future__ import annotations

import pytest
import torch

from pyprune import HSM


def trained(hidden_size: int = 24, rank: int = 5) -> HSM:
    """A module that is no longer the identity, nor orthonormal."""
    module = HSM(hidden_size, rank)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_starts_as_the_identity(dtype: torch.dtype) -> None:
    module, x = HSM(24, 5), torch.randn(2, 7, 24).to(dtype)
    assert torch.equal(module(x, torch.ones(24)), x)
    assert torch.equal(module.transform(), torch.eye(24, dtype=torch.float64))
    for product in (module.l0 @ module.l0.T, module.l1.T @ module.l1):
        torch.testing.assert_close(product, torch.eye(5), atol=1e-6, rtol=0)
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_transform_is_what_forward_applies() -> None:
    module, mask = trained(), torch.rand(24, dtype=torch.float64)
    x = torch.randn(3, 24, dtype=torch.float64)
    torch.testing.assert_close(module(x, mask), mask * (x @ module.transform().T))


def test_identity_loss_is_the_sum_of_both_norms() -> None:
    module = trained()
    l0, l1 = module.l0.detach().double(), module.l1.detach().double()
    identity = torch.eye(5, dtype=torch.float64)
    expected = ((l0 @ l0.T - identity) ** 2).sum().sqrt() + ((l1.T @ l1 - identity) ** 2).sum().sqrt()
    torch.testing.assert_close(module.identity_loss().double(), expected, rtol=1e-6, atol=0)


def test_identity_loss_pulls_towards_orthonormal() -> None:
    module = trained()
    before = module.identity_loss().item()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.01)
    for _ in range(50):
        optimiser.zero_grad()
        module.identity_loss().backward()
        optimiser.step()
    assert module.identity_loss().item() < 0.5 * before


def test_identity_loss_has_a_finite_gradient_at_exactly_zero() -> None:
    module = HSM(6, 3)
    with torch.no_grad():
        module.l0.copy_(torch.eye(3, 6))
        module.l1.copy_(torch.eye(6, 3))
    loss = module.identity_loss()
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(module.l0.grad, torch.zeros(3, 6))
    assert torch.equal(module.l1.grad, torch.zeros(6, 3))


def test_keep_computes_the_same_channels() -> None:
    """Compact and masked modules agree on the kept channels, in value and in every gradient that is left."""
    masked, compact = trained(), trained()
    compact.load_state_dict(masked.state_dict())
    kept = torch.tensor([3, 4, 9, 1, 20, 17])
    mask = torch.zeros(24)
    mask[kept] = 1
    identity_loss = masked.identity_loss().item()
    order = compact.keep(kept)
    assert compact.outputs == 6
    assert order.sort().values.tolist() == list(range(24))
    assert compact.identity_loss().item() == pytest.approx(identity_loss, rel=1e-6)

    x = torch.randn(8, 24)
    wide, narrow = masked(x, mask), compact(x[:, order], torch.ones(6))
    torch.testing.assert_close(narrow, wide[:, kept])
    grad = torch.randn(8, 6)
    narrow.backward(grad)
    wide.backward(torch.zeros(8, 24).index_copy(1, kept, grad))
    torch.testing.assert_close(compact.l0.grad, masked.l0.grad[:, order])
    torch.testing.assert_close(compact.l1.grad, masked.l1.grad[order])
    torch.testing.assert_close(compact.v.grad, masked.v.grad)
    torch.testing.assert_close(compact.transform(), masked.transform()[order][:, order])


def test_ranks_that_cannot_be_orthonormal_are_refused() -> None:
    for rank in (0, 9):
        with pytest.raises(ValueError, match=f"HSM: rank is {rank}, expected 1 to hidden_size = 8"):
            HSM(8, rank)


@pytest.mark.parametrize("kept", [[], [0, 0], [8], [-1], [[0, 1]]], ids=str)
def test_keep_refuses_what_is_no_choice_of_channels(kept: list) -> None:
    module = HSM(8, 2)
    before = module.l0.detach().clone()
    with pytest.raises(ValueError, match=r"HSM.keep: kept is .*, expected distinct indices in 0 ... 7"):
        module.keep(torch.tensor(kept, dtype=torch.long))
    assert torch.equal(module.l0, before)


def test_keep_twice_is_refused() -> None:
    module = HSM(8, 2)
    module.keep(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"HSM.keep: already compact, 2 of 8 channels are written"):
        module.keep(torch.tensor([0]))


def test_generator_decides_the_start() -> None:
    first, again = (HSM(8, 3, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    other = HSM(8, 3, generator=torch.Generator().manual_seed(8))
    assert torch.equal(first.l0, again.l0)
    assert torch.equal(first.l1, again.l1)
    assert not torch.equal(first.l0, other.l0)
