"""sparsify: what it packs, how, and what it reports."""

from __future__ import annotations

import re

import pytest
import torch
from packed_models import llama, logits, zero
from torch import nn

import pyprune
from pyprune import packing
from pyprune.modules import SparseLinear
from pyprune.packing import Packing


def sparse(rows: int, columns: int, pattern: str) -> torch.Tensor:
    net = nn.Sequential(nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16))
    return zero(net, pattern)[0].weight.detach()


@pytest.mark.parametrize(
    ("pattern", "expected", "bits"),
    [
        ("2:4", (2, 4), 9),
        ("1:4", (1, 4), 4.5),
        ("2:8", (2, 8), 5),
        ("4:8", None, 9),
        ("3:4", None, 13),
        ("0.75", None, 5),
    ],
)
def test_the_smallest_format_that_fits_is_chosen(pattern: str, expected: tuple[int, int] | None, bits: float) -> None:
    """By bits a weight, bf16 being 16: the values, and 2 or 4 bits an index, or 1 bit a weight and 15 bytes a tile."""
    weight = sparse(64, 128, pattern)
    found = Packing.of(weight)
    assert found.pattern == expected
    assert found.bytes == pytest.approx(weight.numel() * bits / 8, rel=0.01)  # and ties in bf16
    assert found.kept == int((weight != 0).sum())


def test_one_nonzero_too_many_makes_it_a_bitmap() -> None:
    """And one zero more does not."""
    weight = sparse(64, 128, "2:4")
    weight[0, weight[0].nonzero()[0]] = 0
    assert Packing.of(weight).pattern == (2, 4)
    weight[40, 100:104] = 1
    assert Packing.of(weight).pattern is None


@pytest.mark.parametrize(("zeros", "worthwhile"), [(0.05, False), (0.18, False), (0.21, True), (0.5, True)])
def test_little_zeros_are_not_worthwhile(zeros: float, worthwhile: bool) -> None:
    """1 / (1 - s + 1/16 + 15/8192) >= 1.15 from s = 0.195 on."""
    weight = sparse(128, 128, str(zeros))
    assert Packing.of(weight).is_worthwhile(weight) == worthwhile


def test_the_report_counts() -> None:
    model = zero(llama("2:4", torch.bfloat16), "0.7", only="down_proj")
    expected = logits(model)
    report = pyprune.sparsify(model, measure=False)
    assert [layer.name for layer in report.layers] == [
        n for n, m in model.named_modules() if isinstance(m, SparseLinear)
    ]
    up = next(layer for layer in report.layers if layer.name.endswith("0.mlp.up_proj"))
    assert (up.format, up.shape, up.dense_bytes, up.packed_bytes) == ("2:4", (136, 72), 2 * 136 * 72, 136 * 72 * 9 // 8)
    assert up.sparsity == 0.5 and up.expected_gain == 16 / 9 and up.measured_gain is None and up.reason == ""
    down = next(layer for layer in report.layers if layer.name.endswith("1.mlp.down_proj"))
    assert down.format == "bitmap" and down.sparsity == pytest.approx(0.7, abs=1e-3)
    assert down.bytes == model.get_submodule(down.name).nbytes
    assert report.bytes == sum(layer.nbytes for layer in model.modules() if isinstance(layer, SparseLinear))
    assert re.search(r"^up_proj x2 +136x72 +50\.0% +2:4 +0\.04 +0\.02 +1\.78$", str(report), re.MULTILINE)
    assert str(report).endswith(f"14 of 14 linears packed, 0.2 MB -> {report.bytes / 1e6:.1f} MB")
    torch.testing.assert_close(logits(model), expected, rtol=0.05, atol=0.05)
    again = pyprune.sparsify(model, measure=False)
    assert again.bytes == report.bytes and again.packed == 14


@pytest.mark.parametrize("tokens", [1, packing.DECODE_TOKENS["cpu"], packing.DECODE_TOKENS["cpu"] + 1])
def test_what_was_packed_before_is_reported_as_what_is_packed_now(tokens: int) -> None:
    model = llama("2:4", torch.bfloat16)
    first, again = (pyprune.sparsify(model, tokens, measure=False) for _ in range(2))
    assert first == again
    assert {layer.expected_gain for layer in again.layers} == {16 / 9 if tokens <= 16 else 1.0}


def test_what_is_slower_packed_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement decides, for all layers of a kind together, at the batch that was asked for."""
    asked = []

    def gain(pairs: list, batch: int) -> float:
        asked.append((tuple(pairs[0][0].shape), len(pairs), batch))
        return 1.5 if pairs[0][0].shape[1] == 136 else 0.8

    monkeypatch.setattr(packing, "_measure", gain)
    model = llama()
    report = pyprune.sparsify(model, expected_batch=100)
    formats = {layer.name.split(".")[-1]: (layer.format, layer.measured_gain) for layer in report.layers}
    assert formats.pop("down_proj") == ("bitmap", 1.5)
    assert set(formats.values()) == {("dense", 0.8)}
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert ((72, 136), 2, 100) in asked and ((136, 72), 4, 100) in asked
    assert {layer.reason for layer in report.layers} == {"", "slower packed: 0.80 of the dense speed"}
    assert all(layer.expected_gain == 1 for layer in report.layers)  # so many tokens are multiplied dense


def test_measures_on_this_machine() -> None:
    report = pyprune.sparsify(llama(), expected_batch=2)
    assert all(layer.measured_gain is not None and layer.measured_gain > 0 for layer in report.layers)
    assert all((layer.format == "dense") == (layer.measured_gain <= 1) for layer in report.layers)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="expected_batch is 0; expected at least 1 token"):
        pyprune.sparsify(llama(), expected_batch=0)
