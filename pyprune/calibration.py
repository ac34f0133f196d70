"""Calibration data on its way through a model: what it must be, hidden states at rest, how blocks are called, sums over
all tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, distributed, nn

from pyprune.architectures import Trunk, unwrap, weight_of

Keep = Literal["device", "host", "disk"]


# ----------------------------------------------------------------------------------------------------------- token ids


def check_calibration(
    model: nn.Module, batches: Sequence[Tensor], name: str = "calibration", *, joined: bool = False
) -> None:
    """Raises ValueError unless each batch is token ids [B, T] that the model knows, no longer than its positions.

    Args:
        model: with a head or without; may be a PeftModel.
        name: of the argument, for the message.
        joined: whether all batches must have one length.
    """
    model = unwrap(model)
    tokens = len(weight_of(model.get_input_embeddings()))  # type: ignore[operator]
    positions: int = model.config.max_position_embeddings  # type: ignore[assignment,union-attr]
    for ids in batches:
        if not _are_ids(ids, tokens):  # an index that is too high ends a CUDA context
            raise ValueError(
                f"{name}: expected int64 or int32 token ids [B, T] from 0 to {tokens - 1}, no batch of them empty, "
                f"found {_outline(ids)}; encode the text with the model's own tokenizer"
            )
        if ids.shape[1] > positions:
            raise ValueError(
                f"{name}: a batch has windows of {ids.shape[1]} tokens, more than the {positions} positions of the "
                "model; use shorter ones"
            )
    lengths = sorted({ids.shape[1] for ids in batches})
    if joined and len(lengths) > 1:
        raise ValueError(
            f"{name}: batches of {lengths} tokens; expected one length, to join them; cut all to the shortest"
        )


def _are_ids(ids: Any, tokens: int) -> bool:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32) or ids.dim() != 2 or not ids.numel():
        return False
    return 0 <= int(ids.min()) <= int(ids.max()) < tokens


def _outline(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    extremes = f" with values from {value.min()} to {value.max()}" if value.numel() else ""
    return f"{value.dtype} {list(value.shape)}{extremes}"


# ------------------------------------------------------------------------------------------------ hidden states at rest


class Activations:
    """Hidden states of all batches, [B, T, d] each: in host memory, on the device, or in files."""

    def __init__(self, keep: Keep, device: torch.device, folder: Path | None) -> None:
        self.keep, self.device, self.folder = keep, device, folder
        self._stored: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, i: int) -> Tensor:
        """Batch `i` on the device; read it, do not write to it."""
        return self._stored[i].to(self.device, non_blocking=True)

    def __setitem__(self, i: int, value: Tensor) -> None:
        self._stored[i].copy_(value, non_blocking=True)

    def append(self, value: Tensor) -> None:
        """Stores one more batch."""
        self._stored.append(self._empty(value))
        self[len(self) - 1] = value

    def _empty(self, like: Tensor) -> Tensor:
        if self.keep == "device":
            return torch.empty_like(like, device=self.device)
        if self.keep == "host":
            return torch.empty(like.shape, dtype=like.dtype, pin_memory=self.device.type == "cuda")
        assert self.folder is not None
        file = self.folder / f"{len(self)}.bin"
        return torch.from_file(str(file), shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)


class Calls:
    """The arguments besides the hidden states of every call of every block, equal tensors stored once."""

    def __init__(self, blocks: int) -> None:
        self._calls: list[list[tuple[Any, Any]]] = [[] for _ in range(blocks)]
        self._known: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    def record(self, block: int, args: Any, kwargs: Any) -> None:
        """Notes one call."""
        self._calls[block].append(_map_tensors(self._unique, (args, kwargs)))

    def on(self, block: int, device: torch.device) -> list[tuple[Any, Any]]:
        """The calls of one block with their tensors on the device."""
        moved: dict[int, Tensor] = {}
        return _map_tensors(lambda tensor: moved.setdefault(id(tensor), tensor.to(device)), self._calls[block])

    def _unique(self, tensor: Tensor) -> Tensor:
        known = self._known.setdefault((tensor.shape, tensor.dtype), [])
        for other in known:
            if other is tensor or torch.equal(other.to(tensor.device), tensor):
                return other
        known.append(tensor)
        return tensor


def _map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map_tensors(change, item) for item in value)
    if isinstance(value, dict):
        return {key: _map_tensors(change, item) for key, item in value.items()}
    return value


def record_calls(trunk: Trunk, calibration: Sequence[Tensor], inputs: Activations) -> Calls:
    """Runs the model with blocks that only note how they are called; the first one's inputs go to `inputs`."""
    calls = Calls(len(trunk.blocks))

    def recorder(index: int) -> Callable[..., Tensor]:
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if index == 0:
                inputs.append(hidden)
            calls.record(index, args, kwargs)
            return hidden

        return forward

    before = [block.module.__dict__.get("forward") for block in trunk.blocks]  # hooks of accelerate live there
    device = trunk.stack.get_input_embeddings().weight.device  # type: ignore[operator]
    try:
        for index, block in enumerate(trunk.blocks):
            block.module.forward = recorder(index)
        for ids in calibration:
            trunk.stack(input_ids=ids.to(device), use_cache=False)
    finally:
        for block, forward in zip(trunk.blocks, before, strict=True):
            del block.module.forward
            if forward is not None:
                block.module.forward = forward
    return calls


# ----------------------------------------------------------------------------------------------------------- statistics


class Statistic(Protocol):
    """A sum over all tokens that a linear reads."""

    def __init__(self, like: Tensor) -> None:
        """`like`: inputs [T, in], of the dtype and device to come."""

    def add(self, x: Tensor) -> None:
        """Takes in x [T, in]."""

    @property
    def total(self) -> Tensor:
        """The sum, which may be changed in place."""


Kind = TypeVar("Kind", bound=Statistic)


class InputNorm:
    """`norm` [in]: ||x_j||_2 of each input channel over all tokens, in fp32 (fp64 for fp64 models)."""

    def __init__(self, like: Tensor) -> None:
        self.total = like.new_zeros(like.shape[-1], dtype=torch.promote_types(like.dtype, torch.float32))

    def add(self, x: Tensor) -> None:
        self.total += x.to(self.total.dtype).square().sum(0)

    @property
    def norm(self) -> Tensor:
        return self.total.sqrt()


class Gram:
    """`total` [in, in]: the sum of x x^T over all tokens, in fp32 (fp64 for fp64 models).

    It is symmetric: where its products are most of a calibration pass, only panels from the diagonal down are computed,
    little more than half of them."""

    def __init__(self, like: Tensor) -> None:
        width, dtype = like.shape[-1], torch.promote_types(like.dtype, torch.float32)
        self._sum = like.new_zeros(width, width, dtype=dtype)
        panel = min(max(256, width // 8), 1024)
        self._panels = [(first, min(first + panel, width)) for first in range(0, width, panel)]
        self._below = False  # whether what is above the panels is still to be copied from below

    def add(self, x: Tensor) -> None:
        if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
            # tensor cores sum in fp32, where products of two half-precision numbers are exact
            self._sum += torch.mm(x.T, x, out_dtype=self._sum.dtype)
            return
        x = x.to(self._sum.dtype)
        for first, end in self._panels:
            self._sum[first:, first:end].addmm_(x[:, first:].T, x[:, first:end])
        self._below = True

    @property
    def total(self) -> Tensor:
        if self._below:
            for first, end in self._panels:
                self._sum[first:end, end:] = self._sum[end:, first:end].T
            self._below = False
        return self._sum


# ---------------------------------------------------------------------------------------------------- several processes


def sum_over_processes(value: Tensor) -> Tensor:
    """`value`, summed in place over all processes if there are several."""
    if processes() > 1:
        distributed.all_reduce(value)
    return value


def processes() -> int:
    """How many there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Which one this is."""
    return distributed.get_rank() if processes() > 1 else 0
