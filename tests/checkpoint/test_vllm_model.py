"""A packed checkpoint in vLLM itself: its plugin loader, its model, its weight loader, on one process and on two.

Only where vLLM can be imported (tests/checkpoint/vllm.sh makes such an environment); no GPU is needed, because nothing
but attention needs vLLM's compiled half, and linears are called one by one.
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
    sparsify(model, measure=False)
    model.save_pretrained(folder / "model")
    return folder


def inputs(columns: int) -> Tensor:
    return torch.randn(5, columns, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)


def serve(rank: int, ranks: int, folder: str) -> None:
    """One of vLLM's processes: loads the model as its workers do, and writes what its linears hold and answer."""
    os.environ |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear
    from vllm.model_executor.model_loader import get_model

    torch.set_num_threads(1)
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
                weight = layer.weight.data if packed is None else packed.matrix()
                x = inputs(layer.input_size)
                mine = x.chunk(ranks, -1)[rank] if isinstance(layer, RowParallelLinear) else x
                found[name] = (packed is not None, weight, layer(mine)[0].detach())
        torch.save(found, f"{folder}/rank-{rank}-of-{ranks}.pt")


@pytest.mark.parametrize("ranks", [1, 2])
def test_vllm_loads_a_packed_checkpoint(folder: Path, ranks: int) -> None:
    torch.multiprocessing.spawn(serve, (ranks, str(folder)), nprocs=ranks)  # type: ignore[attr-defined]
    weights, biases = torch.load(folder / "dense.pt")
    for rank in range(ranks):
        found = torch.load(folder / f"rank-{rank}-of-{ranks}.pt")
        assert len(found) == 2 * 4
        for name, (is_packed, weight, answer) in found.items():
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
            assert torch.equal(weight, expected), name
            assert is_packed == (parts != [DENSE[0]]), name
            x = inputs(multiplied.shape[1]).double()
            exact = linear(x, multiplied.double(), torch.cat(bias).double() if bias else None)
            # each process's answer, their sum and the sum with the bias are rounded to bf16: half an ulp each, 2^-9
            assert (answer.double() - exact).abs().amax() <= 4 * 2**-9 * exact.abs().amax(), name
