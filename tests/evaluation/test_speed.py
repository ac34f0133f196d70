"""What `pyprune bench` measures: every op once, results compared first, bytes and operations counted by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pyprune import checkpoint, ops, speed, timing

CPU = torch.device("cpu")
NOT_TIMED = {"hsm_residual_rmsnorm_backward", "rank_allocate"}  # the sum of others; a few numbers a row


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 160 x 192, a machine of round numbers, and two data sets each."""
    monkeypatch.setattr(speed, "SIZES", {"tiny": (160, 192)})
    monkeypatch.setattr(timing, "copies_for", lambda nbytes, device: 2)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(timing, "matmul_rate", lambda device, dtype: 1e10)


def test_every_op_is_right_and_timed(tiny: None) -> None:
    found = [speed.measure(case, CPU, rounds=1, budget=0.0) for case in speed.cases("tiny", CPU, (1, 3))]
    names = {name.partition("(")[0] for name in ops.OPS}
    assert {one.op for one in found} == names - NOT_TIMED
    assert all(0 < one.p20 <= one.p50 <= one.p80 and one.eager > 0 and one.floor > 0 for one in found)
    assert len({(one.op, one.label) for one in found}) == len(found)


def test_bytes_and_operations_are_the_least_that_the_op_needs(tiny: None) -> None:
    case = {(case.op, case.label): case for case in speed.cases("tiny", CPU, (1, 3))}
    dense = 2 * 160 * 192
    nm = case["nm_linear", "160x192 T=3 bfloat16"]  # x, y; half of the weights, and two bits for each
    assert nm.nbytes == 2 * 3 * (192 + 160) + dense // 2 + 160 * 96 // 4
    assert nm.operations == 2 * 3 * 160 * 96
    gathered = case["gathered_linear", "160x192 T=1 bfloat16 75%"]  # x, indices, the weight's columns, y
    assert gathered.nbytes == (2 + 8) * 144 + 2 * 160 * 144 + 2 * 160 and gathered.operations == 2 * 160 * 144
    hsm = case["hsm", "T=3 d=160 r=8 bfloat16"]  # x and y; two factors of 16 bits, v and the mask of 32
    assert hsm.nbytes == 2 * (2 * 3 * 160) + 2 * (2 * 8 * 160) + 4 * (8 + 160)
    assert hsm.operations == 2 * 3 * 8 * (160 + 160)
    adamw = case["nm_adamw_", "160x192 bfloat16"]  # weight and two moments read and written, gradient, a bit each
    assert adamw.nbytes == 3 * dense + 4 * 4 * 160 * 192 + 160 * 192 // 8
    assert case["nm_prune", "160x192 bfloat16"].nbytes == dense + 2 * 160 * 192 // 8  # with the mask before


def test_a_result_that_differs_is_refused(tiny: None) -> None:
    right = next(case for case in speed.cases("tiny", CPU, (1,)) if case.op == "masked_linear")
    wrong = dataclasses.replace(right, ours=lambda x, weight, bits: 1.05 * ops.masked_linear(x, weight, bits))
    speed.measure(right, CPU, 1, 0.0)
    with pytest.raises(RuntimeError, match="masked_linear, 160x192 T=1 bfloat16 50%: the result is not that of eager"):
        speed.measure(wrong, CPU, 1, 0.0)
    nothing = dataclasses.replace(right, ours=lambda *data: torch.full((1, 160), torch.nan))
    with pytest.raises(RuntimeError, match="not that of eager torch"):
        speed.measure(nothing, CPU, 1, 0.0)


@pytest.mark.parametrize(
    ("seconds", "rounds", "copies"),
    [
        (0.001, 10, 20),  # ten rounds of 20 calls of either side take 0.4 s
        (0.0099, 10, 10),  # 20 calls would take 0.2 s a round: half as many
        (1.0, 3, 1),
        (1.5, 1, 1),  # one round is longer than all may take
    ],
)
def test_slow_calls_get_fewer_rounds_and_copies(
    monkeypatch: pytest.MonkeyPatch, seconds: float, rounds: int, copies: int
) -> None:
    now, asked = [0.0], {}

    def call(x: torch.Tensor) -> torch.Tensor:
        now[0] += seconds
        return x

    def interleave(
        runs: Any, rounds: int, device: object, copies: Any, graphs: bool, clock: Any
    ) -> dict[str, timing.Samples]:
        asked.update(rounds=rounds, copies=set(copies.values()), graphs=graphs)
        return {name: timing.Samples((1.0,), True) for name in runs}

    monkeypatch.setattr(timing, "now", lambda device: now[0])
    monkeypatch.setattr(timing, "copies_for", lambda nbytes, device: 20)
    monkeypatch.setattr(timing, "floor", lambda *work: 0.5)
    monkeypatch.setattr(timing, "interleave", interleave)
    case = speed.Case("hsm", "", call, (torch.ones(4),), call, (torch.ones(4),), 32, graphs=False)
    found = speed.measure(case, CPU, rounds=10, budget=2.0)
    assert asked == {"rounds": rounds, "copies": {copies}, "graphs": False}
    assert (found.p50, found.floor, found.graph) == (1.0, 0.5, True)


# ---- models


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, **sizes)).eval()


def test_floor_of_a_model_is_its_weights_and_products(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    work = []
    monkeypatch.setattr(timing, "floor", lambda nbytes, operations, device, dtype: work.append((nbytes, operations)))
    model = llama()
    products = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)  # two blocks: q, o; k, v; gate, up, down
    speed._floor(model, 10, 2)
    assert work.pop() == (4 * (products + 4 * 64 + 50 * 64), 2 * (10 * products + 2 * 50 * 64))  # and norms; the head
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.dim() == 2:  # 1:4
                parameter.mul_(torch.tensor([1.0, 0, 0, 0]).repeat(parameter.shape[1] // 4))
    assert checkpoint.save(model, None, tmp_path).packed == 14
    speed._floor(AutoModelForCausalLM.from_pretrained(tmp_path), 10, 2)
    packed = products // 4 * 4 + products // 4 // 4  # fp32 values, two bits for each
    assert work.pop() == (packed + 4 * (4 * 64 + 50 * 64), 2 * (10 * products // 4 + 2 * 50 * 64))


def test_floor_of_a_layer_norm_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2: linears are Conv1D, the head is the embedding, which is read once; positions are no products."""
    work = []
    monkeypatch.setattr(timing, "floor", lambda nbytes, operations, device, dtype: work.append((nbytes, operations)))
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=16))
    found = speed.compare({"": model.eval()}, speed.Load((1,), 4, 2, 1))
    products = 2 * 12 * 32 * 32  # two blocks: q, k, v; o; up and down of four times the width
    beside = 2 * (9 * 32 + 4 * 32)  # biases: 3 + 1 + 4 + 1 widths; two norms
    assert len(found[""]) == 1 and work == [
        (4 * (products + beside + 50 * 32), 2 * (tokens * products + 50 * 32)) for tokens in (4, 1)
    ]


def test_models_take_turns_at_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def latency(models: Any, prompt: int, new: int, repeats: int, *, batch: int, progress: bool) -> Any:
        calls.append((list(models), prompt, new, repeats, batch))
        return {name: speed.evaluation.Latency(batch * 1.0, 0.5, [], []) for name in models}

    monkeypatch.setattr(speed.evaluation, "latency", latency)
    monkeypatch.setattr(timing, "floor", lambda nbytes, operations, device, dtype: operations)
    found = speed.compare({"a": llama(), "b": llama()}, speed.Load((1, 8), 16, 4, 2))
    assert calls == [(["a", "b"], 16, 4, 2, 1), (["a", "b"], 16, 4, 2, 8)]
    one, eight = found["b"]
    assert (one.batch, one.first_token, one.tokens_per_second) == (1, 1.0, 2.0)
    assert (eight.batch, eight.first_token, eight.tokens_per_second) == (8, 8.0, 16.0)
    assert one.first_token_floor > 8 * one.token_floor and eight.token_floor == 8 * one.token_floor


def test_a_load_of_nothing_is_refused() -> None:
    for wrong in ({"batches": ()}, {"batches": (4, 0)}, {"new_tokens": 0}, {"prompt_tokens": -1}, {"repeats": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*; expected at least 1"):
            speed.Load(**wrong)  # type: ignore[arg-type]
