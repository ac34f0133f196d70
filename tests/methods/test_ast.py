"""AST on small random decoders: the formulas, masks that hold for a step, resume, every option, bad input."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from surgery.tiny_decoders import tiny, token_ids
from torch import nn
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pyprune import AST, LoRA, checkpoint, sparsify
from pyprune.data import TokenWindows
from pyprune.masked import MaskedLinear, MaskRule
from pyprune.optim import MaskedAdamW
from pyprune.reference.bits import pack_bits, unpack_bits
from pyprune.training import DivergedError, InterruptedTraining, latest_checkpoint, read_metrics, tune

STEPS = 12


def ast(**options: Any) -> AST:
    return AST(**{"refresh": 3, "decay": 1e-2} | options)


def windows() -> TokenWindows:
    ids = torch.randint(3, 61, (32, 12), generator=torch.Generator().manual_seed(3))
    return TokenWindows(ids, ids.clone())


def calibration() -> list[torch.Tensor]:
    return list(windows().ids[:8].split(4))


def llama(dtype: torch.dtype = torch.float32) -> Any:
    """Two blocks whose widths 16 and 24 suit every option."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype)


def train(method: AST, model: nn.Module, folder: Path, steps: int = STEPS, **options: Any) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    options = {"learning_rate": 1e-2, "batch_size": 4, "save_every": 6, "callbacks": method.callbacks()} | options
    tune(model, windows(), folder, steps=steps, optimizer=method.optimizer, metrics=folder / "metrics.jsonl", **options)
    return read_metrics(folder / "metrics.jsonl")


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)}


def is_n_of_m(weight: torch.Tensor, n: int = 2, m: int = 4) -> bool:
    return bool(((weight != 0).unflatten(1, (-1, m)).sum(-1) <= n).all())


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(token_ids()).logits


# ---- the layer


def test_a_masked_linear_is_a_linear_with_a_masked_weight_and_a_dense_gradient() -> None:
    torch.manual_seed(1)
    linear = nn.Linear(16, 12).double()
    layer = MaskedLinear(linear.weight, linear.bias, MaskRule(2, 4))
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(3, 5, 12, dtype=torch.float64)
    keep = linear.weight.abs().unflatten(1, (-1, 4)).argsort(-1).argsort(-1).flatten(1) >= 2  # the two largest of four
    dense = (linear.weight * keep).detach().requires_grad_()
    expected = F.linear(x, dense, linear.bias)
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)
    found = torch.autograd.grad((y * direction).sum(), (x, linear.weight, linear.bias))
    right = torch.autograd.grad((expected * direction).sum(), (x, dense, linear.bias))
    for ours, theirs in zip(found, right, strict=True):  # the weight's is that of m * W, for all of W
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    assert bool((found[1][~keep] != 0).any())


def test_slorb_is_the_papers_formula() -> None:
    torch.manual_seed(1)
    weight, x = nn.Parameter(torch.randn(12, 16)), torch.randn(5, 16)
    outputs = {}
    for trained in (False, True):
        layer = MaskedLinear(weight, None, MaskRule(2, 4))
        layer.boost(8, trained)
        keep = unpack_bits(layer.mask, 16)
        pruned = weight * ~keep
        s = torch.stack([pruned[:, :8].mean(1), pruned[:, 8:].mean(1)], 1)
        projection = torch.zeros(2, 16)
        projection[0, :8] = projection[1, 8:] = 1
        outputs[trained] = layer(x)
        expected = x @ (weight * keep).T + (x @ projection.T) @ s.T
        torch.testing.assert_close(outputs[trained], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.slorb.matrix(), s @ projection)
        # a row's sum over each block is the dense one
        boosted = weight * keep + layer.slorb.matrix()
        torch.testing.assert_close(boosted.unflatten(1, (2, 8)).sum(-1), weight.unflatten(1, (2, 8)).sum(-1))
        assert sum(p.numel() for p in layer.slorb.parameters()) == 24 + (32 if trained else 0)


def test_a_mask_that_changes_between_forward_and_backward_is_an_error() -> None:
    layer = MaskedLinear(nn.Parameter(torch.randn(8, 8)), None, MaskRule(2, 4))
    loss = layer(torch.randn(2, 8, requires_grad=True)).sum()
    layer.mask.bitwise_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- the optimiser


def test_a_pruned_weight_with_zero_gradient_shrinks_and_a_kept_one_stays() -> None:
    layer = MaskedLinear(nn.Parameter(torch.tensor([[4.0, -3.0, 2.0, -1.0]])), None, MaskRule(2, 4))
    optimizer = MaskedAdamW([layer.weight], [layer], lr=0.01, masked_decay=1e-3)
    sizes = [layer.weight.detach().abs().clone()]
    for _ in range(5):
        layer.weight.grad = torch.zeros(1, 4)
        optimizer.step()
        sizes.append(layer.weight.detach().abs().clone())
    for before, after in itertools.pairwise(sizes):
        assert torch.equal(before[:, :2], after[:, :2])
        assert bool((after[:, 2:] < before[:, 2:]).all())


def test_without_masks_it_is_torchs_adamw() -> None:
    torch.manual_seed(2)
    ours, theirs = (nn.Parameter(torch.randn(7, 9, generator=torch.Generator().manual_seed(0))) for _ in range(2))
    scalar, bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.randn(5))
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = MaskedAdamW([ours, scalar, bias], **options), torch.optim.AdamW([theirs], **options)
    for _ in range(6):
        ours.grad = torch.randn(7, 9)
        theirs.grad = ours.grad.clone()
        scalar.grad, bias.grad = torch.tensor(1.0), torch.ones(5)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # six steps of fp32
    assert scalar.item() < 2.0


def test_bf16_weights_follow_steps_smaller_than_their_precision() -> None:
    """A step of 1e-3 from 1.0 is a quarter of a unit in the last place: rounding to nearest would stand still."""
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = MaskedAdamW([weight], lr=1e-3)
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # mean of 4096 weights, each off by at most 20 roundings of std 2^-9: five standard errors
    assert weight.float().mean().item() == pytest.approx(0.98, abs=5 * 20**0.5 * 2**-9 / 64)


def test_moments_of_bf16_weights_stay_fp32_in_a_checkpoint() -> None:
    weight = nn.Parameter(torch.randn(8, 8).bfloat16())
    optimizer = MaskedAdamW([weight], lr=1e-3)
    weight.grad = torch.randn(8, 8).bfloat16()
    optimizer.step()
    again = MaskedAdamW([weight], lr=1e-3)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name, value in optimizer.state[weight].items():
        other = again.state[weight][name]
        assert type(other) is type(value) and (
            name == "step" or (other.dtype is torch.float32 and torch.equal(other, value))
        )


# ---- training


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl_weight": 0.0},
        {"mask": "fixed"},
        {"mask": "gradual", "milestone": 0.5},
        {"decay_shape": "static"},
        {"criterion": "wanda"},
        {"transposable": True},
        {"pattern": "1:4"},
    ],
    ids=str,
)
def test_the_result_is_the_trained_model_and_n_of_m(options: dict[str, Any], tmp_path: Path) -> None:
    method, model = ast(**options), llama()
    model = method.prepare(model, calibration())
    before = logits(model)
    train(method, model, tmp_path)
    trained = logits(model)
    assert not torch.allclose(trained, before, atol=0.1)
    final = method.finalize(model)
    assert torch.equal(logits(final), trained)
    assert not masked_layers(final) and not any(p is None for p in final.parameters())
    for name, module in final.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            n, m = map(int, options.get("pattern", "2:4").split(":"))
            assert is_n_of_m(module.weight, n, m), name
            assert not options.get("transposable") or is_n_of_m(module.weight.T), name
    final.save_pretrained(tmp_path / "final")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "final")), trained)


def test_masks_follow_the_weights_every_few_steps_and_are_logged(tmp_path: Path) -> None:
    method, model = ast(), llama()
    model = method.prepare(model)
    firsts = {name: layer.mask.clone() for name, layer in masked_layers(model).items()}
    seen: list[dict[str, torch.Tensor]] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append({name: layer.mask.clone() for name, layer in masked_layers(model).items()})

    metrics = train(method, model, tmp_path, callbacks=[*method.callbacks(), Watch()])
    total = sum(layer.weight.numel() for layer in masked_layers(model).values())

    def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
        return sum(int((unpack_bits(one[name] ^ other[name], 8 * one[name].shape[1])).sum()) for name in one) / total

    for step in range(1, STEPS):
        line = metrics[step]  # of optimiser step step + 1, which begins at `step`
        assert ("flip_rate" in line) is (step % 3 == 0)
        if step % 3:
            assert differing(seen[step], seen[step - 1]) == 0
        else:
            assert line["flip_rate"] == pytest.approx(differing(seen[step], seen[step - 1])) and line["flip_rate"] > 0
            assert line["mask_distance"] == pytest.approx(differing(seen[step], firsts))
    for layer in masked_layers(model).values():
        assert torch.equal(layer.first_mask, firsts[next(n for n, m in masked_layers(model).items() if m is layer)])


@pytest.mark.parametrize(("shape", "expected"), [("annealed", [0, 1 / 3, 2 / 3, 1, 1]), ("static", [1, 1, 1, 1, 1])])
def test_the_decay_is_annealed(shape: str, expected: list[float], tmp_path: Path) -> None:
    method = ast(decay_shape=shape, milestone=0.25)
    metrics = train(method, method.prepare(llama()), tmp_path)
    assert [line["masked_decay"] for line in metrics[:5]] == pytest.approx([1e-2 * share for share in expected])


def test_a_gradual_mask_only_grows_and_reaches_the_pattern(tmp_path: Path) -> None:
    method, model = ast(mask="gradual", milestone=0.5, refresh=1), llama()
    model = method.prepare(model)
    torch.testing.assert_close(logits(model), logits(llama()))
    kept: list[torch.Tensor] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kept.append(
                torch.cat([unpack_bits(m.mask, m.in_features).flatten() for m in masked_layers(model).values()])
            )

    metrics = train(method, model, tmp_path, callbacks=[*method.callbacks(), Watch()])
    shares = [round(mask.float().mean().item(), 2) for mask in kept]
    assert [line["mask_distance"] for line in metrics[1:]] == pytest.approx([1 - share for share in shares[1:]])
    assert shares[0] == 1 and 0.75 in shares and shares[6:] == [0.5] * 6  # Zhu & Gupta's cubic ramp, in steps of 1/4
    assert all(bool((later <= earlier).all()) for earlier, later in itertools.pairwise(kept))


def test_accumulation_and_checkpointing_change_nothing(tmp_path: Path) -> None:
    """The same step from one pass over eight windows, and from four over two with activations recomputed."""
    results = []
    for options in (
        {"batch_size": 8},
        {"batch_size": 2, "gradient_accumulation_steps": 4, "gradient_checkpointing": True},
    ):
        method = ast(refresh=1)
        model = method.prepare(llama(torch.float32))
        metrics = train(method, model, tmp_path / str(len(results)), steps=4, **options)
        results.append(([line["loss"] for line in metrics], [line["ce"] for line in metrics], metrics[-1]["kl"]))
    for one, other in zip(*results, strict=True):
        assert one == pytest.approx(other, rel=1e-4)  # sums of the same numbers in another order, four steps of Adam


@pytest.mark.parametrize("options", [{}, {"slorb": 8, "slorb_trained": True}, {"mask": "gradual", "milestone": 0.5}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_moments_and_schedule_survive_a_resume_bit_for_bit(
    dtype: torch.dtype, options: dict[str, Any], tmp_path: Path
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 7:  # between two refreshes
                control.should_save = control.should_training_stop = True

    def run(folder: Path, *more: TrainerCallback) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        method = ast(**options)
        model = method.prepare(llama(dtype), resume=latest_checkpoint(folder))
        metrics = train(method, model, folder, callbacks=[*method.callbacks(), *more])
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}, metrics

    expected, lines = run(tmp_path / "unbroken")
    with pytest.raises(InterruptedTraining, match="step 7 of 12"):
        run(tmp_path / "broken", Stop())
    found, again = run(tmp_path / "broken")
    assert found.keys() == expected.keys() and any(name.endswith("first_mask") for name in found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert [line | {"seconds": 0} for line in again] == [line | {"seconds": 0} for line in lines]


def test_in_a_plain_trainer_with_bf16_autocast(tmp_path: Path) -> None:
    method = ast()
    model = method.prepare(llama())
    args = TrainingArguments(
        str(tmp_path), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2, bf16=True, use_cpu=True,
        logging_steps=1, report_to="none", save_strategy="no", remove_unused_columns=False, weight_decay=0.1,
    )  # fmt: skip
    trainer = Trainer(
        model,
        args,
        train_dataset=windows(),
        callbacks=method.callbacks(),
        optimizer_cls_and_kwargs=method.optimizer(args),
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    assert next(method._tuning.distillation.teacher.parameters()).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters())
    held_out = trainer.evaluate(windows())["eval_loss"]  # the stock loss, not the mixture
    model.eval()
    with torch.no_grad():
        found = model(windows().ids, labels=windows().ids).loss.item()
    assert held_out == pytest.approx(found, rel=1e-2)
    assert is_n_of_m(method.finalize(model).model.layers[1].mlp.down_proj.weight)


@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.1}, {}], ids=["smoothing", "loss function"])
def test_a_trainer_with_a_loss_of_its_own_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    """It never asks the model for its loss, so it would train without the teacher and not say so."""
    method = ast()
    model = method.prepare(llama())
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, **options)
    own = None if options else lambda outputs, labels, num_items_in_batch=None: outputs.logits.logsumexp(-1).sum()
    trainer = Trainer(
        model, arguments, train_dataset=windows(), callbacks=method.callbacks(), compute_loss_func=own,
        optimizer_cls_and_kwargs=method.optimizer(arguments),
    )  # fmt: skip
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"kl_weight is 0.67, but this Trainer did not take its loss from the model"):
        trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_hidden_states_of_a_pass_without_a_loss_are_forgotten() -> None:
    """Else the next evaluation would be told the loss of that pass."""
    method = ast()
    model = method.prepare(llama())
    ids = windows().ids[:4]
    model.eval()
    with torch.no_grad():
        right = model(ids, labels=ids).loss
        model.train()
        model.loss_function, own = (lambda **kwargs: None), model.loss_function
        model(ids, labels=ids)
        model.loss_function = own
        assert torch.equal(model.eval()(ids, labels=ids).loss, right)


def test_gpt2_whose_weights_lie_the_other_way_round(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=16, n_inner=24))
    method = ast()
    model = method.prepare(model)
    train(method, model, tmp_path)
    trained = logits(model)
    packed = copy.deepcopy(model)
    sparsify(packed, measure=False)
    checkpoint.save_dense(packed, None, tmp_path / "dense")
    stock = GPT2LMHeadModel.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(stock), trained, rtol=1e-5, atol=1e-5)  # products of the other layout
    final = method.finalize(model)
    torch.testing.assert_close(logits(final), trained, rtol=1e-5, atol=1e-5)
    assert type(final.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
    assert is_n_of_m(final.transformer.h[0].mlp.c_fc.weight.T)


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pattern": "3:5"},
            r"q_proj has 16 inputs and 16 outputs; the pattern 3:5 needs the inputs to be a multiple of 5",
        ),
        ({"slorb": 7}, "slorb is 7; expected a divisor of the 16 inputs of .*q_proj"),
        ({"criterion": "wanda"}, "calibration: the criterion wanda needs token ids"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(options: dict[str, Any], message: str) -> None:
    model = llama()
    before = dict(model.named_modules()), model.loss_function
    with pytest.raises(ValueError, match=message):
        ast(**options).prepare(model)
    assert (dict(model.named_modules()), model.loss_function) == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_fp16_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"q_proj is torch.float16, too coarse to be trained; load it in bfloat16"):
        ast().prepare(llama().half())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "4:2"}, "4:2"),
        ({"pattern": "half"}, "half"),
        ({"pattern": "row"}, "pattern is 'row'; expected N:M"),
        ({"pattern": "1:4", "transposable": True}, "transposable masks are 2:4"),
        ({"mask": "soft"}, "mask is 'soft'"),
        ({"refresh": 0}, "refresh is 0"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"mask": "gradual", "slorb": 8}, "gradual"),
        ({"slorb_trained": True}, "there is no SLoRB to train"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ast(**options)


@pytest.mark.parametrize(
    ("options", "steps", "left"),
    [
        ({"refresh": 10}, 10, "step 0, 4 of every 4, not 2:4"),  # the masks of step 10 would be the first
        ({"pattern": "1:8", "refresh": 5, "milestone": 1.0}, 10, "step 5, 2 of every 8, not 1:8"),  # 1 + 7 / 2^3
    ],
)
def test_a_gradual_mask_that_would_never_be_final_is_refused(
    options: dict[str, Any], steps: int, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step, by the callback too. One step more is enough; without the check training is in vain."""
    method = ast(mask="gradual", **options)
    model = method.prepare(llama())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"in steps={steps} the last masks are those of {left}; train more steps"):
        method.check_steps(steps)
    with pytest.raises(ValueError, match="train more steps, or lower refresh or milestone"):
        train(method, model, tmp_path / "refused", steps)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    train(method, model, tmp_path / "enough", steps + 1)
    method.finalize(model)
    monkeypatch.setattr(AST, "check_steps", lambda self, steps: None)
    model = method.prepare(llama())
    train(method, model, tmp_path / "in vain", steps)
    with pytest.raises(RuntimeError, match=r"not .* yet"):
        method.finalize(model)


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    tiny("llama", dtype=torch.float32).save_pretrained(tmp_path / "same")
    small = llama()
    small.resize_token_embeddings(32)
    small.save_pretrained(tmp_path / "other")
    ast(teacher=str(tmp_path / "same")).prepare(llama())  # another width is fine
    with pytest.raises(ValueError, match="vocabulary has 32 tokens, the student's 61"):
        ast(teacher=str(tmp_path / "other")).prepare(llama())
    with pytest.raises(ValueError, match="vocabulary has 32 tokens, the student's 61"):  # before a baseline is trained
        ast(teacher=str(tmp_path / "other")).check(llama().to("meta"))


def test_a_checkpoint_with_masks_of_another_pattern_is_refused(tmp_path: Path) -> None:
    method = ast()
    train(method, method.prepare(llama()), tmp_path, steps=2)
    checkpoint = latest_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-2: .*\.mask is not 1:4"):
        ast(pattern="1:4").prepare(llama(), resume=checkpoint)
    (tmp_path / "checkpoint-9").mkdir()
    with pytest.raises(ValueError, match=r"checkpoint-9 has no trained.safetensors.*leave resume out"):
        ast().prepare(llama(), resume=tmp_path / "checkpoint-9")


def test_another_optimizer_and_fp16_are_refused(tmp_path: Path) -> None:
    method = ast()
    with pytest.raises(ValueError, match=r"optimizer_cls_and_kwargs=ast\.optimizer"):
        tune(method.prepare(llama()), windows(), tmp_path, steps=2, callbacks=method.callbacks())


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                kwargs["model"].model.norm.weight.data.fill_(math.nan)

    method = ast()
    model = method.prepare(llama())
    with pytest.raises(DivergedError, match=r"loss is nan at step 6 .*checkpoint-4"):
        train(method, model, tmp_path, callbacks=[*method.callbacks(), Poison()], save_every=2)


def test_masks_of_one_bit() -> None:
    rule = MaskRule(2, 4)
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 3.0, 2.0, 1.0]])  # ties keep the lower index
    bits, flips = rule.mask(scores, pack_bits(torch.tensor([[True, False, True, False] * 2])))
    assert bits.tolist() == [[0b01100011]] and int(flips) == 4


# ---- what is written


def test_slorb_is_packed_beside_its_linear_and_comes_back(tmp_path: Path) -> None:
    method, model = ast(slorb=8), llama()
    model = method.prepare(model)
    train(method, model, tmp_path)
    trained = logits(model)
    final = method.finalize(model)
    packed = final.model.layers[0].mlp.up_proj
    assert packed.pattern == (2, 4) and packed.slorb is not None and not masked_layers(final)
    torch.testing.assert_close(logits(final), trained, rtol=1e-5, atol=1e-5)  # the same products, summed otherwise
    checkpoint.save(final, None, tmp_path / "packed")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again), logits(final))
    checkpoint.save_dense(final, None, tmp_path / "dense")
    dense = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(dense.model.layers[0].mlp.up_proj) is nn.Linear
    torch.testing.assert_close(logits(dense), trained, rtol=1e-4, atol=1e-4)


def test_lora_is_trained_on_a_packed_result(tmp_path: Path) -> None:
    method = ast()
    model = method.prepare(llama())
    train(method, model, tmp_path / "ast")
    checkpoint.save(method.finalize(model), None, tmp_path / "packed")
    lora = LoRA(lora_rank=2, lora_dropout=0.0)
    adapted = lora.prepare(LlamaForCausalLM.from_pretrained(tmp_path / "packed"))
    before = logits(adapted)
    tune(adapted, windows(), tmp_path / "lora", steps=4, batch_size=4, learning_rate=1e-1, save_every=4)
    assert not torch.allclose(logits(adapted), before, atol=0.01)
    packed = adapted.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert packed.pattern == (2, 4) and not packed.values.requires_grad
    trained = logits(adapted)
    folded = lora.finalize(adapted)  # unpacked first, since zeros and an update do not go together
    assert type(folded.model.layers[0].mlp.up_proj) is nn.Linear
    torch.testing.assert_close(logits(folded), trained, rtol=1e-4, atol=1e-4)  # merged: other sums
    folded.save_pretrained(tmp_path / "folded")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "folded")), logits(folded))
