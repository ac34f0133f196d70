"""The engine of one-shot pruning: one decoder block on the device at a time, solved, and its outputs passed on.

The hidden states of all calibration batches lie in host memory (or on the device, or on disk). For each block in turn
the engine moves it to the device, hands the method a `Block` (its linears, its inputs, how often each linear has to be
cut), and runs the pruned block over the inputs, whose outputs take their place. So the peak is one block, what the
method keeps of it, and one batch; the rest of the model and the hidden states stay where they are.

A block is called with the very arguments that the model itself calls it with, recorded once, so nothing here knows a
model family. Several processes (`accelerate launch`) share the batches: sums are taken over all of them, and what is
trained takes one step for a batch of each.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.func import functional_call

from pyprune import allocation, patterns
from pyprune.architectures import BlockLinears, Linear, Trunk, describe_blocks
from pyprune.calibration import (
    Activations,
    Gram,
    InputNorm,
    Keep,
    Kind,
    check_calibration,
    processes,
    rank,
    record_calls,
    sum_over_processes,
)
from pyprune.console import track
from pyprune.training import write_atomically

Figures = Mapping[str, float]


class PruningError(ValueError):
    """Pruning cannot go on; the message names the layer and says what to do. Finished blocks are kept."""


# ------------------------------------------------------------------------------------------------------------ the block


class _Reached(Exception):
    """Everything that was asked for has been computed; the rest of the block is skipped."""


class Block:
    """One block on the device, and all that a method may ask of it.

    Attributes:
        index, name: its place in the model and its name there.
        linears: by name inside the block, in the order of the forward pass. `linears[name].matrix` is the live weight
            as a view [out, in]; change it by `write` or `keep`.
        groups: the same names, those that read one activation together, in the order of the forward pass.
        dense: copies [out, in] of the weights before pruning.
        drop: how many weights of each linear have to go. What counts is the sum for a method that allocates inside the
            block, and each number for one that does not.
        inputs: the hidden states that reach the block through the pruned blocks before it.
        targets: the outputs that the method's `reference` asks for, or None.
    """

    def __init__(
        self,
        index: int,
        parts: BlockLinears,
        inputs: Activations,
        targets: Activations | None,
        calls: list[tuple[Any, Any]],
        drop: dict[str, int],
        pattern: patterns.Pattern,
    ) -> None:
        self.index, self.name, self.module = index, parts.name, parts.module
        self.branches = parts.branches
        self.linears = {linear.name: linear for linear in linears_of(parts)}
        self.groups = tuple(
            tuple(linear.name for linear in group) for b in parts.branches for group in (b.reads, (b.write,))
        )
        self.dense = {name: linear.matrix.clone() for name, linear in self.linears.items()}
        self.drop, self.pattern = drop, pattern
        self.inputs, self.targets = inputs, targets
        self._calls = calls

    def __len__(self) -> int:
        """The number of batches (of this process)."""
        return len(self.inputs)

    def forward(self, i: int, weights: Mapping[str, Tensor] | None = None, x: Tensor | None = None) -> Tensor:
        """The block's output [B, T, d] for batch `i`, or for other hidden states `x` of that batch. `weights`: matrices
        [out, in] by name to compute with in place of the live ones; gradients reach them where grad mode is on."""
        args, kwargs = self._calls[i]
        x = self.inputs[i] if x is None else x
        if not weights:
            return self.module(x, *args, **kwargs)
        used = {f"{name}.weight": self.linears[name].stored(weight) for name, weight in weights.items()}
        return functional_call(self.module, used, (x, *args), kwargs)

    def capture(
        self, i: int, names: Sequence[str], weights: Mapping[str, Tensor] | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """(input [B, T, in], output [B, T, out]) of the named linears for batch `i`; what comes behind the last of them
        is not computed."""
        found: dict[str, tuple[Tensor, Tensor]] = {}

        def hook(name: str) -> Callable[..., None]:
            def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                found[name] = (args[0], output)
                if len(found) == len(names):
                    raise _Reached

            return note

        with _hooks([self.linears[name].module.register_forward_hook(hook(name)) for name in names]):
            self._run_until_reached(i, weights)
        return found

    def statistics(self, kind: type[Kind], names: Sequence[str] | None = None) -> dict[str, Kind]:
        """One pass over all batches: a statistic of the inputs of each named linear (default: all). Linears that read
        one activation share it. Raises PruningError when activations are not finite."""
        names = list(self.linears) if names is None else names
        groups = [group for group in self.groups if set(group) & set(names)]
        found: dict[str, Kind] = {}

        def hook(group: tuple[str, ...]) -> Callable[..., None]:
            def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0].detach().flatten(0, -2)
                if group[0] not in found:
                    found[group[0]] = kind(x)
                found[group[0]].add(x)
                if group is groups[-1]:
                    raise _Reached

            return note

        with _hooks([self.linears[g[0]].module.register_forward_pre_hook(hook(g)) for g in groups]):
            for i in range(len(self)):
                self._run_until_reached(i)
        for group in groups:
            total = sum_over_processes(found[group[0]].total)
            if not bool(torch.isfinite(total).all()):
                raise PruningError(
                    f"{self.name}.{group[0]}: its inputs are not finite (NaN or infinite) on the calibration text; "
                    "load the model in bfloat16 or float32, and check its weights and the blocks pruned before"
                )
        return {name: found[group[0]] for group in groups for name in group if name in names}

    def grams(self, sequential: bool) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """For each group its names and the sum of x x^T [in, in] over what they read: of the block as it is before
        anything is pruned, in one pass, or `sequential`, in a pass each, of what the changed linears before give."""
        found = {} if sequential else self.statistics(Gram)
        for group in self.groups:
            yield group, (found or self.statistics(Gram, group))[group[0]].total

    def descend(self, optimizer: torch.optim.Optimizer, epochs: int, loss: Callable[[int], Tensor]) -> None:
        """Trains by gradients of `loss(i)` for batch `i`, learning rates falling to 0 by a cosine: one step for every
        batch or, in several processes, for a batch of each of them, on the mean of the gradients."""
        batches = int(sum_over_processes(torch.tensor(len(self), device=self.inputs.device)))
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        firsts = range(0, batches, processes())  # process r has the batches r, r + processes(), ...
        total = epochs * len(firsts)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (1 + math.cos(math.pi * i / total)) / 2)
        for _ in range(epochs):
            for i, first in enumerate(firsts):
                optimizer.zero_grad()
                if i < len(self):
                    with torch.enable_grad():
                        loss(i).backward()
                if processes() > 1:  # one that has no batch left steps with the others, or their sums would wait for it
                    for parameter in parameters:
                        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                        sum_over_processes(parameter.grad).div_(min(processes(), batches - first))
                optimizer.step()
                schedule.step()

    def mask(self, name: str, scores: Tensor) -> Tensor:
        """The mask that keeps the highest scores of a linear under the method's pattern, and drops what it must."""
        try:
            return self.pattern.mask(scores, self.drop[name])
        except ValueError as error:
            raise PruningError(f"{self.name}.{name}: {error}") from error

    def keep(self, name: str, mask: Tensor) -> None:
        """Zeroes the weights of a linear where `mask` [out, in] is False.

        Raises:
            KeyError: the block has no such linear. ValueError: the mask is not of its shape, or not of bool.
        """
        if name not in self.linears:
            raise KeyError(f"{self.name} has no linear {name!r}; it has {', '.join(self.linears)}")
        weight = self.linears[name].matrix
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            raise ValueError(
                f"{self.name}.{name}: the mask is {mask.dtype} {list(mask.shape)}; expected bool {list(weight.shape)}"
            )
        weight.masked_fill_(~mask, 0)

    def write(self, name: str, matrix: Tensor) -> None:
        """Replaces a linear's weight by `matrix` [out, in]. Raises PruningError when that is not finite."""
        weight = self.linears[name].matrix
        if not bool(torch.isfinite(matrix).all()):
            if not bool(torch.isfinite(weight).all()):
                raise PruningError(f"{self.name}.{name}: its weight is not finite (NaN or infinite); check the model")
            raise PruningError(f"{self.name}.{name}: the solved weights are not finite; raise the damping")
        weight.copy_(matrix)

    def zeros(self) -> dict[str, int]:
        """The zeros of each linear, counted."""
        return {name: int((linear.matrix == 0).sum()) for name, linear in self.linears.items()}

    def _run_until_reached(self, i: int, weights: Mapping[str, Tensor] | None = None) -> None:
        try:
            self.forward(i, weights)
        except _Reached:
            return


def linears_of(parts: BlockLinears) -> list[Linear]:
    """A block's linears in the order of the forward pass."""
    return [linear for branch in parts.branches for linear in (*branch.reads, branch.write)]


@contextmanager
def _hooks(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------------ the whole model


@dataclass(frozen=True)
class BlockRecord:
    """What became of one block. `zeros` and `sizes`: zeros counted and weights of each linear; `figures`: what the
    method and the steps behind it report, and `error`, |y - y_target|^2 / |y_target|^2, where there are targets."""

    name: str
    zeros: dict[str, int]
    sizes: dict[str, int]
    seconds: float
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Pruned:
    """What became of a model, block by block."""

    blocks: list[BlockRecord]

    @property
    def zeros(self) -> int:
        """Zeros in all linears of the blocks, counted."""
        return sum(sum(block.zeros.values()) for block in self.blocks)

    @property
    def size(self) -> int:
        """Weights of all linears of the blocks."""
        return sum(sum(block.sizes.values()) for block in self.blocks)

    @property
    def sparsity(self) -> float:
        """Share of zeros in the linears of the blocks."""
        return self.zeros / self.size


class BlockMethod(Protocol):
    """What the engine asks of a one-shot method; `methods.oneshot.OneShot` has all but `solve`.

    A method may also have `check_linear(name, outputs, inputs)`, which raises ValueError for options that do not fit a
    linear of that shape; it is asked of every one before anything is read or computed."""

    sparsity: float
    pattern: str
    allocation: str
    owl_outlier: float
    owl_spread: float

    @property
    def calibrated(self) -> bool:
        """Whether the method looks at activations at all."""

    @property
    def reference(self) -> Literal["none", "pruned", "dense"]:
        """`block.targets`: none; the dense block's outputs for the inputs that come through the pruned blocks; or
        those of the dense model."""

    def solve(self, block: Block) -> Figures | None:
        """Prunes the block in place, by `block.keep` or `block.write`; returns figures for the record."""


Step = Callable[[Block], "Figures | None"]


def _check_kinds(model: object, method: object, then: object) -> None:
    """Raises TypeError for what is easily taken for an argument of `prune`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r}; open it first, with AutoModelForCausalLM.from_pretrained")
    if isinstance(method, type) or not hasattr(method, "solve"):
        raise TypeError(f"method is {method!r}; expected one that prunes block by block, such as pyprune.Wanda(0.5)")
    if not isinstance(then, Sequence):
        raise TypeError(f"then is {then!r}; expected a list of steps, such as [pyprune.Reconstruction()]")


@torch.no_grad()
def prune(
    model: nn.Module,
    method: BlockMethod,
    calibration: Sequence[Tensor] = (),
    *,
    then: Sequence[Step] = (),
    folder: str | Path | None = None,
    device: torch.device | str | None = None,
    keep: Keep = "host",
    progress: bool = False,
) -> Pruned:
    """Prunes the linears of a causal language model's blocks in place.

    Args:
        model: a transformers model of a family that `architectures` knows, on any device, or spread over several GPUs
            by a device map.
        method: Magnitude, Wanda, SparseGPT, ADMM, BESA, or whatever has `solve`.
        calibration: token ids [B, T] of each batch, none of it padding. In several processes, all of them.
        then: steps on each block after the method has solved it, such as a reconstruction of what survived. With a
            folder their `repr` (of functions: the names) must be the same in every process.
        folder: where each finished block is kept, so that an interrupted run goes on when it is started again on the
            same dense model; without it nothing is written.
        device: where blocks are solved (default: a GPU if the model is on the CPU and there is one, else where each
            block is).
        keep: where the hidden states lie: "host" memory, "disk" or on the "device".
        progress: show a bar.

    Raises:
        PruningError: see there.
        TypeError: model, method or then is something else.
        ValueError: options or calibration that do not fit the model, a folder of another run, or one for a method or
            a step that cannot be told apart from others later.
    """
    _check_kinds(model, method, then)
    trunk = describe_blocks(model)
    pattern = _fit(trunk, method)
    _check_weights(trunk)
    if reads_text(method):
        if len(calibration) < processes():
            raise ValueError(
                f"calibration has {len(calibration)} batches for {processes()} process(es); give token ids [B, T]"
            )
        check_calibration(trunk.stack, calibration)
    finished = _Finished(folder, _key(trunk, method, calibration, then))
    records = []
    with _frozen(model), _scratch(keep, folder) as scratch:
        walk_from = partial(_Walk, trunk, keep, device, scratch)
        drop = finished.once("drop", lambda: _plan(trunk, method, pattern, partial(walk_from, calibration, "none")))
        walk = walk_from(calibration if method.calibrated else (), method.reference)
        for index in track(range(len(trunk.blocks)), progress and rank() == 0, "blocks"):
            with walk.block(index, drop[index], pattern) as block:
                record = finished.records.get(index)
                if record is None or method.reference == "dense":
                    walk.aim(block)
                if record is None:
                    record = _solve(walk, block, method, then)
                    finished.save(block, record)
                else:
                    finished.load(block)
                    walk.advance(block)
            records.append(record)
    return Pruned(records)


def _solve(walk: _Walk, block: Block, method: BlockMethod, then: Sequence[Step]) -> BlockRecord:
    start = time.monotonic()
    figures = dict(method.solve(block) or {})
    for step in then:
        figures |= step(block) or {}
    if processes() > 1:  # all have the same weights by now, up to rounding
        for linear in block.linears.values():
            distributed.broadcast(linear.module.get_parameter("weight").data, src=0)
    zeros = block.zeros()
    if sum(zeros.values()) < sum(block.drop.values()):
        raise RuntimeError(f"{type(method).__name__} left {zeros} zeros in {block.name}; it had to make {block.drop}")
    figures |= walk.advance(block)
    sizes = {name: linear.matrix.numel() for name, linear in block.linears.items()}
    return BlockRecord(block.name, zeros, sizes, round(time.monotonic() - start, 3), figures)


class _Walk:
    """The calibration batches of this process on their way through the blocks."""

    def __init__(
        self,
        trunk: Trunk,
        keep: Keep,
        device: torch.device | str | None,
        scratch: Path | None,
        calibration: Sequence[Tensor],
        reference: str,
    ) -> None:
        self.trunk, self.keep, self.scratch, self.reference = trunk, keep, scratch, reference
        self.device = None if device is None else torch.device(device)
        self.inputs = self._activations("inputs")
        self.calls = record_calls(trunk, calibration[rank() :: processes()], self.inputs)
        self.targets: Activations | None = None
        if reference != "none":
            self.targets = self._activations("targets")
            for i in range(len(self.inputs)):
                self.targets.append(self.inputs[i])

    @contextmanager
    def block(self, index: int, drop: dict[str, int], pattern: patterns.Pattern) -> Iterator[Block]:
        """Block `index` on its device."""
        parts, device = self.trunk.blocks[index], self._device(index)
        home = _device_of(parts.module)
        try:
            parts.module.to(device)
            for stream in (self.inputs, self.targets):
                if stream is not None:
                    stream.device = device
            yield Block(index, parts, self.inputs, self.targets, self.calls.on(index, device), drop, pattern)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise PruningError(
                f"{parts.name}: out of memory on {device} ({str(error).splitlines()[0]}); use smaller calibration "
                f"batches, or keep the hidden states elsewhere: keep is {self.keep!r}, of device, host and disk"
            ) from error
        finally:
            parts.module.to(home)

    def aim(self, block: Block) -> None:
        """Computes the targets, while the block is dense. The dense stream takes the place of its own inputs."""
        if self.targets is not None:
            for i in range(len(block)):
                self.targets[i] = block.forward(i, x=self.targets[i] if self.reference == "dense" else None)

    def advance(self, block: Block) -> dict[str, float]:
        """The block's outputs become the next one's inputs. Returns their `error` where there are targets."""
        squares = torch.zeros(3, dtype=torch.float64, device=self.inputs.device)
        for i in range(len(block)):
            output = block.forward(i)
            squares[0] += output.double().square().sum()
            if self.targets is not None:
                target = self.targets[i]
                squares[1] += (output - target).double().square().sum()
                squares[2] += target.double().square().sum()
            self.inputs[i] = output
        size, error, target_size = sum_over_processes(squares).tolist()  # waits for the copies of a GPU, too
        if not math.isfinite(size):
            raise PruningError(
                f"{block.name}: its outputs are not finite (NaN or infinite); load the model in bfloat16 or float32, "
                "and check its weights"
            )
        return {"error": error / target_size} if target_size else {}

    def _activations(self, name: str) -> Activations:
        folder = None if self.scratch is None else self.scratch / name
        if folder is not None:
            folder.mkdir(exist_ok=True)
        return Activations(self.keep, self._device(0), folder)

    def _device(self, index: int) -> torch.device:
        own = _device_of(self.trunk.blocks[index].module)
        if self.device is None and own.type == "cpu" and torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return self.device or own


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _is_out_of_memory(error: Exception) -> bool:
    known = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in known)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter that wants a gradient, for a while."""
    training = model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _scratch(keep: Keep, folder: str | Path | None) -> Iterator[Path | None]:
    """A folder for hidden states on disk, for a while; beside the finished blocks, or where temporary files go."""
    if keep != "disk":
        yield None
        return
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="activations", dir=folder) as path:
        yield Path(path)


# ------------------------------------------------------------------------------------------------ checks and allocation


def check(model: nn.Module, method: BlockMethod) -> None:
    """Raises ValueError for a model that the method cannot prune; its weights may be on the meta device."""
    _fit(describe_blocks(model), method)


def reads_text(method: BlockMethod) -> bool:
    """Whether `prune` needs calibration text with this method."""
    return method.calibrated or method.allocation == "owl"


def _fit(trunk: Trunk, method: BlockMethod) -> patterns.Pattern:
    """The method's pattern, if that, the sparsity and the method's own options fit all linears."""
    pattern = patterns.parse(method.pattern)
    check_sparsity(method.sparsity, pattern, method.allocation)
    if not (method.owl_outlier > 0 and 0 <= method.owl_spread < 0.5):  # rates that lie 1 apart are none
        raise ValueError(
            f"owl_outlier is {method.owl_outlier} and owl_spread {method.owl_spread}; expected a positive number, and "
            "one from 0 to below 0.5"
        )
    check_linear = getattr(method, "check_linear", None)
    for block in trunk.blocks:
        for linear in linears_of(block):
            name, (outputs, inputs) = f"{block.name}.{linear.name}", linear.matrix.shape
            pattern.check(name, outputs, inputs)
            if check_linear is not None:
                check_linear(name, outputs, inputs)
    return pattern


def _check_weights(trunk: Trunk) -> None:
    for name, weight in (
        (f"{block.name}.{linear.name}", linear.module.get_parameter("weight"))
        for block in trunk.blocks
        for linear in linears_of(block)
    ):
        if weight.is_meta:
            raise ValueError(
                f"model: the weight of {name} is not in memory; load the model without offloading, the engine itself "
                "moves one block at a time to the device"
            )
        if not weight.is_floating_point():
            raise ValueError(f"model: the weight of {name} is {weight.dtype}; load the model unquantised")


def check_sparsity(sparsity: float, pattern: patterns.Pattern, rates: str) -> None:
    """Raises ValueError unless the three go together."""
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; expected a number between 0 and 1, both excluded")
    if rates not in allocation.NAMES:
        raise ValueError(f"allocation is {rates!r}; expected one of {', '.join(allocation.NAMES)}")
    if pattern.sparsity is None:
        return
    if abs(sparsity - pattern.sparsity) > 1e-9:
        raise ValueError(
            f"sparsity is {sparsity}, but the pattern {pattern.name} makes it {pattern.sparsity}; leave it out"
        )
    if rates != "uniform":
        raise ValueError(f"allocation is {rates!r}, but the pattern {pattern.name} fixes every linear's sparsity")


def _plan(
    trunk: Trunk, method: BlockMethod, pattern: patterns.Pattern, dense_walk: Callable[[], _Walk]
) -> list[dict[str, int]]:
    """How many weights each linear of each block has to lose."""
    shapes = [{linear.name: tuple(linear.matrix.shape) for linear in linears_of(block)} for block in trunk.blocks]
    sizes = [sum(math.prod(shape) for shape in block.values()) for block in shapes]
    rates = [method.sparsity] * len(shapes)
    if method.allocation == "owl":
        walk = dense_walk()
        outliers = [_outliers(walk, index, pattern, method.owl_outlier) for index in range(len(shapes))]
        rates = allocation.owl_rates(outliers, sizes, method.sparsity, method.owl_spread)
    linears = [
        (rate, index, name, shape)
        for index, (rate, block) in enumerate(zip(rates, shapes, strict=True))
        for name, shape in block.items()
    ]
    counts = allocation.apportion([rate for rate, *_ in linears], [math.prod(shape) for *_, shape in linears])
    plan: list[dict[str, int]] = [{} for _ in shapes]
    for count, (_, index, name, shape) in zip(counts, linears, strict=True):
        plan[index][name] = pattern.count(count, *shape)
    return plan


def _outliers(walk: _Walk, index: int, pattern: patterns.Pattern, times: float) -> float:
    with walk.block(index, {}, pattern) as block:
        norms = block.statistics(InputNorm)
        scores = [linear.matrix.abs().to(norms[name].norm) * norms[name].norm for name, linear in block.linears.items()]
        walk.advance(block)
        return allocation.outlier_ratio(scores, times)


# --------------------------------------------------------------------------------------------------------------- resume


class _Finished:
    """The finished blocks of a run: blocks/N.safetensors and, written after it, blocks/N.json."""

    def __init__(self, folder: str | Path | None, key: dict[str, str]) -> None:
        self.folder = None if folder is None else Path(folder) / "blocks"
        self.records: dict[int, BlockRecord] = {}
        if self.folder is None:
            return
        for name in ("method", "steps"):
            if re.search(r"\bat 0x[0-9a-fA-F]+", key[name]):
                raise ValueError(
                    f"{name} is {key[name]}: an address is another in every process, so that a run in folder {folder} "
                    "could not be resumed; give the object a __repr__ that names its options, as a dataclass has, or "
                    "leave folder out"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, before in self.once("key", lambda: key).items():
            now = key[name]
            if before != now:
                raise ValueError(
                    f"folder {folder} holds blocks of another run: {name} was {before} and is now {now}; give the "
                    "same, or name another folder"
                )
        for path in self.folder.glob("[0-9]*.json"):
            self.records[int(path.stem)] = BlockRecord(**json.loads(path.read_text(encoding="utf-8")))
        if processes() > 1:
            distributed.barrier()  # none may write a block before all have seen which there are

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` returned when it was first asked for."""
        path = None if self.folder is None else self.folder / f"{name}.json"
        if path is not None and path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        value = work()
        if path is not None and rank() == 0:
            write_atomically(path, json.dumps(value, indent=2) + "\n")
        return value

    def save(self, block: Block, record: BlockRecord) -> None:
        if self.folder is None or rank() > 0:
            return
        path, partial = self.folder / f"{block.index}.safetensors", self.folder / f".{block.index}.partial"
        save_file({name: value.contiguous() for name, value in block.module.state_dict().items()}, partial)
        partial.replace(path)
        write_atomically(path.with_suffix(".json"), json.dumps(asdict(record), indent=2) + "\n")

    def load(self, block: Block) -> None:
        assert self.folder is not None
        block.module.load_state_dict(load_file(self.folder / f"{block.index}.safetensors"))


def _key(trunk: Trunk, method: BlockMethod, calibration: Sequence[Tensor], then: Sequence[Step]) -> dict[str, str]:
    """What defines the result of a run, as text or digests."""
    weights = hashlib.sha256()  # one row of every linear tells models apart, and a pruned one from its dense self
    rows = [linear.matrix[0].contiguous().cpu() for block in trunk.blocks for linear in linears_of(block)]
    for row in rows:
        weights.update(row.view(torch.uint8).numpy().tobytes())
    tokens = hashlib.sha256()
    for ids in calibration:
        tokens.update(f"{list(ids.shape)}".encode() + ids.cpu().numpy().tobytes())
    return {
        "method": repr(method),
        "steps": ", ".join(map(_text, then)),
        "dtype": ", ".join(sorted({str(row.dtype) for row in rows})),
        "model": weights.hexdigest()[:16],
        "calibration": tokens.hexdigest()[:16],
    }


def _text(value: Any) -> str:
    """A step, or an argument of one, as text: of a function its name, as its `repr` holds an address."""
    if isinstance(value, partial):
        named = [f"{name}={_text(argument)}" for name, argument in value.keywords.items()]
        return f"partial({', '.join([_text(value.func), *map(_text, value.args), *named])})"
    return getattr(value, "__qualname__", None) or repr(value)
