"""A packed checkpoint in vLLM itself, its build for CPUs: plugin loader, model, weights on one process and two, engine.

Only where vLLM is installed; tests/checkpoint/vllm.sh makes such an environment.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import linears, llama, matrix, zero
from torch import Tensor
from torch.nn.functional import linear

pytest.importorskip("vllm", reason="vLLM is not installed; tests/checkpoint/vllm.sh DIR makes an environment with it")

HIDDEN, CHANNELS = 128, 200
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
IDS = list(range(3, 43))
DENSE = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj")  # the second is fused with a packed one


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed bf16 Llama: 2:4 in attention, bitmaps in the MLP but for `DENSE`; beside it the weights as they were."""
    from pyprune.packing import sparsify

    sizes = {"hidden_size": HIDDEN, "intermediate_size": CHANNELS, "max_position_embeddings": 64}
    model = zero(zero(llama("0.0", **sizes), "2:4", only="self_attn"), "0.6", only="mlp")
    with torch.no_grad():
        for name in DENSE:
            model.get_submodule(name).weight.normal_()
    model.to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("packed")
    weights = {name: matrix(module).clone() for name, module in linears(model).items()}
    biases = {name: module.bias.detach().clone() for name, module in linears(model).items() if module.bias is not None}
    torch.save((weights, biases), folder / "dense.pt")
    model.save_pretrained(folder / "unpacked")
    sparsify(model, measure=False)
    model.save_pretrained(folder / "model")
    return folder


def inputs(columns: int) -> Tensor:
    return torch.randn(5, columns, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)


def environment() -> None:
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def serve(rank: int, ranks: int, folder: str) -> None:
    """One of vLLM's processes: loads the model as its workers do, and writes what its linears hold and answer."""
    environment()
    os.environ["VLLM_DIST_IDENT"] = f"pyprune-{os.getppid()}"  # of the shared memory between the processes
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear
    from vllm.model_executor.model_loader import get_model

    torch.set_num_threads(1)
    torch.accelerator.empty_cache = lambda: None  # type: ignore[assignment]  # asks for an accelerator; so do its workers
    arguments = EngineArgs(model=f"{folder}/model", skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True)
    config = arguments.create_engine_config()
    assert config.model_config.quantization == "pyprune"  # by config.json alone, through the entry point
    with set_current_vllm_config(config):
        init_distributed_environment(ranks, rank, f"file://{folder}/store-{ranks}", rank, "gloo")
        initialize_model_parallel(ranks)
        model = get_model(vllm_config=config)
        found: dict[str, Any] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, LinearBase):
                packed = getattr(layer, "packed", None)
                weight = None if packed is None else packed.matrix()
                x = inputs(layer.input_size)
                mine = x.chunk(ranks, -1)[rank] if isinstance(layer, RowParallelLinear) else x
                found[name] = (weight, layer(mine)[0].detach())
        torch.save(found, f"{folder}/rank-{rank}-of-{ranks}.pt")


@pytest.mark.parametrize("ranks", [1, 2])
def test_vllm_loads_a_packed_checkpoint(folder: Path, ranks: int) -> None:
    torch.multiprocessing.spawn(serve, (ranks, str(folder)), nprocs=ranks)  # type: ignore[attr-defined]
    weights, biases = torch.load(folder / "dense.pt")
    for rank in range(ranks):
        found = torch.load(folder / f"rank-{rank}-of-{ranks}.pt")
        assert len(found) == 2 * 4
        for name, (weight, answer) in found.items():
            parent, _, own = name.rpartition(".")
            parts = [f"{parent}.{part}" for part in FUSED.get(own, [own])]
            if own in FUSED:  # split by outputs
                expected = torch.cat([weights[part].chunk(ranks)[rank] for part in parts])
                bias = [biases[part].chunk(ranks)[rank] for part in parts if part in biases]
                multiplied = expected
            else:  # split by inputs, the answers added up
                expected = weights[name].chunk(ranks, 1)[rank]
                bias = [biases[name]] if name in biases else []
                multiplied = weights[name]
            assert (weight is None) == (parts == [DENSE[0]]), name
            assert weight is None or torch.equal(weight, expected), name
            x = inputs(multiplied.shape[1]).double()
            exact = linear(x, multiplied.double(), torch.cat(bias).double() if bias else None)
            # each process's answer, their sum and the sum with the bias are rounded to bf16: half an ulp each, 2^-9
            assert (answer.double() - exact).abs().amax() <= 4 * 2**-9 * exact.abs().amax(), name


def generate(_: int, model: str, out: str) -> None:
    """vLLM's engine: log-probabilities of a prompt's own tokens, then eight tokens more."""
    environment()
    from vllm import LLM, SamplingParams

    engine = LLM(model, skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=64)
    parameters = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=0, detokenize=False)
    (result,) = engine.generate([{"prompt_token_ids": IDS}], parameters)
    scores = [step[token].logprob for step, token in zip(result.prompt_logprobs[1:], IDS[1:], strict=True)]
    assert len(result.outputs[0].token_ids) == 8
    torch.save(torch.tensor(scores), out)


def test_vllm_generates_from_a_packed_checkpoint(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    scores = {}
    for name, model in (("packed", "model"), ("dense", "unpacked")):
        out = folder / f"{name}.pt"
        torch.multiprocessing.spawn(generate, (str(folder / model), str(out)))  # type: ignore[attr-defined]
        scores[name] = torch.load(out)
    reference = AutoModelForCausalLM.from_pretrained(folder / "unpacked", dtype=torch.float64)
    with torch.no_grad():
        exact = reference(torch.tensor([IDS])).logits[0, :-1].log_softmax(-1)
    exact = exact.gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
    errors = {name: (mine.double() - exact).abs().mean() for name, mine in scores.items()}
    assert exact.std() > 20 * errors["dense"]  # bf16 through vLLM is near enough to tell right from wrong
    assert errors["packed"] <= 2 * errors["dense"]  # the same weights in bf16, sums in another order
