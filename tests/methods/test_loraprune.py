"""LoRAPrune on small random decoders: the criterion, the schedule, exact targets, exact cuts, resume, two processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.reads import Reads
from surgery.tiny_decoders import tiny, token_ids
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from pyprune import LoRAPrune
from pyprune.architectures import describe, unwrap
from pyprune.data import TokenWindows
from pyprune.methods.loraprune import _Callback, schedule
from pyprune.models import open_model
from pyprune.surgery import export, parameter_counts
from pyprune.training import InterruptedTraining, read_metrics, tune

TARGET = "heads=1,channels=12"
# fp32 through two blocks, folded; measured below 3e-6 of the largest logit
FP32 = {"rtol": 1e-4, "atol": 1e-4}


def loraprune(**options: Any) -> LoRAPrune:
    return LoRAPrune(
        **{"target": TARGET, "mask_every": 2, "lora_rank": 3, "lora_alpha": 6.0, "lora_dropout": 0.0} | options
    )


def windows() -> TokenWindows:
    ids = torch.randint(3, 61, (32, 12), generator=torch.Generator().manual_seed(3))
    return TokenWindows(ids, ids.clone())


def train(method: LoRAPrune, model: nn.Module, folder: Path, steps: int = 20, **options: Any) -> list[dict[str, Any]]:
    options = {"learning_rate": 1e-2, "batch_size": 4, "callbacks": method.callbacks(), "save_every": 1000} | options
    tune(model, windows(), folder, steps=steps, metrics=folder / "metrics.jsonl", **options)
    return read_metrics(folder / "metrics.jsonl")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(token_ids()).logits


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "phi3"])
def test_cutting_while_training_is_masking(family: str, tmp_path: Path) -> None:
    """Losses and weights to fp32 rounding, which twenty steps of Adam amplify; the export is the trained model."""
    runs = {}
    for milestones in (0, 3):
        method = loraprune(milestones=milestones)
        model = method.prepare(tiny(family, family == "gemma", torch.float32))
        metrics = train(method, model, tmp_path / str(milestones))
        widths = [group.count for group in describe(model).groups()]
        assert widths == ([1, 12, 1, 12] if milestones else [2, 40, 2, 40])
        trained = logits(model)
        final = method.finalize(model)
        torch.testing.assert_close(logits(final), trained, **FP32)
        assert final.config.intermediate_size == 12 and final.config.num_key_value_heads == 1
        assert not hasattr(final, "loraprune") and not hasattr(final.config, "block_widths")
        export(final, None, tmp_path / f"model{milestones}")
        torch.testing.assert_close(logits(open_model(tmp_path / f"model{milestones}")), trained, **FP32)
        runs[milestones] = ([line["loss"] for line in metrics], trained)
    assert runs[0][0] == pytest.approx(runs[3][0], rel=2e-4)
    torch.testing.assert_close(runs[0][1], runs[3][1], rtol=1e-2, atol=1e-2)


def test_groups_go_by_the_cubic_schedule_and_end_exactly(tmp_path: Path) -> None:
    method = loraprune(target="channels=13", axes="channels", round_to=1, milestones=2)
    model = method.prepare(tiny("llama", False, torch.float32))
    left: list[list[int]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            tuning = method._tuning
            left.append(
                [int(tuning.alive(name).sum()) for name in ("block0_channels", "block1_channels", "block0_heads")]
            )

    metrics = train(method, model, tmp_path, steps=30, callbacks=[*method.callbacks(), Watch()])
    expected = []
    for step in range(1, 31):
        event = 27 if step >= 27 else step // 2 * 2  # warm-up 3, masks every 2 steps and at the end of the ramp
        share = 0 if event <= 3 else 1 - (1 - (event - 3) / 24) ** 3
        expected.append(40 - math.floor(share * 27 + 0.5))
    assert left == [[count, count, 2] for count in expected]
    assert left[26][0] == 13
    assert [line["groups_left"] for line in metrics[:27]] == pytest.approx(
        [(2 * count + 4) / 84 for count in expected[:27]], rel=1e-6
    )
    assert metrics[-1]["scores_skipped"] == 0


def test_schedule_ends_on_its_target() -> None:
    """At the authors' T = 312 their last event, step 280, is at 0.49999998 of 0.5, which masks 15 of 32 heads."""
    ramp, events, cuts = schedule(LoRAPrune(milestones=3), 312)
    assert max(events) == 280 and ramp(280) == 1 and ramp(279) < 1
    assert min(events) == 40 and cuts == {120, 200, 280}
    ramp, events, _ = schedule(LoRAPrune(mask_every=7), 320)  # warm-up until 32, ramp until 288
    assert ramp(160) == 0.875 and ramp(32) == 0
    assert max(events) == 288 and 287 in events
    with pytest.raises(ValueError, match="leave none to prune in"):
        schedule(LoRAPrune(), 2)


@pytest.mark.parametrize("clip", [1e-3, 1e9])
def test_average_is_that_of_unclipped_gradients(clip: float, tmp_path: Path) -> None:
    """Three steps' scores, from whole Ghat in fp64 and the gradients before clipping; each matrix of unit length."""
    method = loraprune(warmup_share=0.5, decay=0.7)
    model = method.prepare(tiny("qwen2", False, torch.float32))
    expected: dict[str, Tensor] = {}
    batches: list[Tensor] = []
    scale = 2.0

    def linears(i: int) -> dict[str, Any]:
        layer = unwrap(model).model.layers[i]
        return dict(layer.self_attn.named_children()) | dict(layer.mlp.named_children())

    class Reference(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            batches.clear()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trained = [p for n, p in model.named_parameters() if "lora_" in n]
            rows = torch.cat(batches)
            gradients = torch.autograd.grad(model(rows, labels=rows).loss, trained)
            known = {id(p): g.double() for p, g in zip(trained, gradients, strict=True)}
            for i in (0, 1):
                for axis, readers, writer, count in (
                    ("heads", ("q_proj", "k_proj", "v_proj"), "o_proj", 2),
                    ("channels", ("gate_proj", "up_proj"), "down_proj", 40),
                ):
                    total = torch.zeros(count, dtype=torch.float64)
                    for name in (*readers, writer):
                        layer = linears(i)[name]
                        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                        ga, gb = known[id(a)], known[id(b)]
                        a, b, w = a.detach().double(), b.detach().double(), layer.base_layer.weight.double()
                        s = ((gb @ (a - ga) + b @ ga) * (w + scale * b @ a)).abs()
                        sums = s.sum(0 if name == writer else 1).reshape(count, -1).sum(1)
                        total += sums / sums.norm()
                    key = f"block{i}_{axis}"
                    expected[key] = 0.7 * expected.get(key, torch.zeros(())) + 0.3 * total

    model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(kwargs["input_ids"]) if "input_ids" in kwargs else None,
        with_kwargs=True,
    )
    tuning = method._tuning
    options = {"max_grad_norm": clip, "callbacks": [Reference(), *method.callbacks(), At(3)]}
    with pytest.raises(InterruptedTraining):
        train(method, model, tmp_path, **options)
    for name, wanted in expected.items():
        torch.testing.assert_close(tuning.average(name).double(), wanted, rtol=1e-4, atol=1e-6)
    assert max(float(layer.lora_B["default"].weight.abs().max()) for layer in (linears(0)["q_proj"],)) > 1e-3


def test_average_is_that_of_activations(tmp_path: Path) -> None:
    """Three steps of two passes each: lengths over samples of the mean |x| over tokens, in fp64."""
    method = loraprune(criterion="activation", warmup_share=0.5, decay=0.7)
    model = method.prepare(tiny("qwen2", False, torch.float32))
    layers = unwrap(model).model.layers
    writers = {"heads": [x.self_attn.o_proj for x in layers], "channels": [x.mlp.down_proj for x in layers]}
    read: dict[str, list[Tensor]] = {}
    expected: dict[str, Tensor] = {}
    for axis, linears in writers.items():
        for i, linear in enumerate(linears):
            linear.register_forward_hook(
                lambda module, args, out, key=f"block{i}_{axis}": read.setdefault(key, []).append(args[0])
            )

    class Reference(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for key, (first, second) in read.items():
                x = torch.cat([first, second]).detach().double()
                means = x.abs().sum(1) / x.shape[1]
                length = (means * means).sum(0).reshape(2 if "heads" in key else 40, -1).sum(1).sqrt()
                expected[key] = 0.7 * expected.get(key, torch.zeros(())) + 0.3 * length
            read.clear()

    tuning = method._tuning
    options = {"gradient_accumulation_steps": 2, "callbacks": [Reference(), *method.callbacks(), At(3)]}
    with pytest.raises(InterruptedTraining):
        train(method, model, tmp_path, **options)
    assert len(expected) == 4
    for name, wanted in expected.items():
        torch.testing.assert_close(tuning.average(name).double(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_heads_that_no_activation_passes_go_first(checkpointing: bool, tmp_path: Path) -> None:
    """By activations; to the target, exactly, and cut in training."""
    dense = tiny("qwen2", False, torch.float32)
    with torch.no_grad():
        for i, layer in enumerate(dense.model.layers):
            values = layer.self_attn.v_proj
            width = len(values.weight) // 2
            for tensor in (values.weight, values.bias):
                tensor[i * width : (i + 1) * width] *= 1e-3
    method = loraprune(criterion="activation", target="heads=1,channels=40", milestones=1)
    model = method.prepare(dense)
    train(method, model, tmp_path, gradient_checkpointing=checkpointing)
    assert [method._tuning.present[f"block{i}_heads"].tolist() for i in (0, 1)] == [[1], [0]]
    assert method.finalize(model).config.num_key_value_heads == 1


def test_own_function_chooses(tmp_path: Path) -> None:
    """It sees the step's tokens and what is left of each group; scores that do not fit end the training."""
    seen: list[list[int]] = []

    def last_best(model: nn.Module, batches: Any) -> dict[str, Tensor]:
        (ids,) = batches
        assert ids.shape == (4, 12) and any(torch.equal(ids[0], row) for row in windows().ids)
        counts = {g.name: g.count for g in describe(model).groups()}
        seen.append(list(counts.values()))
        return {name: torch.arange(count).float() for name, count in counts.items()}

    method = loraprune(criterion=last_best)
    model = method.prepare(tiny("qwen2", False, torch.float32))
    tuning = method._tuning
    train(method, model, tmp_path / "own")
    assert seen[0] == [2, 40, 2, 40] and seen[-1] != seen[0]  # milestones cut in between
    for name, kept in (("heads", [1]), ("channels", list(range(28, 40)))):
        for i in (0, 1):
            left = tuning.present[f"block{i}_{name}"]
            assert left[tuning.alive(f"block{i}_{name}")[left] > 0].tolist() == kept
    for number, message in (
        (math.nan, "function: 2 of 2 scores of block0_heads are not finite"),
        (None, "lack block1_"),
    ):

        def function(model: nn.Module, batches: Any, number: float | None = number) -> dict[str, Tensor]:
            groups = {g.name: torch.full((g.count,), number or 0.0) for g in describe(model).groups()}
            return {name: values for name, values in groups.items() if number is not None or "block0" in name}

        method = loraprune(criterion=function)
        with pytest.raises(ValueError, match=message):
            train(method, method.prepare(tiny("qwen2", False, torch.float32)), tmp_path / str(number))


class At(TrainerCallback):
    """Stops, saved, behind a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("stop", [3, 9, 15, 19])
def test_resumed_run_is_the_unbroken_run(stop: int, uniform: bool, tmp_path: Path) -> None:
    """Bit for bit, stopped in the warm-up, behind each of two cuts, and in the cool-down."""
    options = {"lora_dropout": 0.1, "milestones": 3}
    if not uniform:
        options |= {"uniform": False, "target": "params=0.85", "round_to": 4}

    def prepared(method: LoRAPrune, **more: Any) -> nn.Module:
        return method.prepare(tiny("llama", False, torch.float32), **more)

    method = loraprune(**options)
    whole = prepared(method)
    train(method, whole, tmp_path / "whole")
    method = loraprune(**options)
    broken = prepared(method)
    with pytest.raises(InterruptedTraining):
        train(method, broken, tmp_path / "parts", callbacks=[*method.callbacks(), At(stop)])
    method = loraprune(**options)
    resumed = prepared(method, resume=tmp_path / "parts" / f"checkpoint-{stop}")
    train(method, resumed, tmp_path / "parts")
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    final = method.finalize(resumed)
    assert hasattr(final.config, "block_widths") is not uniform


def test_a_run_of_another_model_or_target_is_not_resumed(tmp_path: Path) -> None:
    method = loraprune()
    model = method.prepare(tiny("llama", False, torch.float32))
    with pytest.raises(InterruptedTraining):
        train(method, model, tmp_path, callbacks=[*method.callbacks(), At(12)])
    checkpoint = tmp_path / "checkpoint-12"
    for other, changed, message in (
        (
            tiny("llama"),
            {"target": "heads=1,channels=16"},
            "another target: block0_channels had 12 groups, now it has 16",
        ),
        (tiny("llama"), {"target": "channels=12"}, "another target: block0_heads had 1 groups, now it has 2"),
        (wide(), {"target": "heads=1,channels=12"}, "another model: block0_channels had 40 groups, now it has 160"),
    ):
        before = parameter_counts(other)
        with pytest.raises(ValueError, match=message):
            loraprune(**changed).prepare(other, resume=checkpoint)
        assert parameter_counts(other) == before and not hasattr(unwrap(other), "loraprune")
    with pytest.raises(ValueError, match="not a checkpoint of LoRAPrune"):
        loraprune().prepare(tiny("llama"), resume=tmp_path)


def wide() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_steps_that_are_not_finite_are_left_out_and_counted(tmp_path: Path) -> None:
    """A NaN in one score of step 3 leaves the averages of step 2."""
    averages: list[Tensor] = []
    method = loraprune(warmup_share=0.5)
    model = method.prepare(tiny("llama", False, torch.float32))
    tuning = method._tuning

    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                layer = unwrap(model).model.layers[1].mlp.down_proj
                self.good, layer.lora_A["default"].weight.grad = layer.lora_A["default"].weight.grad, None
                layer.lora_A["default"].weight.grad = self.good * math.nan

    class Repair(TrainerCallback):
        def __init__(self, poison: Poison) -> None:
            self.poison = poison

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            averages.append(tuning.average("block0_channels").clone())
            if state.global_step == 2:
                unwrap(model).model.layers[1].mlp.down_proj.lora_A["default"].weight.grad = self.poison.good

    poison = Poison()
    with pytest.raises(InterruptedTraining):
        train(method, model, tmp_path, callbacks=[poison, *method.callbacks(), Repair(poison), At(4)])
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["scores_skipped"] for line in metrics] == [0, 0, 1, 1]
    assert torch.equal(averages[1], averages[2]) and not torch.equal(averages[2], averages[3])


def test_a_step_reads_one_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factor of clipping; none in the cool-down, whose sentinel nobody reads."""
    original, counts = _Callback.on_pre_optimizer_step, []

    def counted(self: _Callback, *args: Any, **kwargs: Any) -> None:
        with Reads() as reads:
            original(self, *args, **kwargs)
        counts.append(reads.count)

    monkeypatch.setattr(_Callback, "on_pre_optimizer_step", counted)
    method = loraprune()
    train(method, method.prepare(tiny("llama", False, torch.float32)), tmp_path)
    assert counts == [1] * 18 + [0] * 2


def test_masked_groups_stay_masked(tmp_path: Path) -> None:
    """Whatever their average becomes."""
    method = loraprune(milestones=0)
    method.prepare(tiny("llama", False, torch.float32))
    tuning = method._tuning
    tuning.average("block0_channels").copy_(torch.arange(40.0))
    tuning.mask(0.5)
    assert tuning.alive("block0_channels").tolist() == [0.0] * 14 + [1.0] * 26
    tuning.average("block0_channels").copy_(40 - torch.arange(40.0))
    tuning.mask(1.0)
    assert tuning.alive("block0_channels").tolist() == [0.0] * 14 + [1.0] * 12 + [0.0] * 14
    assert tuning.done


def test_accumulation_and_gradient_checkpointing_change_nothing(tmp_path: Path) -> None:
    losses = []
    for name, options in (
        ("plain", {}),
        ("checkpointing", {"gradient_checkpointing": True}),
        ("accumulated", {"batch_size": 2, "gradient_accumulation_steps": 2}),
    ):
        method = loraprune()
        model = method.prepare(tiny("llama", False, torch.float32))
        losses.append([line["loss"] for line in train(method, model, tmp_path / name, **options)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-3)


def test_plain_trainer_and_bf16(tmp_path: Path) -> None:
    method = loraprune()
    model = method.prepare(tiny("llama", False, torch.bfloat16))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=4, report_to="none", save_strategy="no", use_cpu=True,
        bf16=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=windows(), callbacks=[method.callback()]).train()
    trained = logits(model).float()
    final = method.finalize(model)
    assert next(final.parameters()).dtype == torch.bfloat16
    assert (logits(final).float() - trained).norm() / trained.norm() < 0.05  # merged weights round to 2^-8


def test_target_of_parameters_is_met(tmp_path: Path) -> None:
    method = loraprune(target="params=0.7", round_to=4)
    model = method.prepare(wide())
    dense = parameter_counts(wide())["total"]
    train(method, model, tmp_path)
    total = parameter_counts(method.finalize(model))["total"]
    assert 0 <= 0.7 * dense - total < 4 * 3 * 64 * 3  # one step of 4 channels in 3 blocks


def _two_processes(rank: int, folder: str) -> None:
    import os

    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": Path(folder, "port").read_text(),
    }  # fmt: skip
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    method = loraprune(milestones=0)
    model = method.prepare(tiny("llama", False, torch.float32))
    arguments = TrainingArguments(
        folder, max_steps=8, per_device_train_batch_size=4, report_to="none", save_strategy="no", use_cpu=True,
        learning_rate=1e-2, disable_tqdm=True, ddp_backend="gloo", max_grad_norm=1e-2,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=windows(), callbacks=[method.callback()]).train()
    state = {name: buffer for name, buffer in model.named_buffers() if "loraprune" in name}
    torch.save({**state, "trained": [p.detach() for p in model.parameters() if p.requires_grad]}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_mask_the_same_groups(tmp_path: Path) -> None:
    """Two processes of four rows each are one of eight: same averages to rounding, and the same masks, bit for bit
    between the two."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(probe.getsockname()[1]))
    torch.multiprocessing.spawn(_two_processes, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert [name for name in first if name != "trained" and not torch.equal(first[name], second[name])] == []
    assert all(torch.equal(a, b) for a, b in zip(first["trained"], second["trained"], strict=True))
    method = loraprune(milestones=0)
    model = method.prepare(tiny("llama", False, torch.float32))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=8, report_to="none", save_strategy="no", use_cpu=True,
        learning_rate=1e-2, disable_tqdm=True, max_grad_norm=1e-2,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=windows(), callbacks=[method.callback()]).train()
    for name, buffer in model.named_buffers():
        if "loraprune.alive" in name:
            assert torch.equal(buffer, first[name]), name
        elif "loraprune.average" in name:
            torch.testing.assert_close(buffer, first[name], rtol=1e-2, atol=1e-4)


def test_unknown_criterion() -> None:
    with pytest.raises(ValueError, match="criterion is 'taylor'; expected one of lora, activation"):
        loraprune(criterion="taylor")


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"target": "latency=0.5"}, "finds the shape for a latency"),
        ({"target": "hidden=16"}, "expected heads and channels"),
        ({"axes": "heads,layers"}, "expected heads and channels"),
        ({"dora": True}, "dora is True"),
        ({"warmup_share": 0.6, "cooldown_share": 0.5}, "leave no step to prune in"),
        ({"decay": 1.0}, "decay is 1.0"),
        ({"mask_every": 0}, "mask_every is 0"),
        ({"milestones": -1}, "milestones is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            loraprune(**options)
    with pytest.raises(ValueError, match="smallest possible is"):
        loraprune(target="params=0.01", round_to=4).prepare(tiny("llama"))
    with pytest.raises(RuntimeError, match="call prepare"):
        loraprune().callback()
    method = loraprune()
    model = method.prepare(tiny("llama", False, torch.float32))
    with pytest.raises(RuntimeError, match="masked 0% of the groups and not reached the target"):
        method.finalize(model)
    callback, state, control = method.callback(), TrainerState(max_steps=20), TrainerControl()
    quiet = {"report_to": "none", "use_cpu": True}
    with pytest.raises(ValueError, match="fp16"):
        callback.on_train_begin(TrainingArguments(str(tmp_path), fp16=True, **quiet), state, control)
    best = TrainingArguments(
        str(tmp_path), load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", **quiet
    )
    with pytest.raises(ValueError, match="load_best_model_at_end"):
        callback.on_train_begin(best, state, control)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="milestones=0"):
        callback.on_train_begin(TrainingArguments(str(tmp_path), **quiet), state, control)
