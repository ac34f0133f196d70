"""AST under FSDP2: two processes with shards of weights and moments end as one process that has all of them.

accelerate shards by `fully_shard` too, but on accelerators only; here the model is sharded by hand, on the CPU.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.test_ast import ast, llama, masked_layers, windows
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from pyprune.masked import full, local

STEPS, BATCH = 8, 4
VARIANTS: dict[str, dict[str, Any]] = {
    "adaptive": {},
    "slorb": {"slorb": 8, "slorb_trained": True, "kl_weight": 0.0},
    "wanda-gradual": {"mask": "gradual", "criterion": "wanda"},
}
WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
from methods.test_ast_processes import work
work(sys.argv[2], int(sys.argv[3]))
"""


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights and masks, whole."""
    return {name: full(tensor).detach().clone() for name, tensor in model.state_dict().items()}


def train(variant: str, folder: Path, rank: int = 0, world: int = 1) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The state after training on this process's share of each batch, and then of the finished model; losses."""
    method, model = ast(**VARIANTS[variant]), llama(torch.float64).train()
    data = windows()
    model = method.prepare(model, calibration=[data.ids[:8]])
    args = TrainingArguments(str(folder / "unused"), learning_rate=1e-2, max_steps=STEPS, use_cpu=True)
    args.adam_epsilon = 1e-4  # so that a gradient of roundings alone takes no whole step
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert isinstance(model, FSDPModule)
    kind, options = method.optimizer(args)
    optimizer = kind(model.parameters(), weight_decay=0.1, **options)
    (callback,) = method.callbacks()
    control, trainer = TrainerControl(), TrainerState(max_steps=STEPS)
    callback.on_train_begin(args, trainer, control, optimizer=optimizer)
    losses = []
    for step in range(STEPS):
        trainer.global_step = step
        callback.on_step_begin(args, trainer, control, optimizer=optimizer)
        rows = torch.arange(BATCH)[rank * BATCH // world : (rank + 1) * BATCH // world] + step % 8 * BATCH
        loss = model(input_ids=data.ids[rows], labels=data.ids[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    for layer in masked_layers(model).values():
        moments = optimizer.state[layer.weight]["exp_avg"]
        assert isinstance(moments, DTensor) == (world > 1)
        assert len(local(moments)) == -(-len(layer.weight) // world)
    found = state(model)
    if "slorb" in VARIANTS[variant]:
        with pytest.raises(RuntimeError, match="FSDP2 has sharded them") if world > 1 else nullcontext():
            method.finalize(model)
    else:
        found |= {f"final.{name}": tensor for name, tensor in state(method.finalize(model)).items()}
    return found, losses


def work(folder: str, rank: int) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for variant in VARIANTS:
        found, losses = train(variant, Path(folder), rank, 2)
        save_file(
            found | {"losses": torch.tensor(losses, dtype=torch.float64)}, f"{folder}/{variant}{rank}.safetensors"
        )
    distributed.destroy_process_group()


@pytest.mark.slow
def test_shards_end_as_the_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKER, str(Path(__file__).parents[1]), str(tmp_path)]
    workers = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    for variant in VARIANTS:
        expected, losses = train(variant, tmp_path)
        first, second = (load_file(tmp_path / f"{variant}{rank}.safetensors") for rank in range(2))
        mean = (first.pop("losses") + second.pop("losses")) / 2
        torch.testing.assert_close(mean, torch.tensor(losses, dtype=torch.float64), rtol=1e-6, atol=0)
        assert first.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(first[name], second[name]), name
            if name.endswith("mask"):
                assert torch.equal(first[name], value), name
            else:  # Llama's norms compute in fp32
                torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
