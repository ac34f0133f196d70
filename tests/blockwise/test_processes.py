"""Two processes that share the calibration batches end with the same weights as one that has them all; where weights
are trained, as one that steps once for two batches."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import calibration, decoder
from safetensors.torch import load_file
from torch import nn

from pyprune.blockwise import prune
from pyprune.methods.besa import BESA
from pyprune.methods.oneshot import OneShot
from pyprune.methods.sparsegpt import SparseGPT
from pyprune.methods.wanda import Wanda
from pyprune.reconstruction import Reconstruction

EPOCHS = 2
BESA_OPTIONS = {"sparsity": 0.31, "epochs": EPOCHS, "bits": 4, "bits_group": 8}  # 0.31: of no row a whole number
METHODS: dict[str, tuple[OneShot, list[Reconstruction], int]] = {  # ..., steps behind it, batches
    "wanda": (Wanda(sparsity=0.5, allocation="owl"), [], 5),
    "sparsegpt": (SparseGPT(sparsity=0.5, damping=0.02), [], 5),
    **{f"besa{batches}": (BESA(**BESA_OPTIONS), [], batches) for batches in (4, 5)},
    **{f"reconstruction{batches}": (Wanda(), [Reconstruction(epochs=EPOCHS)], batches) for batches in (4, 5)},
}
WORKER = """
import sys
from datetime import timedelta
import torch
from torch import distributed
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[1])
from blockwise.test_processes import METHODS, pruned
torch.set_num_threads(1)
store = "file://" + sys.argv[2] + "/store"
wait = timedelta(seconds=60)
distributed.init_process_group("gloo", init_method=store, rank=int(sys.argv[3]), world_size=2, timeout=wait)
for name in METHODS:
    save_file(pruned(name, sys.argv[2]).state_dict(), sys.argv[2] + "/" + name + sys.argv[3] + ".safetensors")
distributed.destroy_process_group()
"""


def pruned(name: str, folder: str) -> nn.Module:
    model = decoder("llama")
    method, then, batches = METHODS[name]
    prune(model, method, calibration(batches), then=then, folder=f"{folder}/{name}")
    return model


def step_once_for_two_batches(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """On the mean of their gradients; where an epoch leaves one over, on that one's."""
    rounds = (batches + 1) // 2

    def round_of(batch: int) -> int:
        epoch, place = divmod(batch, batches)
        return epoch * rounds + place // 2

    class Adam(torch.optim.Adam):
        seen = 0

        def step(self, closure: Any = None) -> None:
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            waiting = self.__dict__.setdefault("waiting", [])
            waiting.append([parameter.grad for parameter in parameters])
            self.seen += 1
            if round_of(self.seen) > round_of(self.seen - 1):
                for parameter, *grads in zip(parameters, *waiting, strict=True):
                    parameter.grad = sum(grads) / len(grads)
                super().step()
                waiting.clear()

    plain = torch.optim.lr_scheduler.LambdaLR

    def cosine(optimizer: torch.optim.Optimizer, rate: Any) -> Any:
        return plain(optimizer, lambda i: (1 + math.cos(math.pi * round_of(i) / (EPOCHS * rounds))) / 2)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    monkeypatch.setattr(torch.optim.lr_scheduler, "LambdaLR", cosine)


@pytest.mark.slow
def test_two_processes_end_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", WORKER, str(Path(__file__).parents[1]), str(tmp_path)]
    workers = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    for name, (_, _, batches) in METHODS.items():
        with monkeypatch.context() as patch:
            step_once_for_two_batches(patch, batches)
            model = pruned(name, f"{tmp_path}/one")
        first, second = (load_file(tmp_path / f"{name}{rank}.safetensors") for rank in range(2))
        for key, value in model.state_dict().items():
            assert torch.equal(first[key], second[key]), (name, key)
            assert torch.equal(first[key] == 0, value == 0), (name, key)
            assert torch.allclose(first[key], value, rtol=1e-9, atol=1e-12), (name, key)  # another order of summation
