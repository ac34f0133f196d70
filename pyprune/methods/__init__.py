"""The methods, by name. A method is one dataclass in one file; its fields are its options, also on the command line.

A method that tunes satisfies `Method` and is named in `REGISTRY`. One that prunes without training, block by block, is
derived from `methods.oneshot.OneShot`, satisfies `blockwise.BlockMethod` and is named in `ONE_SHOT`. To add either,
write `methods/NAME.py` with a dataclass whose fields carry `metadata={"help": ...}`, and name it.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import TrainerCallback


@runtime_checkable
class Method(Protocol):
    """What tunes, or tunes and prunes, a causal language model.

    A method may also have `check(model)`, which gets the model without its weights (on the meta device) and raises
    ValueError for options that do not fit its shapes, `check_steps(steps)`, which does so for a training that is too
    short, `optimizer(training_arguments)`, which returns the class of an optimiser and its arguments, as
    `Trainer(optimizer_cls_and_kwargs=...)` takes them, and `learning_rate`, the peak of a run that is told none
    (`LEARNING_RATE` without it). Where `sparse` is True, the result has zeros instead of smaller shapes, and a run
    writes it packed too.
    """

    def prepare(
        self, model: nn.Module, calibration: Sequence[torch.Tensor] | None = None, resume: str | Path | None = None
    ) -> nn.Module:
        """The model to train, with what is trained requiring gradients. `calibration`: token ids, each [B, T].
        `resume`: a checkpoint of `training.tune`; the model must come back with the trained parameters, by name and
        shape, that it had there (their values are loaded by `tune`)."""
        ...

    def callbacks(self) -> list[TrainerCallback]:
        """For any `transformers.Trainer` that trains the prepared model."""
        ...

    def finalize(self, model: nn.Module) -> nn.Module:
        """The trained model as an ordinary one of a stock architecture."""
        ...


LEARNING_RATE = 1e-3  # suits LoRA

REGISTRY = {
    "pat": "pyprune.methods.pat:PAT",
    "loraprune": "pyprune.methods.loraprune:LoRAPrune",
    "llm-pruner": "pyprune.methods.llm_pruner:LLMPruner",
    "slimgpt": "pyprune.methods.slimgpt:SlimGPT",
    "slicegpt": "pyprune.methods.slicegpt:SliceGPT",
    "prune-then-tune": "pyprune.methods.prune_then_tune:PruneThenTune",
    "lora": "pyprune.methods.lora:LoRA",
    "ast": "pyprune.methods.ast:AST",
}

ONE_SHOT = {
    "magnitude": "pyprune.methods.magnitude:Magnitude",
    "wanda": "pyprune.methods.wanda:Wanda",
    "sparsegpt": "pyprune.methods.sparsegpt:SparseGPT",
    "admm": "pyprune.methods.admm:ADMM",
    "alps": "pyprune.methods.admm:ALPS",
    "besa": "pyprune.methods.besa:BESA",
}


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a method: its default, the help of its command line option, and for that option e.g. `choices`."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def find(name: str) -> type[Any]:
    """The class of a method. Only its own file is imported. Raises ValueError for an unknown name."""
    known = REGISTRY | ONE_SHOT
    if name not in known:
        raise ValueError(f"method is {name!r}; expected one of {', '.join(known)}")
    module, _, attribute = known[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def with_option(name: str) -> list[str]:
    """The methods that have this option. All of their files are imported."""
    known = REGISTRY | ONE_SHOT
    return [method for method in known if name in {field.name for field in dataclasses.fields(find(method))}]


def like(name: str, other: Method) -> Method:
    """The method `name` with every option that it shares with `other`, for a comparison on equal terms.

    Raises:
        ValueError: it prunes a `ratio`, and `other` has none that would say how much.
    """
    method = find(name)
    own = {field.name for field in dataclasses.fields(method)}
    shared = own & set(vars(other))
    if "ratio" in own - shared:
        raise ValueError(
            f"{name} prunes a ratio of the hidden channels, and {type(other).__name__} has no ratio to be compared at; "
            "compare it with lora, or with a run of its own (slicegpt takes a target)"
        )
    return method(**{key: getattr(other, key) for key in shared})
