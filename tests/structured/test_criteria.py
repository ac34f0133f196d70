"""Every criterion against the same sums over whole gradients and activations in fp64, written with the stock names."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from surgery.tiny_decoders import COMMON, compute_norms_in_fp64, tiny, token_ids
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM

from pyprune import criteria
from pyprune.architectures import describe, unwrap
from pyprune.criteria import CRITERIA, lora_scores, score

HEADS, PER_KEY, CHANNELS = 2, 2, 40  # key/value heads, query heads to each, of tests/surgery/tiny_decoders.py
ROWS = {"heads": ("q_proj", "k_proj", "v_proj"), "channels": ("gate_proj", "up_proj")}
COLUMNS = {"heads": "o_proj", "channels": "down_proj"}
BATCHES = [token_ids(2, 9, 1), token_ids(1, 9, 2)]


def linears(model: nn.Module, i: int) -> dict[str, nn.Module]:
    layer = unwrap(model).model.layers[i]
    return dict(layer.self_attn.named_children()) | dict(layer.mlp.named_children())


def group_sums(entries: dict[str, Tensor], axis: str, normalised: bool) -> Tensor:
    """From |importance| of every weight [out, in] by linear to one number a group."""
    count = HEADS if axis == "heads" else CHANNELS
    vectors = [entries[name].sum(1) for name in ROWS[axis]] + [entries[COLUMNS[axis]].sum(0)]
    total = torch.zeros(count, dtype=torch.float64)
    for vector in vectors:
        sums = torch.stack([piece.sum() for piece in vector.chunk(count)])
        total += sums / sums.norm() if normalised else sums
    return total


def expected(model: nn.Module, entries: list[dict[str, Tensor]], normalised: bool) -> dict[str, Tensor]:
    return {
        f"block{i}_{axis}": group_sums(each, axis, normalised)
        for i, each in enumerate(entries)
        for axis in ("heads", "channels")
    }


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name].double(), wanted[name].double(), rtol=rtol, atol=0)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean over all predicted tokens, as stock code takes it."""
    logits = model(ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def whole_gradients(model: nn.Module, ids: Tensor) -> list[dict[str, Tensor]]:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.zero_grad()
    loss(model, ids).backward()
    return [
        {n: m.weight.grad.clone() for n, m in linears(model, i).items() if hasattr(m, "in_features")} for i in (0, 1)
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("order", ["first", "second", "mixed"])
def test_taylor_is_that_of_whole_gradients(order: str, checkpointing: bool) -> None:
    model = tiny("qwen2")
    ids = torch.cat(BATCHES)
    gradient, samples = whole_gradients(model, ids), [whole_gradients(model, row[None]) for row in ids]
    entries = []
    for i in (0, 1):
        importance = {}
        for name in gradient[i]:
            w, g = linears(model, i)[name].weight.detach(), gradient[i][name]
            h = torch.stack([sample[i][name].square() for sample in samples]).mean(0)
            importance[name] = {"first": w * g, "second": w * h * w, "mixed": w * g - 0.5 * w * h * w}[order].abs()
        entries.append(importance)
    fresh = tiny("qwen2")
    if checkpointing:
        fresh.gradient_checkpointing_enable({"use_reentrant": False})
        fresh.train()
    before = [p.requires_grad for p in fresh.parameters()]
    hooks = len(fresh.model.embed_tokens._forward_hooks)
    found = score(fresh, BATCHES, f"taylor-{order}" if order != "first" else "taylor")
    assert_same(found, expected(model, entries, normalised=False))
    assert [p.requires_grad for p in fresh.parameters()] == before and all(p.grad is None for p in fresh.parameters())
    assert fresh.training == checkpointing and len(fresh.model.embed_tokens._forward_hooks) == hooks


def test_taylor_in_slabs_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score(tiny("phi3"), BATCHES, "taylor-mixed")
    monkeypatch.setattr(criteria, "ROWS", 7)
    assert_same(score(tiny("phi3"), BATCHES, "taylor-mixed"), whole)


def test_lora_is_the_projected_gradient_at_the_start() -> None:
    """B = 0: gB = s G A^T, so |Ghat W| = s |G A^T A W|, with G the gradient of the weight summed over the batches."""
    model = tiny("mistral")
    gradients = [whole_gradients(model, ids) for ids in BATCHES]
    fresh = tiny("mistral")
    adapted = tiny("mistral")
    torch.manual_seed(5)
    adapted = get_peft_model(adapted, LoraConfig(r=3, lora_alpha=3, target_modules="all-linear"))
    a = [
        {n: m.lora_A["default"].weight.double() for n, m in linears(adapted, i).items() if hasattr(m, "lora_A")}
        for i in (0, 1)
    ]
    entries = [
        {
            name: (
                (gradients[0][i][name] + gradients[1][i][name]) @ matrix.T @ matrix * linears(model, i)[name].weight
            ).abs()
            for name, matrix in a[i].items()
        }
        for i in (0, 1)
    ]
    found = score(fresh, BATCHES, lambda m, b: criteria.lora(m, b, rank=3, seed=5))
    assert_same(found, expected(model, [{n: t.detach() for n, t in e.items()} for e in entries], True), rtol=1e-4)
    assert type(linears(fresh, 0)["q_proj"]) is nn.Linear  # the adapters are gone
    assert all(p.requires_grad for p in fresh.parameters())


def test_lora_scores_undo_clipping() -> None:
    """Ghat is quadratic in the gradients: a factor that clipping left in would change the order of groups."""
    model = get_peft_model(
        tiny("qwen2"), LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    ).double()
    loss(model, BATCHES[0]).backward()
    groups = describe(model).groups()
    wanted = lora_scores(groups)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad *= 0.01
    assert_same(lora_scores(groups, clipped=0.01), wanted, rtol=1e-9)
    changed = lora_scores(groups)
    assert max(float((changed[name] - wanted[name]).abs().max()) for name in wanted) > 1e-3


def activations(model: nn.Module) -> dict[str, list[Tensor]]:
    """Inputs of the output and down projections, outputs of residual norms, and blocks' in- and outputs, per batch."""
    found: dict[str, list[Tensor]] = {}
    handles = []
    for i, layer in enumerate(model.model.layers):
        for name, module in ((f"block{i}_heads", layer.self_attn.o_proj), (f"block{i}_channels", layer.mlp.down_proj)):
            handles.append(
                module.register_forward_pre_hook(lambda m, args, name=name: found.setdefault(name, []).append(args[0]))
            )
        handles.append(
            layer.register_forward_hook(lambda m, args, out, i=i: found.setdefault(f"in{i}", []).append(args[0]))
        )
        handles.append(
            layer.register_forward_hook(lambda m, args, out, i=i: found.setdefault(f"out{i}", []).append(out))
        )
    norms = [n for layer in model.model.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
    for norm in [*norms, model.model.norm]:
        handles.append(norm.register_forward_hook(lambda m, args, out: found.setdefault("hidden", []).append(out)))
    with torch.no_grad():
        for ids in BATCHES:
            model(ids)
    for handle in handles:
        handle.remove()
    return found


def test_activation_norm_and_depth() -> None:
    seen = activations(tiny("gemma"))
    wanted = {}
    for name, pieces in seen.items():
        if name.startswith(("block", "hidden")):
            channel = torch.cat([piece.abs().mean(1) for piece in pieces]).square().sum(0)
            count = HEADS if name.endswith("heads") else len(channel)
            wanted[name] = torch.stack([piece.sum() for piece in channel.chunk(count)]).sqrt()
    cosine = [
        torch.cat(
            [
                nn.functional.cosine_similarity(x, y, dim=-1).flatten()
                for x, y in zip(seen[f"in{i}"], seen[f"out{i}"], strict=True)
            ]
        )
        for i in (0, 1)
    ]
    wanted["layers"] = torch.stack([1 - each.mean() for each in cosine])
    assert_same(score(tiny("gemma"), BATCHES), wanted)


def test_wanda_by_columns() -> None:
    model = tiny("qwen3")
    seen = activations(model)
    wanted = {}
    for i in (0, 1):
        for axis, count in (("heads", HEADS), ("channels", CHANNELS)):
            x = torch.cat([piece.flatten(0, 1) for piece in seen[f"block{i}_{axis}"]])
            column = (x.norm(dim=0) * linears(model, i)[COLUMNS[axis]].weight.detach()).abs().sum(0)
            wanted[f"block{i}_{axis}"] = torch.stack([piece.sum() for piece in column.chunk(count)])
    assert_same(score(model, BATCHES, "wanda"), wanted)


def test_magnitude() -> None:
    model = tiny("llama")
    entries = [
        {n: m.weight.detach().abs() for n, m in linears(model, i).items() if hasattr(m, "in_features")} for i in (0, 1)
    ]
    assert_same(score(model, None, "magnitude"), expected(model, entries, normalised=True))


def test_fused_projections_give_the_scores_of_separate_ones() -> None:
    """A Phi-3 whose fused rows are a Mistral's matrices, one above the other."""
    plain = tiny("mistral")
    fused = Phi3ForCausalLM(Phi3Config(**COMMON | {"sliding_window": None})).double().eval()
    compute_norms_in_fp64(fused)
    state = dict(plain.state_dict())
    for i in (0, 1):
        p = f"model.layers.{i}"
        state[f"{p}.self_attn.qkv_proj.weight"] = torch.cat(
            [state.pop(f"{p}.self_attn.{n}.weight") for n in ROWS["heads"]]
        )
        state[f"{p}.mlp.gate_up_proj.weight"] = torch.cat([state.pop(f"{p}.mlp.{n}.weight") for n in ROWS["channels"]])
    fused.load_state_dict(state)
    batches = [ids[:, :5] for ids in BATCHES]  # as long as Mistral's window
    for criterion in ("activation", "wanda", "magnitude", "taylor"):
        assert_same(score(fused, batches, criterion), score(plain, batches, criterion))


def test_random_and_own_functions() -> None:
    model = tiny("llama")
    assert_same(score(model, None, "random"), score(model, None, "random"))
    own = score(model, None, lambda model, batches: {"block1_heads": torch.tensor([2.0, 1.0])})
    assert own["block1_heads"].tolist() == [2.0, 1.0]


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name not in ("magnitude", "random")])
def test_criteria_without_data_say_so(criterion: str) -> None:
    with pytest.raises(ValueError, match="it reads text, and there is none"):
        score(tiny("llama"), None, criterion)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("criterion", ["activation", "wanda", "taylor", "taylor-mixed", "lora", "magnitude"])
def test_a_model_stays_in_its_mode(criterion: str, training: bool) -> None:
    model = tiny("llama").train(training)
    score(model, BATCHES, criterion)
    assert {module.training for module in model.modules()} == {training}


def test_bad_input() -> None:
    model = tiny("llama")
    for returned, message in (
        ({"block0_heads": torch.ones(3)}, r"score of block0_heads is \[3\]; expected a tensor of shape \[2\]"),
        ({"block0_heads": [1.0, 2.0]}, "score of block0_heads is list"),
        ({"block0_heads": torch.tensor([1.0, torch.nan])}, "1 of 2 scores of block0_heads are not finite"),
        ({"layer0": torch.ones(2)}, r"unknown groups \['layer0'\]; expected names like block0_heads"),
    ):
        with pytest.raises(ValueError, match=message):
            score(model, None, lambda model, batches, returned=returned: returned)
    with pytest.raises(ValueError, match="criterion is 'tayler'; expected one of activation"):
        score(model, BATCHES, "tayler")
    with pytest.raises(ValueError, match=r"batches of \[4, 9\] tokens"):
        score(model, [BATCHES[0], token_ids(1, 4)], "taylor")
    for batch, message in (
        (token_ids(1, 9) + 58, r"from 0 to 60, .* found torch\.int64 \[1, 9\] with values from \d+ to \d+; encode"),
        (token_ids(1, 9)[0], r"expected int64 or int32 token ids \[B, T\] .* found torch\.int64 \[9\]"),
        (token_ids(1, 9)[:0], r"no batch of them empty, found torch\.int64 \[0, 9\]"),
        (token_ids(1, 65), "windows of 65 tokens, more than the 64 positions"),
    ):
        for criterion in ("activation", "wanda", "taylor", "lora"):
            with pytest.raises(ValueError, match=f"criterion {criterion}: .*{message}"):
                score(model, [batch], criterion)
    with pytest.raises(ValueError, match="0 LoRA adapters"):
        lora_scores(describe(model).groups())
