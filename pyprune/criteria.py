"""How important the heads, MLP channels, hidden channels and blocks of a decoder are.

A criterion is a function of a model and calibration batches that returns scores by the names of groups
(`architectures.Groups.name`; "hidden" and "layers" for the other two axes): the lowest go first. Those below are in
`CRITERIA`; a user's own function is one as well. `score` runs any of them and checks what it returns.

With x the inputs, W [out, in] a weight, G the loss's gradient of W, and sums over the weights of a group:

    activation  sqrt(sum over samples of (mean over tokens of |x_c|)^2)         Minitron, arXiv 2407.14679; forward only
    wanda       ||x_c||_2 sum_o |W_oc| at the linear that writes                Wanda, arXiv 2306.11695, by columns
    magnitude   sum |W|
    taylor      sum |W G|;   -second: sum |W h W|;   -mixed: sum |W G - W h W / 2|,   h the mean of single samples'
                squared gradients                                               LLM-Pruner, arXiv 2305.11627, eq. 3-5
    lora        sum |Ghat (W + s B A)|, Ghat from LoRA's gradients alone        LoRAPrune, arXiv 2305.18403
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from pyprune import ops
from pyprune.architectures import Decoder, Groups, Part, base, describe, weight_of
from pyprune.calibration import check_calibration
from pyprune.surgery import dense_weight

Scores = dict[str, Tensor]
Criterion = Callable[[nn.Module, Sequence[Tensor]], Scores]

WITHOUT_TEXT = ("magnitude", "random")
ORDERS = {"first": (1.0, 0.0), "second": (0.0, 1.0), "mixed": (1.0, 0.5)}  # of Taylor's: weights of W G and of W h W
ROWS = 1024  # of a weight's gradient that are in memory at one time


def score(model: nn.Module, batches: Sequence[Tensor] | None, criterion: str | Criterion = "activation") -> Scores:
    """Scores of a model's groups, on the CPU in fp32 or wider.

    Args:
        batches: token ids, each [B, T]. Criteria that look at weights alone take None.
        criterion: a name in `CRITERIA`, or a function.

    Raises:
        ValueError: an unknown criterion, no batches where they are needed, batches that do not fit the model, or scores
            of unknown groups, of a wrong shape, or not finite; the group is named.
    """
    check_known(criterion, CRITERIA)
    name = criterion if isinstance(criterion, str) else getattr(criterion, "__name__", type(criterion).__name__)
    found = (CRITERIA[criterion] if isinstance(criterion, str) else criterion)(model, batches or [])
    return check_scores(describe(model), found, f"criterion {name}")


def check_known(criterion: str | Criterion, names: Iterable[str]) -> None:
    """Raises ValueError for what is neither one of these names nor a function."""
    if not callable(criterion) and criterion not in names:
        raise ValueError(f"criterion is {criterion!r}; expected one of {', '.join(names)}, or a function")


def check_scores(decoder: Decoder, scores: Scores, what: str) -> Scores:
    """The scores. Raises ValueError for unknown names, wrong shapes and entries that are not finite."""
    sizes = {group.name: group.count for group in decoder.groups()}
    sizes |= {"hidden": decoder.hidden_size, "layers": len(decoder.blocks)}
    if unknown := sorted(scores.keys() - sizes.keys()):
        raise ValueError(
            f"{what}: scores for unknown groups {unknown}; expected names like {', '.join(list(sizes)[:2])}"
        )
    for name, values in scores.items():
        if not isinstance(values, Tensor) or values.shape != (sizes[name],):
            found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"{what}: the score of {name} is {found}; expected a tensor of shape [{sizes[name]}]")
        if not torch.isfinite(values).all():
            bad = int((~torch.isfinite(values)).sum())
            raise ValueError(
                f"{what}: {bad} of {len(values)} scores of {name} are not finite; check the weights and the data, or "
                "use bf16 or fp32"
            )
    return {
        name: values.detach().to("cpu", torch.promote_types(values.dtype, torch.float32))
        for name, values in scores.items()
    }


# ----------------------------------------------------------------------------------------------- from entries to groups


def per_group(part: Part, count: int, entries: Tensor) -> Tensor:
    """Sums [count] of a vector over the entries that each group owns."""
    owned = entries[part.offset : part.offset + count * part.width]
    return owned.view(count, part.width).sum(1)


def add_parts(
    groups: Groups, sums: Callable[[nn.Module, int], Tensor], *, normalised: bool, alive: Tensor | None = None
) -> Tensor:
    """The score [count] of groups: `sums(linear, dim)` per matrix, added over its matrices; `normalised`: each of unit
    length first, so that no matrix drowns the others. Groups whose entry of `alive` is 0 count as 0."""
    total = torch.zeros(groups.count, device=weight_of(groups.writer.linear).device)
    for part in groups.parts:
        values = per_group(part, groups.count, sums(part.linear, part.dim)).to(total)
        values = values if alive is None else values * alive.to(values)
        total = total + (values / (values.norm() + 1e-8) if normalised else values)
    return total


# ---------------------------------------------------------------------------------------------------------- the weights


def magnitude(model: nn.Module, batches: Sequence[Tensor]) -> Scores:
    """Sum of |W|; each matrix of unit length before they are added."""

    def sums(linear: nn.Module, dim: int) -> Tensor:
        return dense_weight(linear).float().abs().sum(1 - dim)

    return {groups.name: add_parts(groups, sums, normalised=True) for groups in describe(model).groups()}


def random(model: nn.Module, batches: Sequence[Tensor], seed: int = 0) -> Scores:
    """Numbers that know nothing: what every criterion has to beat."""
    generator = torch.Generator().manual_seed(seed)
    decoder = describe(model)
    sizes = {groups.name: groups.count for groups in decoder.groups()}
    sizes |= {"hidden": decoder.hidden_size, "layers": len(decoder.blocks)}
    return {name: torch.rand(size, generator=generator) for name, size in sizes.items()}


# ------------------------------------------------------------------------------------------------------ the activations


@contextmanager
def _hooked(handles: Iterable[Any]) -> Iterator[None]:
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _forward(decoder: Decoder, batches: Sequence[Tensor], criterion: str) -> None:
    """Runs the blocks on the batches without gradients or dropout."""
    _require(decoder.model, batches, criterion)
    training, device = decoder.model.training, weight_of(decoder.embedding).device
    decoder.model.eval()
    try:
        for ids in batches:
            decoder.stack(input_ids=ids.to(device), use_cache=False)
    finally:
        decoder.model.train(training)


def _require(model: nn.Module, batches: Sequence[Tensor], criterion: str, *, joined: bool = False) -> None:
    if not batches:
        raise ValueError(
            f"criterion {criterion}: it reads text, and there is none: give calibration (a FILE; in Python token ids, "
            f"each [batch, tokens]), or choose {' or '.join(WITHOUT_TEXT)}"
        )
    check_calibration(model, batches, f"criterion {criterion}", joined=joined)


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def activation(model: nn.Module, batches: Sequence[Tensor]) -> Scores:
    """Minitron's: of channels at the input of the down projection, of heads at that of the output projection (length
    over the head), of hidden channels behind all residual norms, of blocks by `depth`."""
    decoder = describe(model)
    squares: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        squares[name] = squares.get(name, 0) + activation_squares(x)

    def watch_input(groups: Groups) -> Any:
        return groups.writer.linear.register_forward_pre_hook(lambda module, args: add(groups.name, args[0]))

    norms = [
        reads.norm.register_forward_hook(lambda module, args, out: add("hidden", out)) for reads in decoder.reads()
    ]
    with _hooked([*map(watch_input, decoder.groups()), *norms]):
        layers = depth(model, batches)
    return activation_scores(decoder.groups(), squares) | {"hidden": squares["hidden"].sqrt()} | layers


def activation_squares(x: Tensor) -> Tensor:
    """[d]: the sum over samples of (mean over tokens of |x_c|)^2, of activations x [B, T, d]."""
    return _wide(x).abs().mean(1).square().sum(0)


def activation_scores(groups: Iterable[Groups], squares: Mapping[str, Tensor]) -> Scores:
    """Minitron's scores of heads and channels from the `activation_squares` of what their writers read, by name."""
    return {g.name: per_group(g.writer, g.count, squares[g.name]).sqrt() for g in groups}


def depth(model: nn.Module, batches: Sequence[Tensor]) -> Scores:
    """Of blocks: 1 - cosine between what enters and what leaves, mean over tokens."""
    decoder = describe(model)
    distance = [0.0] * len(decoder.blocks)
    tokens = 0

    def watch(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            cosine = F.cosine_similarity(_wide(args[0]), _wide(after), dim=-1)
            distance[i] += float((1 - cosine.double()).sum())

        return hook

    with _hooked(block.module.register_forward_hook(watch(i)) for i, block in enumerate(decoder.blocks)):
        _forward(decoder, batches, "activation")
    tokens = sum(ids.numel() for ids in batches)
    return {"layers": torch.tensor(distance, dtype=torch.float64) / tokens}


def wanda(model: nn.Module, batches: Sequence[Tensor]) -> Scores:
    """Wanda's |W_oc| ||x_c||_2, summed over the column of the linear that writes."""
    decoder = describe(model)
    squares: dict[str, Tensor] = {}

    def watch(groups: Groups) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            squares[groups.name] = squares.get(groups.name, 0) + _wide(args[0]).square().sum((0, 1))

        return groups.writer.linear.register_forward_pre_hook(hook)

    with _hooked(map(watch, decoder.groups())):
        _forward(decoder, batches, "wanda")
    return {
        g.name: per_group(
            g.writer, g.count, squares[g.name].sqrt() * dense_weight(g.writer.linear).float().abs().sum(0)
        )
        for g in decoder.groups()
    }


# -------------------------------------------------------------------------------------------------------- the gradients


class _Tap(torch.autograd.Function):
    """Passes a linear's output on, and hands its input and the output's gradient to `sink` in the backward pass. The
    input is a saved tensor, so that gradient checkpointing recomputes it like any other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, sink: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sink = sink
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[None, Tensor, None]:
        ctx.sink(ctx.saved_tensors[0], grad_y)
        return None, grad_y, None


def taylor(model: nn.Module, batches: Sequence[Tensor], order: Literal["first", "second", "mixed"] = "first") -> Scores:
    """LLM-Pruner's, exact and streamed: inside one backward pass over all batches, each linear's gradient is made a few
    rows at a time, reduced to sums and dropped, so no gradient of a whole weight is ever stored.

    The batches, all of one length, go through the model as one: the activations of all their tokens are in memory
    unless the model uses gradient checkpointing.
    """
    _require(model, batches, "taylor", joined=True)
    decoder = describe(model)
    sums: dict[tuple[nn.Module, int], Tensor] = {}

    def watch(linear: nn.Module, dim: int) -> Any:
        def sink(x: Tensor, grad_y: Tensor) -> None:
            sums[linear, dim] = _taylor_sums(dense_weight(linear), x, grad_y, dim, order)

        return linear.register_forward_hook(lambda module, args, y: _Tap.apply(args[0], y, sink))

    linears = {(part.linear, part.dim): None for groups in decoder.groups() for part in groups.parts}
    with _frozen(decoder), _hooked(watch(*place) for place in linears):
        _backward(decoder, torch.cat(list(batches)))
    return {
        groups.name: add_parts(groups, lambda linear, dim: sums[linear, dim], normalised=False)
        for groups in decoder.groups()
    }


@torch.no_grad()
def _taylor_sums(weight: Tensor, x: Tensor, grad_y: Tensor, dim: int, order: str) -> Tensor:
    """Sums of the importance of the weight's entries that leave `dim`. x [B, T, in], grad_y [B, T, out], whose loss is
    the mean of B samples'; h = (1/B) sum_j g_j^2 over the gradients of single samples, g_j = B times their share."""
    first, second = ORDERS[order]
    kind = torch.promote_types(weight.dtype, torch.float32)
    x, samples = x.to(kind), len(x)
    total = x.new_zeros(weight.shape[dim])
    for begin in range(0, weight.shape[0], ROWS):
        rows = slice(begin, begin + ROWS)
        w = weight[rows].to(kind)
        gradient, squares = torch.zeros_like(w), torch.zeros_like(w)
        for grad_sample, x_sample in zip(grad_y[..., rows].to(kind), x, strict=True):
            share = grad_sample.T @ x_sample
            gradient += share
            if second:
                squares += share.square()
        importance = (first * w * gradient - second * samples * w * squares * w).abs()
        if dim == 0:
            total[rows] = importance.sum(1)
        else:
            total += importance.sum(0)
    return total


@contextmanager
def _frozen(decoder: Decoder) -> Iterator[None]:
    """No parameter takes a gradient, but gradients flow from the embedding's output on; in eval mode."""
    trained = [parameter for parameter in decoder.model.parameters() if parameter.requires_grad]
    training = decoder.model.training
    for parameter in trained:
        parameter.requires_grad_(False)
    decoder.model.eval()
    for block in decoder.blocks:  # stock code checkpoints in training only; dropout is inside, in eval mode
        block.module.training = bool(getattr(block.module, "gradient_checkpointing", False))
    try:
        with _hooked([decoder.embedding.register_forward_hook(lambda module, args, out: out.requires_grad_())]):
            yield
    finally:
        decoder.model.train(training)
        for parameter in trained:
            parameter.requires_grad_(True)


def _backward(decoder: Decoder, ids: Tensor) -> None:
    ids = ids.to(weight_of(decoder.embedding).device)
    decoder.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def lora(model: nn.Module, batches: Sequence[Tensor], rank: int = 8, seed: int = 0) -> Scores:
    """LoRAPrune's in one shot: fresh adapters (B = 0, so that Ghat = s G A^T A), one backward pass a batch, removed
    again."""
    _require(model, batches, "lora")
    names = list(describe(model).linear_names())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = model.training  # a fresh PeftModel says True of itself
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
    try:
        adapted.eval()
        decoder = describe(adapted)
        for ids in batches:
            _backward(decoder, ids)
        return lora_scores(decoder.groups())
    finally:
        adapted.train(training).unload()
        for parameter in trained:
            parameter.requires_grad_(True)


@torch.no_grad()
def lora_scores(groups: Iterable[Groups], clipped: float = 1.0, alive: Mapping[str, Tensor] | None = None) -> Scores:
    """LoRAPrune's scores from the gradients that LoRA's matrices have now; each matrix of unit length before they are
    added.

    Args:
        clipped: what the gradients were multiplied with after the backward pass, to be undone.
        alive: for groups by name, 1 or 0 for each: a masked one has no score.

    Raises:
        ValueError: a linear without LoRA, or LoRA matrices without a gradient.
    """
    known: dict[tuple[nn.Module, int], Tensor] = {}

    def sums(linear: nn.Module, dim: int) -> Tensor:
        if (linear, dim) not in known:
            known[linear, dim] = _lora_sums(linear, dim, clipped)
        return known[linear, dim]

    return {g.name: add_parts(g, sums, normalised=True, alive=(alive or {}).get(g.name)) for g in groups}


def _lora_sums(linear: Any, dim: int, clipped: float) -> Tensor:
    adapters = list(getattr(linear, "lora_A", {}))
    if len(adapters) != 1:
        raise ValueError(
            f"criterion lora: a {type(base(linear)).__name__} of the blocks has {len(adapters)} LoRA adapters; "
            "expected one on every linear (target_modules='all-linear')"
        )
    a, b = linear.lora_A[adapters[0]].weight, linear.lora_B[adapters[0]].weight
    if a.grad is None or b.grad is None:
        raise ValueError("criterion lora: a LoRA matrix has no gradient; score after the backward pass")
    weight = dense_weight(linear)
    kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
    factors = (a.to(kind), b.to(kind), a.grad.to(kind) / clipped, b.grad.to(kind) / clipped)
    return ops.lora_group_score(weight, *factors, linear.scaling[adapters[0]], dim)


CRITERIA: dict[str, Criterion] = {
    "activation": activation,
    "wanda": wanda,
    "magnitude": magnitude,
    "taylor": taylor,
    "taylor-second": partial(taylor, order="second"),
    "taylor-mixed": partial(taylor, order="mixed"),
    "lora": lora,
    "random": random,
}
