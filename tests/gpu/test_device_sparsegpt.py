"""csrc/sparsegpt.cu on a device: the emulator's checks, and a layer of real size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sparsegpt_checks import CASES, PATTERNS, Launchers, check, make_factor, make_slab, slab, solve

from pyprune import ops
from pyprune.reference.bits import unpack_bits

pytestmark = pytest.mark.gpu


@pytest.mark.sanitizer
@pytest.mark.parametrize(("n", "m"), [(0, 0), (2, 4)])
def test_a_slab_is_bitwise_the_same_from_run_to_run(launchers: Launchers, n: int, m: int) -> None:
    tensors = make_slab(9, 104)
    first = slab(launchers, tensors, 9, 104, n, m)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(slab(launchers, tensors, 9, 104, n, m), first, strict=True))


@pytest.mark.parametrize("grid", [False, True], ids=["", "rounded"])
@pytest.mark.parametrize(("shape", "pattern"), CASES, ids=str)
def test_agrees_with_fp64(device: torch.device, shape: tuple[int, int, int], pattern: str, grid: bool) -> None:
    rows, columns, block = shape
    weight, factor = torch.randn(rows, columns), make_factor(columns)
    arguments = {"block": block, "grid": grid, **PATTERNS[pattern]}
    result = solve(weight.to(device), factor.to(device), **arguments)
    check(weight, factor, tuple(tensor.cpu() for tensor in result), arguments)


@pytest.mark.parametrize("pattern", ["layer", "row", "2:4"])
def test_agrees_with_fp64_at_size(device: torch.device, pattern: str) -> None:
    """Of eight million scores some lie closer than fp32 tells apart, so masks may differ from fp64's in a few weights;
    what they cost does not, and the counts are exact."""
    rows, columns = 2048, 4096
    weight, factor = torch.randn(rows, columns, device=device), make_factor(columns, "cuda")
    arguments: dict[str, Any] = {"block": 128, "grid": False, **PATTERNS[pattern]}
    solved, bits, loss = solve(weight, factor, **arguments)
    with ops.using("reference"):
        _, exact_bits, exact_loss = solve(weight.double(), factor.double(), **arguments)
    kept = unpack_bits(bits, columns)
    assert torch.equal(solved != 0, kept)
    if pattern == "2:4":
        assert (kept.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    elif pattern == "row":
        assert (kept.sum(1) == columns - int(0.6 * columns)).all()
    else:
        assert int(kept.sum()) == weight.numel() - int(0.6 * weight.numel())
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-4, atol=0)
    assert (kept != unpack_bits(exact_bits, columns)).double().mean() < 1e-2
