"""SlimGPT: what goes and what the others become, against least squares and exhaustive search; the cut is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from methods.test_llm_pruner import CALIBRATION, tuned_in_two_parts
from methods.test_loraprune import logits, wide
from surgery.tiny_decoders import FAMILY_NAMES, relative_error, tiny
from torch import Tensor

from pyprune import SlimGPT, plan
from pyprune.architectures import describe
from pyprune.blockwise import prune
from pyprune.methods.slimgpt import _Columns, remove_columns
from pyprune.surgery import parameter_counts


def slimgpt(**options: Any) -> SlimGPT:
    return SlimGPT(**{"target": "heads=1,channels=12", "lora_rank": 3, "lora_dropout": 0.0} | options)


def problem(seed: int, inputs: int = 12, outputs: int = 5) -> tuple[Tensor, Tensor]:
    """A weight [out, in] and a Hessian [in, in] whose inputs depend on one another."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, inputs, dtype=torch.float64, generator=generator)
    x[:, 1::2] += 2 * x[:, ::2]
    return torch.randn(outputs, inputs, dtype=torch.float64, generator=generator), x.T @ x


def least_squares(weight: Tensor, hessian: Tensor, kept: Tensor) -> tuple[Tensor, float]:
    """The weight that is zero but for the columns `kept` and nearest by the Hessian, by the normal equations."""
    solved = torch.zeros_like(weight)
    solved[:, kept] = weight @ hessian[:, kept] @ torch.linalg.inv(hessian[kept][:, kept])
    error = weight - solved
    return solved, float((error @ hessian * error).sum())


@pytest.mark.parametrize(("groups", "keep", "at_once"), [(12, 5, 1), (12, 5, 4), (4, 2, 1), (4, 1, 2), (12, 11, 16)])
def test_what_stays_is_the_least_squares_solution(groups: int, keep: int, at_once: int) -> None:
    weight, hessian = problem(groups * keep + at_once)
    solved, stays, loss = remove_columns(weight.clone(), torch.linalg.inv(hessian), groups, keep, at_once)
    assert int(stays.sum()) == keep
    expected, error = least_squares(weight, hessian, stays.repeat_interleave(12 // groups))
    torch.testing.assert_close(solved, expected, rtol=1e-9, atol=1e-9)  # fp64, a few ill-conditioned steps
    assert loss == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize(("groups", "keep"), [(12, 4), (4, 1), (3, 1)])
def test_the_group_that_goes_is_the_cheapest_one_left(groups: int, keep: int) -> None:
    """Found by trying each of them."""
    for seed in range(5):
        weight, hessian = problem(seed)
        stays = torch.ones(groups, dtype=torch.bool)
        for _ in range(groups - keep):
            costs = torch.full((groups,), torch.inf, dtype=torch.float64)
            for group in stays.nonzero().flatten():
                tried = stays.clone()
                tried[group] = False
                costs[group] = least_squares(weight, hessian, tried.repeat_interleave(12 // groups))[1]
            stays[costs.argmin()] = False
        assert torch.equal(remove_columns(weight.clone(), torch.linalg.inv(hessian), groups, keep)[1], stays)


@pytest.mark.parametrize(("groups", "at_once"), [(12, 1), (12, 4), (4, 1)])
def test_groups_that_are_known_to_stay(groups: int, at_once: int) -> None:
    """Those that would have gone first stay: least squares again; and with the own choice every bit is the same."""
    weight, hessian = problem(groups + at_once)
    inverse, keep = torch.linalg.inv(hessian), groups // 2
    own, chosen, _ = remove_columns(weight.clone(), inverse.clone(), groups, keep, at_once)
    kept = (~chosen).nonzero().flatten().tolist()
    solved, stays, loss = remove_columns(weight.clone(), inverse.clone(), groups, keep, at_once, kept)
    assert stays.nonzero().flatten().tolist() == kept
    expected, error = least_squares(weight, hessian, stays.repeat_interleave(12 // groups))
    torch.testing.assert_close(solved, expected, rtol=1e-9, atol=1e-9)  # fp64, a few ill-conditioned steps
    assert loss == pytest.approx(error, rel=1e-9)
    again = remove_columns(weight.clone(), inverse, groups, keep, at_once, chosen.nonzero().flatten().tolist())[0]
    assert torch.equal(again, own)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_cut_is_zeroed(family: str) -> None:
    """A model with zeros in the columns of what goes gives the logits of the smaller one."""
    method, dense, zeroed = slimgpt(), tiny(family), tiny(family)
    columns = _Columns(method, describe(zeroed).groups(), method.widths(zeroed))
    prune(zeroed, columns, CALIBRATION)
    cut = method.cut(dense, CALIBRATION)
    assert [group.count for group in describe(cut).groups()] == [1, 12, 1, 12]
    assert relative_error(logits(cut), logits(zeroed)) < 1e-10
    assert relative_error(logits(cut), logits(tiny(family))) > 1e-3


def test_the_weights_come_from_the_inputs_of_the_pruned_blocks_before() -> None:
    """The last linear that writes, solved by hand from what it reads in the model that is pruned up to there."""
    method, dense = slimgpt(at_once=1, damping=0.02), tiny("llama")
    weight = dense.model.layers[1].mlp.down_proj.weight.detach().clone()
    columns = _Columns(method, describe(dense).groups(), method.widths(dense))
    prune(dense, columns, CALIBRATION)
    pruned = dense.model.layers[1].mlp.down_proj.weight.detach().clone()
    read: list[Tensor] = []
    dense.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda module, args: read.append(args[0].flatten(0, 1))
    )
    with torch.no_grad():
        for ids in CALIBRATION:
            dense(ids)
    x = torch.cat(read)
    hessian = x.T @ x
    hessian.diagonal().add_(0.02 * hessian.diagonal().mean())
    expected, _ = least_squares(weight, hessian, columns.stays["block1_channels"].bool())
    torch.testing.assert_close(pruned, expected, rtol=1e-8, atol=1e-10)


def test_target_and_blocks_that_stay_whole() -> None:
    model = wide()
    dense = parameter_counts(model)["total"]
    pruned = slimgpt(target="params=0.7", round_to=1).cut(model, CALIBRATION)
    assert 0 <= 0.7 * dense - parameter_counts(pruned)["total"] < 3 * 64 * 3  # a channel of each block
    uneven, before = wide(), wide()
    slimgpt(target="params=0.8", round_to=4, uniform=False).cut(uneven, CALIBRATION)
    widths = plan.Widths.of(describe(uneven))
    last = widths.channels[-1] == plan.Widths.of(describe(before)).channels[-1]
    assert last and min(widths.channels) < widths.channels[-1]
    weights = [m.model.layers[-1].mlp.down_proj.weight for m in (uneven, before)]
    assert torch.equal(*weights)


def test_tuned_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    """The same calibration gives the same cut again. Another one, as another machine's roundings might, does not change
    what stays."""
    tuned_in_two_parts(lambda: slimgpt(lora_dropout=0.1), CALIBRATION, tmp_path)
    checkpoint = tmp_path / "True" / "checkpoint-3"
    other = [CALIBRATION[0].flip(0) // 2]
    blocks = [
        slimgpt().prepare(tiny("llama"), calibration, resume=resume).base_model.model.model.layers[1].mlp
        for calibration, resume in ((CALIBRATION, checkpoint), (other, checkpoint), (other, None))
    ]
    first, resumed, anew = (block.gate_proj.base_layer.weight for block in blocks)
    assert torch.equal(resumed, first) and not torch.equal(anew, first)
    assert (blocks[1].down_proj.base_layer.weight != 0).any(0).all()  # what stays was not what had been zeroed
    with pytest.raises(ValueError, match="of a run with another target"):
        slimgpt(target="heads=1,channels=16").prepare(tiny("llama"), CALIBRATION, resume=checkpoint)


def test_bad_input() -> None:
    for options, message in (
        ({"damping": 0.0}, "damping is 0.0; expected a positive number"),
        ({"at_once": 0}, "at_once is 0; expected at least 1 channel"),
        ({"target": "layers=1"}, "expected heads and channels"),
    ):
        with pytest.raises(ValueError, match=message):
            slimgpt(**options)
    model = tiny("llama")
    before = logits(model)
    with pytest.raises(ValueError, match="calibration: SlimGPT reads text, and there is none"):
        slimgpt().prepare(model)
    with pytest.raises(ValueError, match=r"calibration: .* from 0 to 60, "):
        slimgpt().prepare(model, [CALIBRATION[0] + 61])
    with pytest.raises(ValueError, match="not within reach of heads, channels"):
        slimgpt(target="params=0.01", round_to=4).prepare(model, CALIBRATION)
    assert torch.equal(logits(model), before)
