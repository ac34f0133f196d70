"""The chunked distillation loss against the formula on all logits at once, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pyprune import head_loss
from pyprune.distillation import Weights, distillation_loss

WEIGHTS = Weights(kl=0.67, ce=0.33, temperature=2.0)
TOKENS, WIDTH, TEACHER_WIDTH, VOCABULARY = 23, 12, 8, 31


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    labels[::5] = -100
    return {
        "hidden": normal(TOKENS, WIDTH).requires_grad_(),
        "head": normal(VOCABULARY, WIDTH).requires_grad_(),
        "teacher_hidden": normal(TOKENS, TEACHER_WIDTH),
        "teacher_head": normal(VOCABULARY, TEACHER_WIDTH),
        "labels": labels,
    }


def by_hand(t: dict[str, Tensor], weights: Weights, items: int | None) -> tuple[Tensor, Tensor, Tensor]:
    z, labels, tau = t["hidden"] @ t["head"].T, t["labels"], weights.temperature
    teacher = t["teacher_hidden"] @ t["teacher_head"].T
    counted = labels != -100
    count = items or int(counted.sum())
    ce = F.cross_entropy(z, labels, reduction="sum") / count
    p, q = F.log_softmax(z / tau, -1)[counted], F.softmax(teacher / tau, -1)[counted]
    kl = tau**2 * (q * (q.log() - p)).sum() / count
    return weights.ce * ce + weights.kl * kl, ce, kl


@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY, 1 << 20], ids=["a token", "three tokens", "all"])
@pytest.mark.parametrize("items", [None, 40])
@pytest.mark.parametrize("weights", [WEIGHTS, Weights(0.5, 1.0, 1.0), Weights(1.0, 0.0, 3.0)], ids=str)
def test_loss_and_gradients(monkeypatch: pytest.MonkeyPatch, chunk: int, items: int | None, weights: Weights) -> None:
    monkeypatch.setattr(head_loss, "CHUNK", chunk)
    t = inputs(torch.float64)
    leaves = t["hidden"], t["head"]
    found, right = distillation_loss(**t, weights=weights, items=items), by_hand(t, weights, items)
    for ours, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    ours, theirs = torch.autograd.grad(3 * found[0], leaves), torch.autograd.grad(3 * right[0], leaves)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    assert not found[1].requires_grad and not found[2].requires_grad


def test_bf16_products_are_as_exact_as_those_of_torch() -> None:
    t = inputs(torch.bfloat16)
    exact = {name: x.detach().double().requires_grad_() if x.is_floating_point() else x for name, x in t.items()}
    right = by_hand(exact, WEIGHTS, None)[0]
    right.backward()
    found = distillation_loss(**t, weights=WEIGHTS)[0]
    plain = by_hand(t, WEIGHTS, None)[0]
    gradients = torch.autograd.grad(found, (t["hidden"], t["head"]))
    rough = torch.autograd.grad(plain, (t["hidden"], t["head"]))
    assert abs(found.double() - right) <= abs(plain.double() - right) + 2**-8 * right
    for name, ours, theirs in zip(("hidden", "head"), gradients, rough, strict=True):
        error, allowed = (x.double() - exact[name].grad for x in (ours, theirs))
        scale = exact[name].grad.abs().max()
        assert error.abs().max() <= 2 * allowed.abs().max() + 2**-8 * scale, name


def test_under_autocast_gradients_have_the_weights_dtype() -> None:
    t = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = distillation_loss(**t, weights=WEIGHTS)[0]
    loss.backward()
    exact = by_hand({name: x.detach().double() if x.is_floating_point() else x for name, x in t.items()}, WEIGHTS, None)
    assert loss.item() == pytest.approx(exact[0].item(), rel=2**-6)
    assert t["head"].grad.dtype == t["hidden"].grad.dtype == torch.float32


def test_no_matrix_of_all_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that the forward and backward passes allocate has at most CHUNK elements, or a gradient's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    chunk = 4 * VOCABULARY
    monkeypatch.setattr(head_loss, "CHUNK", chunk)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor))
            return out

    t = inputs(torch.float32)
    with Watch():
        distillation_loss(**t, weights=WEIGHTS)[0].backward()
    assert max(sizes) <= max(chunk, VOCABULARY * WIDTH, TOKENS * WIDTH) < TOKENS * VOCABULARY


def test_bad_input_is_refused() -> None:
    t = inputs(torch.float32)
    with pytest.raises(ValueError, match="teacher's vocabulary has 30 tokens, the student's 31"):
        distillation_loss(**t | {"teacher_head": t["teacher_head"][:-1]}, weights=WEIGHTS)
    with pytest.raises(ValueError, match="hidden has 22 tokens, teacher_hidden 23"):
        distillation_loss(**t | {"hidden": t["hidden"][:-1]}, weights=WEIGHTS)
