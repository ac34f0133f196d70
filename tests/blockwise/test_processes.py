"""Two processes that share the calibration batches end with the same weights as one that has them all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from decoders import calibration, decoder
from safetensors.torch import load_file

from pyprune.blockwise import prune
from pyprune.methods.oneshot import OneShot
from pyprune.methods.sparsegpt import SparseGPT
from pyprune.methods.wanda import Wanda

METHODS: dict[str, OneShot] = {
    "wanda": Wanda(sparsity=0.5, allocation="owl"),
    "sparsegpt": SparseGPT(sparsity=0.5, damping=0.02),
}
WORKER = """
import sys
import torch
from torch import distributed
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[1])
from blockwise.test_processes import METHODS
from decoders import calibration, decoder
from pyprune.blockwise import prune
torch.set_num_threads(1)
store = "file://" + sys.argv[2] + "/store"
distributed.init_process_group("gloo", init_method=store, rank=int(sys.argv[3]), world_size=2)
for name, method in METHODS.items():
    model = decoder("llama")
    prune(model, method, calibration(5), folder=sys.argv[2] + "/" + name)
    save_file(model.state_dict(), sys.argv[2] + "/" + name + sys.argv[3] + ".safetensors")
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_end_as_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKER, str(Path(__file__).parents[1]), str(tmp_path)]
    workers = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    for name, method in METHODS.items():
        model = decoder("llama")
        prune(model, method, calibration(5))
        first, second = (load_file(tmp_path / f"{name}{rank}.safetensors") for rank in range(2))
        for key, value in model.state_dict().items():
            assert torch.equal(first[key], second[key]), key
            assert torch.equal(first[key] == 0, value == 0), key
            assert torch.allclose(first[key], value, rtol=1e-9, atol=1e-12), key  # another order of summation
