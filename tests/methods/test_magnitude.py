"""Magnitude pruning against Python's sort, without calibration text."""

from __future__ import annotations

import copy

import pytest
from decoders import decoder
from oneshot_oracle import BLOCKS, GROUPS, counts, mask_all, mask_n_of_m, mask_rows
from torch import nn

from pyprune.blockwise import prune
from pyprune.methods.magnitude import Magnitude


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("pattern", "sparsity"), [("layer", 0.43), ("row", 0.43), ("4:8", 0.5)])
def test_magnitude_drops_the_smallest_weights(family: str, pattern: str, sparsity: float) -> None:
    model: nn.Module = decoder(family)
    expected, drop = copy.deepcopy(model), iter(counts(model, family, sparsity))
    for block in expected.get_submodule(BLOCKS[family]).children():
        for name in sum(GROUPS[family], ()):
            weight = block.get_submodule(name).weight.data
            weight = weight.T if family == "gpt2" else weight
            count = next(drop)
            if ":" in pattern:
                mask = mask_n_of_m(weight.abs(), 4, 8)
            else:
                mask = {"layer": mask_all, "row": mask_rows}[pattern](weight.abs(), count)
            weight.mul_(mask)
    prune(model, Magnitude(sparsity=sparsity, pattern=pattern))
    for name, value in expected.state_dict().items():
        assert model.state_dict()[name].equal(value), name
