"""The engine: what blocks read, statistics, exact counts, resume, and what it refuses."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from decoders import FAMILIES, block_inputs, calibration, decoder
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pyprune import patterns
from pyprune.architectures import describe_blocks
from pyprune.blockwise import Block, Gram, InputNorm, PruningError, check, check_sparsity, linears_of, prune
from pyprune.methods import ONE_SHOT, find
from pyprune.methods.besa import BESA
from pyprune.methods.magnitude import Magnitude
from pyprune.methods.oneshot import OneShot
from pyprune.methods.sparsegpt import SparseGPT
from pyprune.methods.wanda import Wanda


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[name], expected[name]) for name in expected)


class Notes:
    """A step that notes what every block has read and, where there are targets, what it should have given."""

    def __init__(self) -> None:
        self.inputs: list[list[Tensor]] = []
        self.targets: list[list[Tensor]] = []

    def __repr__(self) -> str:
        return "Notes()"

    def __call__(self, block: Block) -> None:
        self.inputs.append([block.inputs[i].clone() for i in range(len(block))])
        if block.targets is not None:
            self.targets.append([block.targets[i].clone() for i in range(len(block))])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", ["host", "disk"])
def test_blocks_read_what_the_pruned_model_gives_them(family: str, keep: Any) -> None:
    """Bit for bit, windows, masks, positions and batches of several lengths included."""
    model, batches, notes = decoder(family), calibration(), Notes()
    dense = weights(model)
    prune(model, Wanda(sparsity=0.5), batches, then=[notes], keep=keep)
    assert not same(weights(model), dense)
    expected = block_inputs(model, batches)
    for found, wanted in zip(notes.inputs, expected, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_every_block_gets_its_own_arguments() -> None:
    """Layers of one model whose attention masks differ: a sliding window in the second one only."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        **{"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 3, "use_sliding_window": True},
        max_window_layers=1,
    )
    model, notes = Qwen2ForCausalLM(config).double().eval(), Notes()
    assert config.layer_types == ["full_attention", "sliding_attention"]
    batches = calibration()
    expected = block_inputs(model, batches)
    prune(model, _Targets(sparsity=0.01), batches, then=[notes])
    assert all(torch.equal(a, b) for a, b in zip(notes.targets[1], expected[2], strict=True))


@dataclass
class _Targets(Magnitude):
    """Magnitude that is shown the dense stream."""

    calibrated: ClassVar[bool] = True
    reference: ClassVar[Any] = "dense"


@dataclass
class _PrunedTargets(_Targets):
    reference: ClassVar[Any] = "pruned"


def test_targets_are_the_dense_models_or_the_dense_blocks_on_pruned_inputs() -> None:
    batches, dense = calibration(), decoder("llama")
    expected = block_inputs(dense, batches)
    notes, model = Notes(), copy.deepcopy(dense)
    result = prune(model, _Targets(sparsity=0.5), batches, then=[notes])
    for found, wanted in zip(notes.targets, expected[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    pruned = block_inputs(model, batches)[-1]
    error = sum((a - b).square().sum() for a, b in zip(pruned, expected[-1], strict=True))
    size = sum(b.square().sum() for b in expected[-1])
    assert result.blocks[-1].figures["error"] == pytest.approx(float(error / size), rel=1e-12)

    notes, model = Notes(), copy.deepcopy(dense)
    prune(model, _PrunedTargets(sparsity=0.5), batches, then=[notes])
    first, second = describe_blocks(model).blocks[0].module, describe_blocks(dense).blocks[1].module
    describe_blocks(dense).stack.layers[0] = first  # block 0 pruned, block 1 dense
    expected = block_inputs(dense, batches)[-1]
    assert second is describe_blocks(dense).blocks[1].module
    assert all(torch.equal(a, b) for a, b in zip(notes.targets[1], expected, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_statistics_are_sums_over_all_tokens_of_what_the_linears_read(family: str) -> None:
    model, batches = decoder(family), calibration()
    linears = {f"{b.name}.{linear.name}": linear for b in describe_blocks(model).blocks for linear in linears_of(b)}
    read: dict[str, list[Tensor]] = {name: [] for name in linears}
    handles = [
        linear.module.register_forward_pre_hook(lambda m, args, n=name: read[n].append(args[0].flatten(0, -2)))
        for name, linear in linears.items()
    ]
    with torch.no_grad():
        for ids in batches:
            model(input_ids=ids)
    for handle in handles:
        handle.remove()
    found: dict[str, tuple[Tensor, Tensor]] = {}

    @dataclass
    class Look(OneShot):
        def solve(self, block: Block) -> None:
            norms, grams = block.statistics(InputNorm), block.statistics(Gram)
            for name in block.linears:
                found[f"{block.name}.{name}"] = (norms[name].norm, grams[name].total)
            block.drop.clear()  # nothing is pruned

    prune(model, Look(), batches)
    assert found.keys() == read.keys()
    for name, (norm, gram) in found.items():
        x = torch.cat(read[name])
        assert torch.allclose(gram, sum(torch.outer(row, row) for row in x), rtol=1e-12, atol=1e-12)
        assert torch.allclose(norm, x.square().sum(0).sqrt(), rtol=1e-12)


def test_statistics_of_low_precision_are_squared_and_summed_in_fp32() -> None:
    """In bf16 the square of 1 + 1/128 would be off by 6e-5, and sums would stand still at 256."""
    x = torch.full((1256, 3), 1 + 1 / 128, dtype=torch.bfloat16)
    norm, gram = InputNorm(x), Gram(x)
    for part in x.split(8):
        norm.add(part)
        gram.add(part)
    expected = torch.full((3, 3), 1256 * (1 + 1 / 128) ** 2)
    assert torch.allclose(norm.total, expected[0], rtol=1e-5)
    assert torch.allclose(gram.total, expected, rtol=3e-5)  # 1,256 roundings in one direction, 1.2e-5


@pytest.mark.parametrize("width", [256, 300, 777])
def test_gram_matrices_are_whole(width: int) -> None:
    """Of one panel, of two, and of four, the last one narrower; read, gone on with, and read again."""
    x = torch.randn(96, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram, seen = Gram(x), 0
    for part in x.split(40):
        gram.add(part)
        seen += len(part)
        expected = torch.einsum("ti,tj->ij", x[:seen], x[:seen])
        torch.testing.assert_close(gram.total, expected, rtol=1e-12, atol=1e-12)


def test_forward_takes_other_weights_with_gradients_and_capture_stops_behind_the_last_name() -> None:
    """Conv1D stores its weight the other way round; a step sees [out, in] all the same."""
    for family in ("llama", "gpt2"):
        batches, seen = calibration(), []

        def step(block: Block, seen: list[float] = seen) -> None:
            name = block.groups[-1][0]
            other = {n: linear.matrix.clone().requires_grad_() for n, linear in block.linears.items()}
            with torch.enable_grad():
                output = block.forward(0, {name: other[name]})
                (gradient,) = torch.autograd.grad(output.square().sum(), other[name])
            assert torch.equal(output, block.forward(0))
            x, y = block.capture(0, [name])[name]
            bias = getattr(block.linears[name].module, "bias", None)
            expected = x @ block.linears[name].matrix.T + (0 if bias is None else bias)
            assert torch.allclose(y, expected, rtol=1e-10, atol=1e-12)
            wanted = 2 * output.detach().flatten(0, -2).T @ x.flatten(0, -2)
            assert torch.allclose(gradient, wanted, rtol=1e-9, atol=1e-9)
            first = block.groups[0][0]
            assert set(block.capture(0, [first], block.dense)) == {first}
            seen.append(1.0)

        prune(decoder(family), Wanda(sparsity=0.5), batches, then=[step])
        assert seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("pattern", "sparsity"), [("layer", 0.37), ("row", 0.71), ("2:4", 0.5)])
def test_the_sparsity_asked_for_is_the_one_counted(family: str, pattern: str, sparsity: float) -> None:
    model = decoder(family)
    result = prune(model, Magnitude(sparsity=sparsity, pattern=pattern))
    matrices = [linear.matrix for block in describe_blocks(model).blocks for linear in linears_of(block)]
    assert sum(int((matrix == 0).sum()) for matrix in matrices) == result.zeros
    assert result.zeros == round(sparsity * result.size) and result.size == sum(m.numel() for m in matrices)
    for matrix in matrices:
        assert abs(int((matrix == 0).sum()) - sparsity * matrix.numel()) <= 1


def test_owl_moves_sparsity_between_blocks_and_keeps_that_of_the_model() -> None:
    model, batches, outliers = decoder("llama"), calibration(), []

    @dataclass
    class Look(OneShot):
        def solve(self, block: Block) -> None:
            norms = block.statistics(InputNorm)
            scores = [linear.matrix.abs() * norms[name].norm for name, linear in block.linears.items()]
            flat = torch.cat([score.flatten() for score in scores])
            outliers.append(float((flat > 2 * flat.mean()).double().mean()))
            block.drop.clear()

    prune(copy.deepcopy(model), Look(), batches)
    result = prune(model, Wanda(sparsity=0.6, allocation="owl", owl_outlier=2.0), batches)
    rates = [sum(block.zeros.values()) / sum(block.sizes.values()) for block in result.blocks]
    assert result.zeros == round(0.6 * result.size)
    assert outliers[0] != outliers[1] and (outliers[0] > outliers[1]) == (rates[0] < rates[1])
    assert rates == pytest.approx([0.6 - 0.08, 0.6 + 0.08] if rates[0] < rates[1] else [0.68, 0.52], abs=1e-3)


# ------------------------------------------------------------------------------------------------------------- resume


class Stop:
    """A step that interrupts behind a block, once, and counts the blocks that were solved."""

    def __init__(self, behind: int | None) -> None:
        self.behind, self.solved = behind, []  # type: tuple[int | None, list[int]]

    def __repr__(self) -> str:
        return "Stop()"

    def __call__(self, block: Block) -> dict[str, float]:
        self.solved.append(block.index)
        if block.index == self.behind:
            raise KeyboardInterrupt
        return {"index": float(block.index)}


@pytest.mark.parametrize("method", [Wanda(sparsity=0.5), _Targets(sparsity=0.5), Wanda(sparsity=0.5, allocation="owl")])
def test_an_interrupted_run_ends_as_one_that_was_not(method: OneShot, tmp_path: Path) -> None:
    batches, dense = calibration(), decoder("opt")
    whole = copy.deepcopy(dense)
    expected = prune(whole, method, batches, then=[Stop(None)], folder=tmp_path / "whole")
    cut = copy.deepcopy(dense)
    with pytest.raises(KeyboardInterrupt):
        prune(cut, method, batches, then=[Stop(1)], folder=tmp_path / "cut")
    resumed, stop = copy.deepcopy(dense), Stop(None)
    found = prune(resumed, method, batches, then=[stop], folder=tmp_path / "cut")
    assert stop.solved == [1, 2]
    assert same(weights(resumed), weights(whole))
    assert [(b.zeros, b.figures) for b in found.blocks] == [(b.zeros, b.figures) for b in expected.blocks]
    assert not list((tmp_path / "cut").glob("activations*"))


def test_a_block_without_its_record_is_solved_again(tmp_path: Path) -> None:
    """The record is written after the weights: what a kill between the two leaves does not count."""
    model, batches = decoder("opt"), calibration()
    prune(copy.deepcopy(model), Wanda(sparsity=0.5), batches, then=[Stop(None)], folder=tmp_path)
    (tmp_path / "blocks" / "2.json").unlink()
    (tmp_path / "blocks" / "2.safetensors").write_bytes(b"half")
    stop = Stop(None)
    prune(model, Wanda(sparsity=0.5), batches, then=[stop], folder=tmp_path)
    assert stop.solved == [2]


@pytest.mark.parametrize("changed", ["method", "steps", "model", "calibration"])
def test_blocks_of_another_run_are_refused(changed: str, tmp_path: Path) -> None:
    model, batches = decoder("llama"), calibration()
    prune(model if changed == "model" else copy.deepcopy(model), Wanda(sparsity=0.5), batches, folder=tmp_path)
    method = Wanda(sparsity=0.6 if changed == "method" else 0.5)
    then = [Stop(None)] if changed == "steps" else []
    batches = calibration(seed=2) if changed == "calibration" else batches
    with pytest.raises(ValueError, match=f"holds blocks of another run: {changed} was .* and is now"):
        prune(model, method, batches, then=then, folder=tmp_path)


def test_blocks_of_another_dtype_are_refused(tmp_path: Path) -> None:
    """Though every bfloat16 is a float32, so that the numbers are the same."""
    model = decoder("gpt2", torch.bfloat16)
    prune(copy.deepcopy(model), Magnitude(sparsity=0.5), folder=tmp_path)
    with pytest.raises(ValueError, match=r"dtype was torch\.bfloat16 and is now torch\.float32; give the same"):
        prune(model.float(), Magnitude(sparsity=0.5), folder=tmp_path)


def keep_what_is(block: Block, share: float, measure: Any = None) -> None:
    pass


def test_a_partial_is_told_apart_by_its_arguments(tmp_path: Path) -> None:
    model = decoder("llama")
    steps = [partial(keep_what_is, share=share, measure=linears_of) for share in (0.5, 0.25)]
    prune(copy.deepcopy(model), Magnitude(), then=steps[:1], folder=tmp_path)
    key = json.loads((tmp_path / "blocks" / "key.json").read_text())
    assert key["steps"] == "partial(keep_what_is, share=0.5, measure=linears_of)"
    with pytest.raises(ValueError, match=r"steps was partial\(.*0\.5, .* and is now partial\(.*0\.25, "):
        prune(model, Magnitude(), then=steps[1:], folder=tmp_path)


def test_a_step_that_no_other_process_would_know_again_is_refused_with_a_folder(tmp_path: Path) -> None:
    class Plain:
        def __call__(self, block: Block) -> None:
            pass

    model = decoder("llama")
    for step in (Plain(), partial(keep_what_is, measure=Plain())):
        with pytest.raises(ValueError, match=r"steps is .*Plain object at 0x.* give the object a __repr__ that names"):
            prune(model, Magnitude(), then=[step], folder=tmp_path)
    assert not any(tmp_path.iterdir())
    prune(model, Magnitude(), then=[Plain()])


def test_the_model_comes_back_as_it_was_but_for_its_weights() -> None:
    model = decoder("gpt2").train()
    model.lm_head.requires_grad_(False)
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    prune(model, Wanda(sparsity=0.5), calibration())
    assert model.training
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert all("forward" not in module.__dict__ and not module._forward_hooks for module in model.modules())


def test_the_hooks_of_a_device_map_stay_and_an_offloaded_model_is_refused() -> None:
    """accelerate's hooks replace `forward` of each module that its device map names."""
    model, batches, notes = decoder("llama", torch.float32), calibration(), Notes()
    plain = copy.deepcopy(model)
    names = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    spread = dispatch_model(model, {name: "cpu" for name in names}, main_device="cpu", force_hooks=True)
    forward = spread.model.layers[1].forward
    assert "forward" in spread.model.layers[1].__dict__
    prune(plain, SparseGPT(sparsity=0.5), batches)
    prune(spread, SparseGPT(sparsity=0.5), batches, then=[notes])
    assert same(weights(spread), weights(plain)) and len(notes.inputs) == 2
    assert spread.model.layers[1].forward is forward
    with pytest.raises(ValueError, match=r"q_proj is not in memory; load the model without offloading"):
        prune(cpu_offload(decoder("llama", torch.float32), "cpu"), SparseGPT(), batches)


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Wanda(sparsity=0.0), "sparsity is 0.0; expected a number between 0 and 1, both excluded"),
        (Wanda(sparsity=1.0), "sparsity is 1.0; expected"),
        (Wanda(sparsity=float("nan")), "sparsity is nan; expected"),
        (
            Wanda(pattern="5:7", sparsity=2 / 7),
            "pattern 5:7: model.layers.0.self_attn.q_proj has 24 inputs, which groups",
        ),
        (Wanda(pattern="2:4", sparsity=0.6), "sparsity is 0.6, but the pattern 2:4 makes it 0.5"),
        (Wanda(pattern="2:4", allocation="owl"), "allocation is 'owl', but the pattern 2:4 fixes"),
        (Wanda(allocation="even"), "allocation is 'even'; expected one of uniform, owl"),
        (Wanda(pattern="diagonal", sparsity=0.5), "pattern is 'diagonal'; expected layer, row"),
        (
            Wanda(allocation="owl", owl_spread=-0.1),
            "owl_outlier is 5.0 and owl_spread -0.1; expected a positive number",
        ),
        (Wanda(allocation="owl", owl_spread=0.5), "owl_outlier is 5.0 and owl_spread 0.5; expected a positive number"),
        (Wanda(allocation="owl", owl_outlier=0.0), "owl_outlier is 0.0 and owl_spread 0.08; expected a positive"),
        (
            SparseGPT(bits=4, bits_group=7),
            "bits_group is 7, which does not divide the 24 inputs of model.layers.0.self",
        ),
        (
            BESA(bits=4, bits_group=7),
            "bits_group is 7, which does not divide the 24 inputs of model.layers.0.self_attn",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_changes(method: OneShot, message: str) -> None:
    """By `prune`, and by `check`, which has no weights to look at."""
    model = decoder("llama")
    before = weights(model)
    with pytest.raises(ValueError) as error:
        prune(model, method, calibration())
    assert str(error.value).startswith(message)
    assert same(weights(model), before)
    with pytest.raises(ValueError) as error:
        check(model.to("meta"), method)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("method", [find(name) for name in ONE_SHOT if name != "besa"])
def test_the_sparsity_that_is_left_out_is_what_the_pattern_makes_it(method: type[OneShot]) -> None:
    assert method().sparsity == 0.5
    assert method(pattern="1:4").sparsity == 0.75
    check_sparsity(method(pattern="3:7").sparsity, patterns.parse("3:7"), "uniform")
    with pytest.raises(ValueError, match=r"the pattern 3:7 makes it 0\.571428\d+; leave it out"):
        check_sparsity(0.571429, patterns.parse("3:7"), "uniform")


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "calibration has 0 batches"),
        (
            [torch.full((1, 8), 61)],
            "token ids [B, T] from 0 to 60, no batch of them empty, found torch.int64 [1, 8] with values from 61 to 61",
        ),
        ([torch.full((1, 8), -1)], "with values from -1 to -1; encode the text with the model's own tokenizer"),
        ([torch.ones(1, 8, dtype=torch.bool)], "expected int64 or int32 token ids [B, T]"),
        ([torch.ones(1, 8).long(), torch.zeros(0, 8).long()], "no batch of them empty, found torch.int64 [0, 8];"),
        ([[3, 4, 5]], "found list"),
        ([torch.ones(8, dtype=torch.long)], "found torch.int64 [8]"),
        ([torch.ones(1, 8)], "found torch.float32 [1, 8]"),
        ([torch.ones(1, 65, dtype=torch.long)], "65 tokens, more than the 64 positions"),
    ],
)
def test_calibration_that_does_not_fit_is_refused(batches: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError) as error:
        prune(decoder("llama"), Wanda(), batches)
    assert message in str(error.value)


def test_activations_that_are_not_finite_are_named_by_layer() -> None:
    model = decoder("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = float("inf")
    with pytest.raises(PruningError, match=r"^model\.layers\.1\.mlp\.down_proj: its inputs are not finite"):
        prune(model, Wanda(), calibration())
    with pytest.raises(PruningError, match=r"^model\.layers\.1\.mlp\.up_proj: scores are not finite"):
        prune(model, Magnitude())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = float("nan")
    with pytest.raises(PruningError, match=r"^model\.layers\.1\.mlp\.up_proj: its weight is not finite"):
        prune(model, SparseGPT(), calibration())
    model = decoder("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.bias[3] = float("nan")
    with pytest.raises(PruningError, match=r"^model\.layers\.0: its outputs are not finite"):
        prune(model, Wanda(), calibration())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError("no memory")])
def test_out_of_memory_says_what_to_lower_and_keeps_the_finished_blocks(error: Exception, tmp_path: Path) -> None:
    def step(block: Block) -> None:
        if block.index == 1:
            raise error

    with pytest.raises(
        PruningError, match=r"^model\.layers\.1: out of memory on cpu .*smaller calibration batches, or"
    ):
        prune(decoder("llama"), Wanda(), calibration(), then=[step], folder=tmp_path)
    assert json.loads((tmp_path / "blocks" / "0.json").read_text())["name"] == "model.layers.0"


def test_a_method_that_prunes_too_little_is_found_out() -> None:
    @dataclass
    class Idle(OneShot):
        def solve(self, block: Block) -> None:
            pass

    with pytest.raises(RuntimeError, match=r"Idle left .* zeros in model\.layers\.0; it had to make"):
        prune(decoder("llama"), Idle(), calibration())


def test_what_is_easily_mistaken_for_an_argument_is_named() -> None:
    model: Any = decoder("llama")
    for arguments, message in (
        (("a folder", Magnitude()), "model is 'a folder'; open it first"),
        ((model, "wanda"), "method is 'wanda'; expected one that prunes block by block"),
        ((model, Magnitude), r"method is <class .*Magnitude'>; expected one"),
    ):
        with pytest.raises(TypeError, match=message):
            prune(*arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"then is <function .*; expected a list of steps"):
        prune(model, Magnitude(), then=lambda block: None)  # type: ignore[arg-type]

    @dataclass
    class Own(Magnitude):
        def solve(self, block: Block) -> None:
            name, mask = self.given
            block.keep(name, mask)

    method = Own(sparsity=0.5)
    shape = tuple(model.model.layers[0].self_attn.q_proj.weight.shape)
    for name, mask, kind, message in (
        ("q_proj", torch.ones(shape).bool(), KeyError, r"has no linear 'q_proj'; it has self_attn.q_proj, "),
        ("self_attn.q_proj", torch.ones(shape), ValueError, r"q_proj: the mask is torch.float32 \["),
        ("self_attn.q_proj", torch.ones(3, 3).bool(), ValueError, r"the mask is torch.bool \[3, 3\]; expected bool \["),
    ):
        method.given = (name, mask)  # type: ignore[attr-defined]
        with pytest.raises(kind, match=message):
            prune(model, method)


def test_models_that_cannot_be_pruned_in_place_are_refused() -> None:
    model = decoder("llama")
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj is not in memory; load the model without"):
        prune(model, Magnitude())
    model = decoder("llama")
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(40, 24, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"up_proj is torch\.int8; load the model unquantised"):
        prune(model, Magnitude())
    with pytest.raises(ValueError, match=r"q_proj carries an adapter; fold it first with pyprune\.surgery"):
        prune(get_peft_model(decoder("llama"), LoraConfig(r=2, target_modules=["q_proj"])), Magnitude())
