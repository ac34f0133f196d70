"""Plans: counts against real cuts, targets met to one step, choices by score, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from surgery.tiny_decoders import FAMILY_NAMES, WIDTH, logits, relative_error, tiny, token_ids
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pyprune import evaluation, plan, removal
from pyprune.architectures import describe
from pyprune.criteria import score
from pyprune.evaluation import Latency
from pyprune.plan import Plan, Rules, Sizes, Target, Widths
from pyprune.surgery import parameter_counts

SMALL = {"round_to": 4}


def scores_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return score(model, None, "random")


def bytes_of(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def made(model: nn.Module, target: str, **rules: object) -> Plan:
    return plan.make(model, target, scores_of(model), Rules(**SMALL | rules))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_counts_are_those_of_the_cut_model(family: str, tied: bool) -> None:
    for target, rules in (
        ("heads=1,channels=12", {}),
        ("heads=1,channels=20,hidden=16,layers=1", {}),
        ("params=0.8", {"uniform": False, "skip": (1,), "round_to": 1}),
    ):
        model = tiny(family, tied)
        found = made(model, target, **rules)
        before = parameter_counts(model)["total"]
        sizes = Sizes(describe(model)).count(found.pruned, "bytes")
        found.apply(model)
        assert found.params == (before, parameter_counts(model)["total"])
        assert sizes == bytes_of(model)
        assert Widths.of(describe(model)).largest() == found.pruned.largest()


@pytest.mark.parametrize("axes", [("channels",), ("heads", "channels"), ("heads", "channels", "hidden"), ("hidden",)])
@pytest.mark.parametrize("share", [0.5, 0.6, 0.75, 0.9])
def test_a_target_is_met_and_one_step_more_would_miss_it(axes: tuple[str, ...], share: float) -> None:
    model = wide()
    found = made(model, f"params={share}", axes=axes)
    sizes = Sizes(describe(model))
    limit = share * sizes.count(sizes.dense)
    assert found.params[1] <= limit
    finest = "channels" if "channels" in axes else "hidden"
    step = 4 if finest == "channels" else 24  # a multiple of round_to and of 8, 6 or 4 heads
    larger = {
        "channels": Widths(found.pruned.hidden, found.pruned.heads, tuple(c + step for c in found.pruned.channels)),
        "hidden": Widths(found.pruned.hidden + step, found.pruned.heads, found.pruned.channels),
    }[finest]
    assert sizes.count(larger) > limit
    found.apply(model)
    assert parameter_counts(model)["total"] == found.params[1]
    LlamaConfig.from_dict(model.config.to_dict())  # stock code takes it


def wide() -> nn.Module:
    """8 query heads on 4 key/value heads, so that Llama refuses 6 heads at most hidden sizes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_heads_that_stock_code_refuses_are_not_planned() -> None:
    """64 is no multiple of 6, so Llama cannot have three of four key/value heads; with uneven widths ours can."""
    for share in (0.7, 0.75, 0.8, 0.85):
        assert set(made(wide(), f"params={share}").pruned.heads) <= {1, 2, 4}
    assert set(made(wide(), "params=0.8", uniform=False, skip=(0,)).pruned.heads) == {4, 3}
    with pytest.raises(ValueError, match=r"heads=3: LlamaConfig does not accept .*num_attention_heads 6"):
        made(wide(), "heads=3")


def test_uneven_blocks_come_nearer_to_the_target() -> None:
    model = wide()
    found = made(model, "params=0.7", uniform=False, skip=plan.default_skip(3))
    assert found.pruned.heads[2] == 4 and found.pruned.channels[2] == 160
    sizes = Sizes(describe(model))
    assert 0 <= 0.7 * found.params[0] - found.params[1] < 4 * sizes.group("channels", 0, "params")


def test_global_ranking_takes_the_least_per_parameter() -> None:
    model = wide()
    scores = {groups.name: torch.full((groups.count,), 100.0) for groups in describe(model).groups()}
    scores["block1_channels"] = torch.arange(160.0) / 1000  # all of these are worth less than any other channel
    scores["block2_heads"][1] = 1e-6
    found = plan.make(model, "params=0.85", scores, Rules(round_to=4, uniform=False), ranking="global")
    sizes = Sizes(describe(model))
    assert found.kept["block2_heads"] == [0, 2, 3]
    count = found.pruned.channels[1]
    assert found.pruned.channels == (160, count, 160) and found.kept["block1_channels"] == list(range(160 - count, 160))
    assert 0 <= 0.85 * found.params[0] - found.params[1] < 4 * sizes.group("channels", 1, "params")


def test_the_best_stay_and_of_equal_ones_the_first() -> None:
    model = tiny("llama")
    scores = scores_of(model) | {"block0_channels": torch.tensor([1.0, 3, 2, 3, 2, 2] + [0.0] * 34)}
    scores["block1_heads"] = torch.tensor([1.0, 1.0])
    found = plan.make(model, "heads=1,channels=4", scores)
    assert found.kept["block0_channels"] == [1, 2, 3, 4] and found.kept["block1_heads"] == [0]


def test_a_plan_is_saved_looked_at_and_applied_later(tmp_path: Path) -> None:
    model = tiny("qwen3")
    found = made(model, "heads=1,channels=12", round_to=4)
    groups = {name: kept for name, kept in found.kept.items()}
    with removal.masked(model, groups):
        expected = logits(model)
    found.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == found
    assert relative_error(logits(loaded.apply(model)), expected) < 1e-12
    assert found.table().splitlines()[1].split() == ["0-1", "2", "->", "1", "40", "->", "12"]
    assert f"-> {parameter_counts(model)['total']:,}" in found.table()
    with pytest.raises(ValueError, match="plan is for a model of heads 2, channels 40"):
        loaded.apply(model)
    (tmp_path / "other.json").write_text('{"pyprune_plan": 2}')
    for name in ("other.json", "missing.json"):
        with pytest.raises(ValueError, match="not a plan that pyprune wrote"):
            Plan.load(tmp_path / name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"hidden": list(range(WIDTH + 1))}, "keep: expected different indices from 0 to"),
        ({"layers": [0, 5]}, "kept: expected rising indices of blocks, 0 to 1"),
        ({"block1_channels": [0, 0]}, r"kept\['block1_channels'\]: expected different indices"),
        ({"block9_heads": [0]}, r"kept: unknown groups \['block9_heads'\]"),
    ],
)
def test_an_edited_plan_that_cannot_be_cuts_nothing(edit: dict[str, list[int]], message: str) -> None:
    model = tiny("llama")
    found = made(model, "heads=1,channels=12", round_to=4)
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(found, kept=found.kept | edit).apply(model)
    assert Widths.of(describe(model)) == found.dense and torch.equal(logits(model), before)


def test_depth() -> None:
    """The block that changes its input least goes."""
    model = tiny("llama", dtype=torch.float32)
    for linear in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
        linear.weight.data *= 1e-3
        linear.bias.data *= 1e-3
    found = plan.make(model, "layers=1", score(model, [token_ids()]))
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: args[0])
    passed_by = logits(model)
    handle.remove()
    assert found.kept["layers"] == [1] and "0       2 -> gone" in found.table()
    found.apply(model)
    assert len(model.model.layers) == model.config.num_hidden_layers == 1
    assert relative_error(logits(model), passed_by) < 1e-5


def test_latency_is_met_by_what_was_measured() -> None:
    """With a made-up clock, linear in the channels: the largest shape measured at most the target."""
    model, asked = wide(), []

    def measure(widths: Widths) -> float:
        asked.append(widths)
        return 0.2 + 0.8 * sum(widths.channels) / (3 * 160)

    found = plan.make(model, "latency=0.7", scores_of(model), Rules(round_to=4), measure=measure)
    assert measure(found.pruned) <= 0.7 and found.pruned in asked
    slower = [w for w in asked if sum(w.channels) > sum(found.pruned.channels)]
    assert slower and all(measure(w) > 0.7 for w in slower) and len(asked) < 12


def test_latency_measures_the_shape_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def latency(models: dict[str, nn.Module], prompt: int, new: int, repeats: int) -> dict[str, Latency]:
        seen.update({name: Widths.of(describe(model)) for name, model in models.items()})
        return {"dense": Latency(2.0, 0.5, [], []), "pruned": Latency(1.0, 0.25, [], [])}

    monkeypatch.setattr(evaluation, "latency", latency)
    wanted = Widths(16, (1,), (12,))
    assert plan.latency_of(tiny("qwen3"), new_tokens=4)(wanted) == 0.5
    assert seen == {"dense": Widths.of(describe(tiny("qwen3"))), "pruned": wanted}


def test_targets_are_read() -> None:
    assert Target.parse("params=0.75") == Target("params", 0.75)
    assert Target.parse("bytes=2e9").limit(10) == 2e9 and Target.parse("bytes=0.5").limit(10) == 5
    assert Target.parse("heads=4, hidden=512").shape == {"heads": 4, "hidden": 512}
    for text in (
        "",
        "params",
        "params=-1",
        "params=nan",
        "latency=2",
        "width=3",
        "heads=1.5",
        "heads=1,heads=2",
        "params=0.5,heads=2",
    ):
        with pytest.raises(ValueError, match="expected params="):
            Target.parse(text)


def test_a_target_that_is_met_by_far_less_says_why() -> None:
    assert plan.met("params=0.75", 1000, 735).endswith("(0.7350); target params=0.75")
    assert "met by less because widths come in steps" in plan.met("params=0.75", 1000, 734)
    assert "met by less" in plan.met("params=750", 1000, 734)
    assert plan.met("heads=1", 1000, 10) == "parameters 1,000 -> 10 (0.0100); target heads=1"


def test_bad_input() -> None:
    model = tiny("llama")
    before = logits(model)
    for arguments, message in (
        ({"target": "params=0.05"}, r"not within reach of heads, channels; the smallest possible is [\d,]+ of [\d,]+"),
        (
            {"target": "params=0.6", "uniform": False, "skip": (0,)},
            r"not within reach of heads, channels with blocks \[0\] left alone; the smallest possible",
        ),
        (
            {"target": "params=0.8", "axes": ("hidden",), "round_to": 7},
            r"no hidden below \d+ is a multiple of round_to=7 and loads in stock code: .*such as 1$",
        ),
        (
            {"target": "params=0.8", "axes": ("hidden",), "round_to": 64},
            r"no hidden below \d+ is a multiple of round_to=64 and loads in stock code; take",
        ),
        ({"target": "params=1"}, "nothing would go"),
        ({"target": "params=1e9"}, "nothing would go"),
        ({"target": "heads=3"}, "heads=3: expected 1 to 2"),
        ({"target": "heads=2,channels=40"}, "has this shape already"),
        ({"target": "hidden=10"}, "does not accept hidden_size 10"),
        ({"target": "params=0.8", "skip": (1,)}, "stock code cannot load"),
        ({"target": "params=0.8", "uniform": False, "skip": (2,)}, r"skip names blocks \[2\]"),
        ({"target": "params=0.8", "axes": ("width",)}, "axes are width"),
        ({"target": "params=0.8", "axes": ()}, "axes are none"),
        ({"target": "params=0.8", "round_to": 0}, "round_to is 0"),
        ({"target": "latency=0.5", "uniform": False, "skip": (0, 1)}, "measured with uniform widths"),
    ):
        with pytest.raises(ValueError, match=message):
            made(model, **arguments)
    with pytest.raises(ValueError, match="none for block0_heads, which the target shrinks"):
        plan.make(model, "heads=1", {"block0_channels": torch.ones(40)})
    with pytest.raises(ValueError, match="needs uniform=False"):
        plan.make(model, "params=0.8", scores_of(model), ranking="global")
    assert torch.equal(logits(model), before)
