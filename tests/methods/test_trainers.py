"""PAT in trainers that are not ours, transformers' and TRL's, with evaluation, autocast and odd accumulation; and what
methods that prune under way refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from methods.test_loraprune import loraprune
from methods.test_pat import FP32, KEPT, calibration, logits, pat, prepared, windows
from surgery.tiny_decoders import tiny
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import pyprune
from pyprune import PAT
from pyprune.architectures import describe, unwrap
from pyprune.data import TokenWindows


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
    return TrainingArguments(
        str(folder), **{"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2} | quiet | options
    )


def run(method: Any, model: nn.Module, options: TrainingArguments, *before: TrainerCallback, **more: Any) -> Trainer:
    trainer = Trainer(
        model=model, args=options, train_dataset=windows(), callbacks=[*before, method.callback()], **more
    )
    trainer.train()
    return trainer


def logged(trainer: Trainer, key: str) -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


def selection(model: nn.Module) -> Any:
    return unwrap(model).pat.selection


@pytest.mark.parametrize("basis", ["pca", "learned"])
def test_evaluation_disturbs_nothing_and_reports_the_task_loss(basis: str, tmp_path: Path) -> None:
    """After every step: what was trained stays bit for bit the same, and the loss is the cross entropy of the logits,
    however heavy the identity loss."""
    expected = []

    class Reference(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rows = held_out.ids
            with torch.no_grad():
                found = kwargs["model"].eval()(rows).logits[:, :-1].double().flatten(0, 1)
            expected.append(nn.functional.cross_entropy(found, rows[:, 1:].flatten()).item())

    held_out = TokenWindows(windows().ids[:6].flip(1), windows().ids[:6].flip(1))
    runs = []
    for evaluated in (False, True):
        method = pat(basis, identity_weight=50.0)
        model = prepared(method)
        options = arguments(
            tmp_path, eval_strategy="steps" if evaluated else "no", eval_steps=1, eval_on_start=evaluated
        )
        trainer = run(method, model, options, Reference(), eval_dataset=held_out)
        runs.append((logged(trainer, "loss"), model.state_dict(), logged(trainer, "eval_loss")))
    assert runs[0][0] == runs[1][0]
    assert [name for name, tensor in runs[0][1].items() if not torch.equal(tensor, runs[1][1][name])] == []
    # fp32 losses of about 4 against fp64 ones
    assert len(expected) == 7 and runs[1][2] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("basis", ["pca", "learned"])
def test_gradient_of_the_mask_with_odd_accumulation(basis: str, tmp_path: Path) -> None:
    """Eight batches an epoch in steps of three passes: the last step of an epoch has two. Each step moves the choice
    once, by the gradient of the mean loss over that step's tokens, and the milestone counts optimiser steps."""
    found: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    batches: list[torch.Tensor] = []

    class Spy(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            batches.clear()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            chosen = selection(kwargs["model"])
            if chosen.value.grad is None:  # behind the milestone
                return
            gradient, chosen.value.grad = chosen.value.grad.clone(), None
            rows = torch.cat(batches)
            loss = kwargs["model"](rows, labels=rows).loss
            (reference,) = torch.autograd.grad(loss, chosen.value)
            chosen.value.grad = gradient
            found.append((len(rows), gradient, reference))

    method = pat(basis, milestone=0.7)
    model = prepared(method)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(kwargs["input_ids"]) if "input_ids" in kwargs else None,
        with_kwargs=True,
    )
    trainer = run(method, model, arguments(tmp_path, max_steps=7, gradient_accumulation_steps=3), Spy())
    assert [rows for rows, _, _ in found] == [12, 12, 8, 12, 12]  # five of seven steps stand before the milestone
    for _, gradient, reference in found:
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6 * float(reference.abs().max()))
    assert len(logged(trainer, "mask_count")) == 5 and logged(trainer, "mask_count")[-1] == KEPT
    trained = logits(model)
    torch.testing.assert_close(logits(method.finalize(model)), trained, **FP32)


@pytest.mark.parametrize("basis", ["identity", "pca", "learned"])
def test_bf16_autocast(basis: str, tmp_path: Path) -> None:
    """fp32 weights, products in bf16: the losses of the fp32 run within bf16's rounding, and an exact export."""
    losses = {}
    for bf16 in (False, True):
        method = pat(basis)
        model = prepared(method)
        trainer = run(method, model, arguments(tmp_path, bf16=bf16, learning_rate=1e-3))
        losses[bf16] = logged(trainer, "loss")
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=2e-2)  # 2^-8 a product, eight layers of them
    final = method.finalize(model)
    assert final.config.hidden_size == KEPT and next(final.parameters()).dtype == torch.float32


def test_refuses_what_cannot_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = pat("pca")
    model = prepared(method)
    best = arguments(tmp_path, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps")
    with pytest.raises(ValueError, match="load_best_model_at_end"):
        run(method, model, best, eval_dataset=windows())
    with pytest.raises(ValueError, match="fp16"):
        callback = method.callback()
        callback.on_train_begin(arguments(tmp_path, fp16=True), TrainerState(max_steps=6), TrainerControl())
    with pytest.raises(ValueError, match="step 1, which leaves none behind it"):
        run(method, model, arguments(tmp_path, max_steps=1))
    with monkeypatch.context() as patch:
        patch.setattr(TrainingArguments, "n_gpu", 2)
        with pytest.raises(ValueError, match=r"2 GPUs are visible to one process.*set CUDA_VISIBLE_DEVICES"):
            method.callback().on_train_begin(arguments(tmp_path), TrainerState(max_steps=6), TrainerControl())
    sharded = arguments(tmp_path)
    sharded.fsdp = ["full_shard"]
    with pytest.raises(ValueError, match="fsdp shards or steps parameters out of reach"):
        method.callback().on_train_begin(sharded, TrainerState(max_steps=6), TrainerControl())
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match=r"2 processes train one model.*use compact=False"):
        method.callback().on_train_begin(arguments(tmp_path), TrainerState(max_steps=6), TrainerControl())


@pytest.mark.parametrize("stop", [2, 8])
@pytest.mark.parametrize("make", [lambda: pat("pca", lora_dropout=0.1), lambda: loraprune(lora_dropout=0.1)])
def test_a_plain_trainer_resumes_bit_for_bit(make: Any, stop: int, tmp_path: Path) -> None:
    """Of the checkpoint it loads the adapters alone; the rest, before and behind PAT's milestone at 4, is the
    callback's. A model that was not prepared for it is refused."""
    options = {"save_strategy": "steps", "save_steps": stop, "max_steps": 12}
    if type(make()).__name__ == "LoRAPrune":
        options["learning_rate"] = 1e-3
    checkpoint = tmp_path / f"checkpoint-{stop}"

    def trained(resume: Path | None, go_on: bool) -> dict[str, torch.Tensor]:
        method = make()
        model = method.prepare(tiny("llama", False, torch.float32), calibration(), resume)
        trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=windows(), callbacks=[method.callback()])
        trainer.train(resume_from_checkpoint=str(checkpoint) if go_on else None)
        return model.state_dict()

    whole = trained(None, False)
    resumed = trained(checkpoint, True)
    assert resumed.keys() == whole.keys()
    assert [name for name, tensor in resumed.items() if not torch.equal(tensor, whole[name])] == []
    if stop == 2:  # behind a cut PEFT itself says that the shapes differ
        with pytest.raises(ValueError, match=r"goes on from step 2, but prepare was called without resume"):
            trained(None, True)


def test_a_model_with_adapters_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    for method in (pat("identity"), loraprune(), pyprune.LoRA()):
        model = get_peft_model(tiny("llama", False, torch.float32), LoraConfig(r=2, target_modules=["q_proj"]))
        with pytest.raises(ValueError, match=r"adapters"):
            method.prepare(model)


@pytest.mark.parametrize("method", [pat("pca"), pat("identity"), loraprune()], ids=["pca", "identity", "loraprune"])
def test_an_optimizer_that_cannot_follow_is_refused_before_anything_is_cut(method: Any, tmp_path: Path) -> None:
    """At its first step, when it is known what it keeps, and not at the milestone."""
    model = method.prepare(tiny("llama", False, torch.float32), calibration())
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    steps = []

    class Count(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append(state.global_step)

    with pytest.raises(ValueError, match=r"the Trainer's optimizer keeps 'exp_avg_sq_row', which cannot follow"):
        run(method, model, arguments(tmp_path, optim="adafactor", max_steps=12), Count())
    assert steps == [0] and {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes


def test_packed_weights_are_refused_before_training() -> None:
    """They could not be cut at the milestone, and their rows cannot be masked."""
    model = tiny("llama", False, torch.float32)
    with torch.no_grad():
        for linear in (module for module in model.modules() if isinstance(module, nn.Linear)):
            linear.weight[:, ::2] = 0
    pyprune.sparsify(model, measure=False)
    for method in (pat("pca"), pat("identity"), loraprune(), pyprune.AST()):
        with pytest.raises(ValueError, match=r"SparseLinear.*model\.dequantize\(\)"):
            method.prepare(model, calibration())


def test_sft_trainer_of_trl(tmp_path: Path, tiny_llama: Path, tokenizer: Any, prose: str) -> None:
    """TRL as it comes: chunked loss behind a patched forward, bf16 autocast, gradient checkpointing, padded rows and
    an evaluation. The export is the trained model and loads as a stock one."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    rows = Dataset.from_list([{"text": text[: 40 + 3 * i]} for i, text in enumerate(prose.split("\n\n"))])
    method = PAT(ratio=0.5, round_to=8, rank=4, lora_rank=3)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = method.prepare(model, [torch.tensor([tokenizer(text)["input_ids"][:32]]) for text in rows[:4]["text"]])
    options = trl.SFTConfig(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, eval_strategy="steps",
        eval_steps=1, max_length=64, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    assert options.bf16 and options.gradient_checkpointing
    trainer = trl.SFTTrainer(
        model=model, args=options, train_dataset=rows, eval_dataset=rows.select(range(4)),
        processing_class=tokenizer, callbacks=[method.callback()],
    )  # fmt: skip
    trainer.train()
    evaluated = logged(trainer, "eval_loss")
    assert evaluated[-1] < evaluated[0]
    ids = torch.tensor([tokenizer(prose)["input_ids"][:40]])
    with torch.no_grad():
        trained = unwrap(model).eval()(ids).logits  # below the autocast that the Trainer wraps around the PeftModel
        method.finalize(model).save_pretrained(tmp_path / "small")
        tokenizer.save_pretrained(tmp_path / "small")
        small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        assert type(small) is LlamaForCausalLM and small.config.hidden_size == 16 and describe(small).tied
        torch.testing.assert_close(small.eval()(ids).logits, trained, **FP32)
    assert AutoTokenizer.from_pretrained(tmp_path / "small")(prose)["input_ids"][:40] == ids[0].tolist()
