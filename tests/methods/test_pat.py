"""PAT on small random decoders: exactness of every transition, the mask's schedule, resume, bad input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.reads import Reads
from surgery.tiny_decoders import WIDTH, tiny, token_ids
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from pyprune import PAT
from pyprune.architectures import describe, unwrap
from pyprune.basis import level
from pyprune.data import TokenWindows
from pyprune.methods.pat import kept_channels
from pyprune.modules import LearnedSubspace, UnifiedMask, offset, temperature
from pyprune.training import InterruptedTraining, read_metrics, tune

KEPT = 16
BASES = ("identity", "pca", "learned")
# fp32 through two blocks, folded and refolded; measured below 2e-6 of the largest logit, 50 times less
FP32 = {"rtol": 1e-4, "atol": 1e-4}


def pat(basis: str = "learned", **options: Any) -> PAT:
    return PAT(
        **{"ratio": 1 / 3, "round_to": 8, "basis": basis, "rank": 4, "lora_rank": 3, "lora_dropout": 0.0} | options
    )


def windows() -> TokenWindows:
    ids = torch.randint(3, 61, (32, 12), generator=torch.Generator().manual_seed(3))
    return TokenWindows(ids, ids.clone())


def calibration() -> list[torch.Tensor]:
    return list(windows().ids[:8].split(4))


def train(method: PAT, model: nn.Module, folder: Path, steps: int = 12, **options: Any) -> list[dict[str, Any]]:
    options = {"learning_rate": 1e-2, "batch_size": 4} | options
    tune(
        model, windows(), folder, steps=steps, callbacks=method.callbacks(), metrics=folder / "metrics.jsonl", **options
    )
    return read_metrics(folder / "metrics.jsonl")


def prepared(method: PAT, family: str = "llama", tied: bool = False, **options: Any) -> nn.Module:
    return method.prepare(tiny(family, tied, torch.float32), calibration(), **options)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(token_ids()).logits


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("tied", [False, True])
def test_preparing_does_not_change_the_function(basis: str, tied: bool) -> None:
    """But for the final norm's gains, which are levelled where a tied head is to stay tied in a rotated basis."""
    for untie in (False, True):
        dense = tiny("llama", tied, torch.float32)
        if basis != "identity" and not untie:
            level(dense)
        model = prepared(pat(basis, untie=untie), tied=tied)
        torch.testing.assert_close(logits(model), logits(dense), **FP32)
        assert describe(model).tied is (tied and not (untie and basis != "identity"))


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "phi3"])
def test_compact_training_is_masked_training(basis: str, family: str, tmp_path: Path) -> None:
    """The same losses after the milestone, to fp32 rounding that eight steps of Adam amplify, and the same model."""
    runs = {}
    for compact in (True, False):
        method = pat(basis, compact=compact)
        model = prepared(method, family, tied=family == "gemma")
        metrics = train(method, model, tmp_path / str(compact))
        trained = logits(model)
        final = method.finalize(model)
        # the exported model is the trained one
        torch.testing.assert_close(logits(final), trained, **FP32)
        assert final.config.hidden_size == KEPT and not hasattr(final, "pat")
        assert describe(final).tied is (family == "gemma")
        runs[compact] = (metrics, trained)
    losses = [[line["loss"] for line in metrics] for metrics, _ in runs.values()]
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)
    torch.testing.assert_close(runs[True][1], runs[False][1], rtol=1e-2, atol=1e-2)
    assert losses[0][-1] != losses[0][0]


def test_compacting_shrinks_what_is_trained(tmp_path: Path) -> None:
    method = pat("pca")
    model = prepared(method)
    train(method, model, tmp_path)
    assert describe(model).hidden_size == KEPT
    assert describe(model).blocks[0].reads[0].linears[0].lora_A["default"].weight.shape == (3, KEPT)


def test_dora(tmp_path: Path) -> None:
    method = pat("pca", dora=True)
    model = prepared(method)
    train(method, model, tmp_path)
    torch.testing.assert_close(logits(model), logits(method.finalize(model)), **FP32)


@pytest.mark.parametrize("basis", BASES)
def test_a_tied_head_stays_tied_unless_the_embedding_has_an_hsm(basis: str, tmp_path: Path) -> None:
    for embedding_hsm in (False, True):
        method = pat(basis, embedding_hsm=embedding_hsm)
        model = prepared(method, tied=True)
        train(method, model, tmp_path / str(embedding_hsm))
        trained = logits(model)
        final = method.finalize(model)
        assert describe(final).tied is not embedding_hsm
        torch.testing.assert_close(logits(final), trained, **FP32)


def test_schedule_of_the_mask_is_the_papers() -> None:
    assert temperature(0, 10) == 0 and offset(0, 10) == 0.5
    assert temperature(5, 10) == pytest.approx(1 / (1 - math.log(5) / math.log(10)))
    assert offset(2, 10) == pytest.approx(0.3) and offset(7, 10) == 0
    mask = UnifiedMask(6, 3, 0.1)
    mask.begin(0, 10)
    assert mask.value.tolist() == [1.0] * 6
    mask.proxy = torch.tensor([0.5, -0.5, 0.0, 1.0, -1.0, 2.0])
    mask.begin(4, 10)
    tau = 1 / (1 - math.log(4) / math.log(10))
    expected = [1 / (1 + math.exp(-tau * w)) + 0.1 for w in mask.proxy.tolist()]
    assert mask.value.tolist() == pytest.approx(expected, rel=1e-6)


def test_soft_count_is_on_target_before_the_milestone(tmp_path: Path) -> None:
    method = pat("pca", milestone=0.5)
    metrics = train(method, prepared(method), tmp_path, steps=24)
    counts = [(line["mask_count"], line["mask_target"]) for line in metrics if "mask_count" in line]
    assert len(counts) >= 12 and all(count == target for count, target in counts)
    assert counts[0][0] < WIDTH and counts[10][0] == KEPT  # 0.8 of the way to step 12


def test_proxies_follow_the_gradient() -> None:
    """The channels whose mask the task wants to fall go, whatever the tie-break says."""
    mask = UnifiedMask(8, 5, 0.05)
    unwanted = torch.tensor([1.0, 0, 0, 1.0, 0, 0, 1.0, 0])
    for step in range(20):
        mask.begin(step, 20)
        (mask.value * (unwanted - 0.5)).sum().backward()
        mask.learn(step, 20)
    assert mask.freeze()[1].tolist() == [1, 2, 4, 5, 7]


def test_a_step_of_the_proxies_reads_one_number() -> None:
    """Adam's own count of steps, besides the figures, which come together."""
    mask = UnifiedMask(8, 5, 0.05)
    for step in range(20):
        mask.begin(step, 20)
        (mask.value * torch.arange(8)).sum().backward()
        with Reads() as reads:
            mask.learn(step, 20)
        assert reads.count == 1


@pytest.mark.parametrize("number", [math.nan, 0.5])
def test_proxies_that_choose_nothing_are_refused(number: float) -> None:
    mask = UnifiedMask(8, 5, 0.1)
    mask.proxy.fill_(number)
    with pytest.raises(RuntimeError, match=r"keeps [08] channels .*, not 5, .* its proxies are not finite, or equal"):
        mask.freeze()


def test_learned_subspace_finds_the_directions_to_drop() -> None:
    """Dropping U from random rows costs least when U spans their directions of least variance, which are no axes."""
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    scale = torch.tensor([4.0, 4, 4, 4, 4, 4, 0.1, 0.1])
    subspace = LearnedSubspace(8, 6, 0.1)
    for step in range(100):
        subspace.begin(step, 100)
        x = torch.randn(64, 8, generator=generator) * scale @ q.T
        (x - subspace(x, None)).square().mean().backward()
        subspace.learn(step, 100)
    cosines = torch.linalg.svdvals(q[:, 6:].T @ subspace.value.detach())
    assert cosines.min() > 0.99
    rotation, kept = subspace.freeze()
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(8, dtype=torch.float64))
    projected = x.double() @ rotation
    projected[:, 6:] = 0
    subspace.mask = 0.0
    torch.testing.assert_close(projected @ rotation.T, subspace(x, None).detach().double(), rtol=1e-5, atol=1e-5)
    assert kept.tolist() == list(range(6))


def test_learned_subspace_keeps_to_its_groups() -> None:
    """The directions of least variance again, but each within its group of channels: others cannot be folded in where
    a head is tied. The rotation then commutes with anything that is constant in a group."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])  # dropped at first are channels 6 and 7, one of each
    variances, axes = torch.tensor([4.0, 4, 4, 0.1]), torch.zeros(8, 8)
    for group in range(2):
        own = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
        axes[groups == group, 4 * group : 4 * group + 4] = own
    subspace = LearnedSubspace(8, 6, 0.1, groups)
    for step in range(100):
        subspace.begin(step, 100)
        mixed = torch.randn(64, 8, generator=generator) * variances.repeat(2)
        # what the groups have in common pulls U across their border
        x = (mixed + 0.05 * mixed.roll(4, 1)) @ axes.T
        (x - subspace(x, None)).square().mean().backward()
        subspace.learn(step, 100)
    value = subspace.value.detach()
    assert (value[groups[:, None] != groups[6:]] == 0).all()
    assert (axes[:, [3, 7]].T @ value).diagonal().abs().min() > 0.99
    rotation, _ = subspace.freeze()
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(8, dtype=torch.float64))
    gain = torch.tensor([2.0, -3.0], dtype=torch.float64)[groups]
    carried = gain @ rotation.square()
    torch.testing.assert_close(gain[:, None] * rotation, rotation * carried)
    torch.testing.assert_close(rotation[:, 6:] @ rotation[:, 6:].T, (value @ value.T).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("compact", [True, False])
def test_folding_the_learned_basis_keeps_the_function(compact: bool, tied: bool) -> None:
    """The rotation goes into weights, adapters and HSMs; the model whose mask is closed stays the same."""
    method = pat("learned", compact=compact)
    model = prepared(method, tied=tied)
    tuning = method._tuning
    assert tuning is not None
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".v") or "lora_B" in name:
                parameter.normal_(0, 0.2, generator=generator)
        subspace = tuning.selection
        wild = torch.randn(WIDTH, WIDTH - KEPT, generator=generator)
        subspace.value = torch.linalg.qr(wild * (subspace.groups[:, None] == subspace.groups[KEPT:])).Q
    tuning.selection.mask = 0.0
    before = logits(model)
    tuning.freeze(None)
    torch.testing.assert_close(logits(model), before, **FP32)
    assert describe(model).tied is tied


@pytest.mark.parametrize("compact", [True, False])
def test_moments_follow_the_learned_basis(compact: bool) -> None:
    """After the milestone Adam's first moment is the gradient's mean in the new basis, and its second moment mixes the
    squares as if the old entries were uncorrelated; in the compact shapes too, for adapters and HSMs."""
    method = pat("learned", compact=compact)
    model = prepared(method).eval()
    tuning = method._tuning
    assert tuning is not None
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".v") or "lora_B" in name:
                parameter.normal_(0, 0.2, generator=generator)
        subspace = tuning.selection
        wild = torch.randn(WIDTH, WIDTH - KEPT, generator=generator)
        subspace.value = torch.linalg.qr(wild * (subspace.groups[:, None] == subspace.groups[KEPT:])).Q
    tuning.selection.mask = 0.0
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.0, betas=(0.9, 0.99))

    def gradients() -> dict[str, torch.Tensor]:
        optimizer.zero_grad()
        model(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in trained.items()}

    before = gradients()
    optimizer.step()
    tuning.freeze(optimizer)
    rotation, largest = tuning.structure["rotation"], {name: g.abs().max() for name, g in before.items()}
    for name, gradient in gradients().items():
        moment = optimizer.state[trained[name]]["exp_avg"] / 0.1
        torch.testing.assert_close(moment, gradient, rtol=1e-4, atol=1e-4 * largest[name].item(), msg=name)
    name, l0 = next((name, parameter) for name, parameter in trained.items() if name.endswith("l0"))
    old = before[name].double().square()
    second = optimizer.state[l0]["exp_avg_sq"].double() / 0.01
    torch.testing.assert_close(second, old @ rotation.square(), rtol=1e-4, atol=1e-12)


def test_identity_loss_reaches_every_hsm(tmp_path: Path) -> None:
    method = pat("pca", identity_weight=5.0)
    prepared(method)
    hsms = method._tuning.hsms  # type: ignore[union-attr]
    assert len(hsms) == 5
    with torch.no_grad():
        for hsm in hsms.values():
            hsm.l0.mul_(1.5)
    total = method._tuning.identity_gradients()  # type: ignore[union-attr]
    # L0 L0^T = 2.25 I of rank 4, L1 orthonormal: 1.25 sqrt(4) each, mean over the modules, times the weight
    assert total == pytest.approx(5 * 1.25 * 2, rel=1e-4)
    assert all(hsm.l0.grad.abs().max() > 1e-3 for hsm in hsms.values())


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("stop", [2, 7])
def test_resumed_run_is_the_unbroken_run(basis: str, stop: int, tmp_path: Path) -> None:
    """Bit for bit, stopped before (2) and after (7) the milestone (4), with a tied head."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == stop:
                control.should_save = control.should_training_stop = True

    method = pat(basis, lora_dropout=0.1)
    whole = prepared(method, tied=True)
    train(method, whole, tmp_path / "whole")
    method = pat(basis, lora_dropout=0.1)
    broken = prepared(method, tied=True)
    with pytest.raises(InterruptedTraining):
        tune(
            broken, windows(), tmp_path / "parts", steps=12, learning_rate=1e-2,
            callbacks=[*method.callbacks(), Stop()],
        )  # fmt: skip
    method = pat(basis, lora_dropout=0.1)
    resumed = prepared(method, tied=True, resume=tmp_path / "parts" / f"checkpoint-{stop}")
    train(method, resumed, tmp_path / "parts")
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    losses = []
    for checkpointing in (False, True):
        method = pat()
        metrics = train(method, prepared(method), tmp_path / str(checkpointing), gradient_checkpointing=checkpointing)
        losses.append([line["loss"] for line in metrics])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_accumulated_passes_are_one_batch(tmp_path: Path) -> None:
    """The mask and the identity loss take one step an optimiser step, from the mean gradient."""
    losses = []
    for batch_size, passes in ((4, 1), (2, 2)):
        method = pat("pca", ratio=1 / 3)
        metrics = train(
            method, prepared(method), tmp_path / str(passes), steps=6, batch_size=batch_size,
            gradient_accumulation_steps=passes,
        )  # fmt: skip
        losses.append([line["loss"] for line in metrics])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_plain_trainer(tmp_path: Path) -> None:
    """The three lines of the README, without our training loop."""
    method = pat()
    model = prepared(method)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, report_to="none", save_strategy="no", use_cpu=True
    )
    Trainer(model=model, args=arguments, train_dataset=windows(), callbacks=[method.callback()]).train()
    trained = logits(model)
    torch.testing.assert_close(logits(method.finalize(model)), trained, **FP32)


def test_bf16(tmp_path: Path) -> None:
    """bf16 weights: the export differs from the trained model by rounding of merged weights, 2^-8 a weight."""
    method = pat()
    model = method.prepare(tiny("llama", False, torch.bfloat16), calibration())
    train(method, model, tmp_path)
    trained = logits(model).float()
    final = method.finalize(model)
    assert next(final.parameters()).dtype == torch.bfloat16
    error = (logits(final).float() - trained).norm() / trained.norm()
    assert error < 0.05


def test_kept_channels_fit_what_stock_code_accepts() -> None:
    """Llama's config refuses a hidden size that is no multiple of its 4 heads; Qwen2's does not."""
    assert kept_channels(describe(tiny("qwen2")), 1 / 3, 3) == 15  # of 24, nearest to 16
    assert kept_channels(describe(tiny("llama")), 1 / 3, 3) == 12


@pytest.mark.parametrize(
    ("hidden", "heads", "rounding", "kept"),
    [(576, 9, 8, 432), (960, 15, 8, 720), (2048, 32, 64, 1536), (4096, 32, 64, 3072), (24, 4, 1, 16)],
    ids=["SmolLM2-135M", "SmolLM2-360M", "Llama-1B", "Llama-7B", "tiny"],
)
def test_default_rounding_leaves_a_choice(hidden: int, heads: int, rounding: int, kept: int) -> None:
    """64 and 9 heads would leave SmolLM2-135M no size but its own."""
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": 8, "vocab_size": 8}
    config = LlamaConfig(**sizes, num_hidden_layers=1)
    with torch.device("meta"):
        decoder = describe(LlamaForCausalLM(config))
    assert decoder.rounding == rounding
    assert kept_channels(decoder, 0.25, None) == kept


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ratio is 1\.2"):
        pat(ratio=1.2)
    with pytest.raises(ValueError, match="rounds to 24 kept channels"):
        kept_channels(describe(tiny("qwen2")), 0.1, 8)
    with pytest.raises(ValueError, match="rounds to 0 kept channels"):
        kept_channels(describe(tiny("qwen2")), 0.9, 8)
    with pytest.raises(ValueError, match="basis is 'svd'"):
        pat("svd")
    with pytest.raises(ValueError, match="rank is 0"):
        pat(rank=0)
    with pytest.raises(ValueError, match="rank is 25; expected at most the hidden size, 24"):
        prepared(pat(rank=25))
    with pytest.raises(ValueError, match="calibration"):
        pat("pca").prepare(tiny("llama", False, torch.float32))
    with pytest.raises(ValueError, match="DoRA"):
        pat("learned", dora=True)
    with pytest.raises(RuntimeError, match="call prepare"):
        pat().callback()
    with pytest.raises(RuntimeError, match="keeps 8 channels at the milestone, not 5"):
        UnifiedMask(8, 5, 0.1).freeze()
    with pytest.raises(ValueError, match=r"milestone 0.333333 of steps=1 is step 1, which leaves none behind it"):
        pat().check_steps(1)
    assert pat(milestone=0.9).check_steps(20) == 18
    method = pat()
    model = prepared(method)
    with pytest.raises(RuntimeError, match=r"training had no callbacks=\[pat.callback\(\)\], so no channel was chosen"):
        method.finalize(model)
    method.callback().on_train_begin(TrainingArguments(use_cpu=True), TrainerState(max_steps=9), TrainerControl())
    with pytest.raises(RuntimeError, match="has not reached the milestone"):
        method.finalize(model)
    assert hasattr(unwrap(model), "pat")
