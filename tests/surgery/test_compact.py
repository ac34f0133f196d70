"""Early compaction: training goes on in compact shapes with the losses, gradients and final model of the masked one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_decoders import FAMILY_NAMES, KEEP, WIDTH, compute_norms_in_fp64, logits, relative_error, tiny, token_ids
from torch import nn

from pyprune.architectures import describe, weight_of
from pyprune.surgery import Selection, compact, fold_adapters, merge_hsm, settle_config, slice_hidden

ORDER = torch.cat([KEEP, torch.tensor(sorted(set(range(WIDTH)) - set(KEEP.tolist())))])
EXACT = 1e-11  # fp64 rounding through two blocks, forward and backward


def cut_matrix(matrix: torch.Tensor) -> torch.Tensor:
    """Rows of the kept channels, columns in the permuted order."""
    return matrix[KEEP][:, ORDER]


class MaskedHSM(nn.Module):
    """The simplest HSM, y = mask * (D x): behind a writer as a forward hook, full or compact."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        noise = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        self.matrix = nn.Parameter(torch.eye(WIDTH, dtype=torch.float64) + 0.2 * noise)
        self.mask = torch.zeros(WIDTH, dtype=torch.float64)
        self.mask[KEEP] = 1

    def compact(self) -> None:
        """Read the permuted d channels, write the n kept ones."""
        self.matrix.data = cut_matrix(self.matrix.data)
        self.matrix.grad = None
        self.mask = self.mask[KEEP]

    def forward(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return self.mask * (output @ self.matrix.T)


class Mask(nn.Module):
    """What stands behind an embedding without an HSM."""

    def __init__(self) -> None:
        super().__init__()
        self.mask: torch.Tensor | None = torch.zeros(WIDTH, dtype=torch.float64)
        self.mask[KEEP] = 1

    def forward(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output if self.mask is None else self.mask * output


class Training:
    """A tiny decoder with LoRA or DoRA on all linears and HSMs behind its writers."""

    def __init__(self, family: str, tied: bool, dora: bool, embedding_hsm: bool) -> None:
        torch.manual_seed(5)
        stock = tiny(family, tied)
        names = list(describe(stock).linear_names())
        self.model = get_peft_model(stock, LoraConfig(r=3, lora_alpha=4, target_modules=names, use_dora=dora)).double()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    parameter.copy_(0.2 * torch.randn_like(parameter))
                elif "lora_magnitude" in name:
                    parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
        self.decoder = describe(self.model)
        self.hsms = {name: MaskedHSM(i) for i, name in enumerate(self.decoder.writers())}
        if not embedding_hsm:
            del self.hsms["embedding"]
            self.embedding_mask = Mask()
            self.decoder.embedding.register_forward_hook(self.embedding_mask)
        for name, hsm in self.hsms.items():
            self.decoder.writers()[name].register_forward_hook(hsm)

    def compact(self) -> dict[nn.Parameter, Selection]:
        selections = compact(self.model, KEEP, wide=self.hsms)
        for hsm in self.hsms.values():
            hsm.compact()
        if "embedding" not in self.hsms:
            self.embedding_mask.mask = None
        return selections

    def trained(self) -> dict[str, nn.Parameter]:
        adapters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return adapters | {name: hsm.matrix for name, hsm in self.hsms.items()}

    def loss(self) -> torch.Tensor:
        ids = token_ids()
        self.model.zero_grad()
        for hsm in self.hsms.values():
            hsm.matrix.grad = None
        loss = nn.functional.cross_entropy(self.model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        return loss.detach()

    def finish(self) -> nn.Module:
        compacted = self.decoder.hidden_size < WIDTH
        stock = fold_adapters(self.model)
        for module in stock.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module._forward_hooks.clear()
        merge_hsm(describe(stock), {name: hsm.matrix.detach() for name, hsm in self.hsms.items()})
        return settle_config(stock) if compacted else slice_hidden(stock, KEEP)


VARIANTS = [(family, False, False, True) for family in FAMILY_NAMES] + [
    ("llama", True, False, True),
    ("llama", True, False, False),
    ("llama", False, True, True),
    ("gemma", True, True, True),
    ("gemma", True, False, False),
    ("qwen3", True, True, False),
    ("phi3", False, True, True),
]


def variant_name(variant: tuple[str, bool, bool, bool]) -> str:
    family, tied, dora, embedding_hsm = variant
    return "-".join(
        [family, "tied" * tied or "untied", "dora" if dora else "lora", "hsm" if embedding_hsm else "no_hsm"]
    )


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_name)
def test_compact_model_has_the_loss_and_gradients_of_the_masked_one(variant: tuple[str, bool, bool, bool]) -> None:
    masked, compacted = Training(*variant), Training(*variant)
    assert masked.loss() == compacted.loss()
    parameters = compacted.trained()
    selections = compacted.compact()
    assert compacted.decoder.hidden_size == len(KEEP)
    found, expected = compacted.loss(), masked.loss()
    assert abs(found - expected) < EXACT * abs(expected)
    assert all(p is parameters[name] for name, p in compacted.trained().items())
    for name, reference in masked.trained().items():
        parameter = parameters[name]
        gradient = cut_matrix(reference.grad) if name in masked.hsms else reference.grad
        if parameter in selections:
            gradient = selections[parameter](gradient)
        assert parameter.grad.shape == parameter.shape == gradient.shape, name
        assert relative_error(parameter.grad, gradient) < EXACT, name


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_name)
def test_compact_and_masked_training_end_in_the_same_stock_model(variant: tuple[str, bool, bool, bool]) -> None:
    """Three steps after the cut, moments cut alike. With DoRA plain SGD: see `test_dora_...` below."""
    masked, compacted = Training(*variant), Training(*variant)
    optimizers = []
    for training in (masked, compacted):
        parameters = list(training.trained().values())
        optimizers.append(torch.optim.SGD(parameters, 0.05) if variant[2] else torch.optim.AdamW(parameters, 0.01))
    for step in range(5):
        if step == 2:
            selections = compacted.compact()
            for parameter, state in optimizers[1].state.items():
                hsm = any(parameter is h.matrix for h in compacted.hsms.values())
                select = cut_matrix if hsm else selections.get(parameter, lambda tensor: tensor)
                state |= {key: select(value) for key, value in state.items() if value.ndim > 0}
        losses = [training.loss() for training in (masked, compacted)]
        assert abs(losses[1] - losses[0]) < EXACT * losses[0]
        for optimizer in optimizers:
            optimizer.step()
    expected, found = masked.finish(), compacted.finish()
    for model in (expected, found):
        compute_norms_in_fp64(model)
    assert relative_error(logits(found), logits(expected)) < EXACT
    assert found.config.to_dict() == expected.config.to_dict()
    assert {k: v.shape for k, v in found.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}


def test_dora_norms_count_the_dropped_columns() -> None:
    """DoRA's row norms go over all columns: once and twice cut layers have those of the whole one after B has moved."""
    whole, cut, twice = (Training("llama", False, True, True) for _ in range(3))
    compact(cut.model, KEEP[:12])
    compact(twice.model, KEEP)
    compact(twice.model, range(12))
    norms = []
    for training in (whole, cut, twice):
        layer = training.decoder.blocks[0].reads[0].linears[0]
        layer.lora_B["default"].weight.data += 0.5
        dora = layer.lora_magnitude_vector["default"]
        delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        norms.append(dora.get_weight_norm(weight_of(layer), delta.detach(), layer.scaling["default"]).detach())
    assert relative_error(norms[1], norms[0]) < 1e-12
    assert relative_error(norms[2], norms[0]) < 1e-12


def test_compacting_without_wide_writers_equals_slicing() -> None:
    model, sliced = tiny("gemma", tied=True), tiny("gemma", tied=True)
    compact(model, KEEP)
    assert relative_error(logits(settle_config(model)), logits(slice_hidden(sliced, KEEP))) == 0


def test_compact_refuses_what_it_cannot_do_exactly() -> None:
    model = tiny("llama", tied=True)
    with pytest.raises(ValueError, match=r"wide: unknown writers \['block9_mlp'\]"):
        compact(model, KEEP, wide=["block9_mlp"])
    with pytest.raises(ValueError, match="tied embedding is being trained"):
        compact(model, KEEP, wide=["embedding"])
    on_embedding = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="only LoRA and DoRA on linears"):
        compact(on_embedding, KEEP)
