"""One short training that can be killed anywhere; run in processes of its own by test_resume.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed

from pyprune import training
from pyprune.data import TokenWindows
from pyprune.methods.lora import LoRA

STEPS = 13
WINDOWS = 10  # not a multiple of the batch: epochs end inside the run


class At(TrainerCallback):
    """Sends this process a signal when a step ends, before anything of it is saved."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@contextmanager
def killed_while_writing(call: int) -> Iterator[None]:
    """SIGKILL in the middle of the `call`-th file that is written from here on, half of it on disk (behind a file that
    is written atomically, of which there is no half)."""
    import peft.peft_model
    import safetensors.torch

    atomic, written = training.write_atomically, 0

    def dying(write: Any, place: int) -> Any:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            nonlocal written
            written += 1
            result = write(*args, **kwargs)
            if written == call:
                path = Path(kwargs.get("filename", args[place] if len(args) > place else ""))
                if write is not atomic:
                    os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return replacement

    patched: list[tuple[Any, str, int]] = [
        (torch, "save", 1),
        (safetensors.torch, "save_file", 1),
        (training, "save_file", 1),
        (training, "write_atomically", 0),
        (peft.peft_model, "safe_save_file", 1),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in patched]
    for module, name, place in patched:
        setattr(module, name, dying(getattr(module, name), place))
    try:
        yield
    finally:
        for module, name, original in before:
            setattr(module, name, original)


def model_of(dtype: torch.dtype) -> Any:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(dtype)
    model = LoRA(lora_rank=3, lora_alpha=6.0, lora_dropout=0.2).prepare(model)
    model.get_base_model().model.norm.weight.requires_grad_(True)  # as a method's own modules: PEFT does not save it
    return model


def windows() -> TokenWindows:
    ids = torch.randint(61, (WINDOWS, 12), generator=torch.Generator().manual_seed(3))
    return TokenWindows(ids, ids)


def train(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, torch.Tensor]:
    """The trained tensors after a whole run, or what is left of one, in `folder`."""
    model = model_of(dtype)
    options = {"steps": STEPS, "batch_size": 2, "learning_rate": 1e-2, "save_every": 3, **options}
    training.tune(
        model,
        windows(),
        folder / "checkpoints",
        metrics=folder / "metrics.jsonl",
        gradient_accumulation_steps=2,
        **options,
    )
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def train_in_process(folder: str, dtype: str, kill: tuple[str, int] | None) -> None:
    """The entry of a process; `kill` is ("step", its number) or ("file", its number counted from the start)."""
    torch.set_num_threads(1)
    place, number = kill or ("none", 0)
    callbacks = [At(number, signal.SIGKILL)] if place == "step" else []
    with killed_while_writing(number if place == "file" else 0):
        train(Path(folder), getattr(torch, dtype), callbacks=callbacks)
