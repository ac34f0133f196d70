"""What pyprune gives on this machine: every op beside eager torch, a model beside another, each beside its floor.

Eager torch is the op as `pyprune.reference` writes it, of plain torch calls; for linears with packed weights it is what
one runs instead, torch's dense product of the same zeros. Results are compared before anything is timed. The floor
(`timing.floor`) is bytes at the bandwidth of a copy, operations at the rate of a matrix product, both measured here.
"""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pyprune import evaluation, ops, timing
from pyprune.architectures import describe_blocks
from pyprune.reference.bits import pack_bits

SIZES = {
    "SmolLM2-135M": (576, 1536),
    "Llama-3.2-1B": (2048, 8192),
    "Llama-3-8B": (4096, 14336),
    "Qwen3-8B": (4096, 12288),
}
"""Hidden and intermediate size of models that people prune."""
LARGEST_SOLVE = 2048
"""Columns of the largest linear that SparseGPT's solve is timed on: its time grows with their cube."""
ADAMW: dict[str, Any] = dict(lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, masked_decay=6e-5, step=3)


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        op, label: its name; its sizes and dtype.
        ours, data: the call, and one set of its arguments.
        eager, eager_data: the same in eager torch.
        nbytes, operations: the least that the op moves and multiplies, in `dtype`.
        tolerance: the difference of both results, relative in the norm, that is still roundings.
        graphs: whether it can be a CUDA graph; an op that reads a result back cannot.
    """

    op: str
    label: str
    ours: Callable[..., object]
    data: timing.Data
    eager: Callable[..., object]
    eager_data: timing.Data
    nbytes: int
    operations: int = 0
    dtype: torch.dtype = torch.bfloat16
    tolerance: float = 0.0
    graphs: bool = True


@dataclass(frozen=True)
class OpSpeed:
    """What `measure` found; all in seconds of one call.

    Attributes:
        runs: the implementation that the op ran on.
        p20, p50, p80: of the op; eager, eager_p20, eager_p80: the median of eager torch, and its percentiles.
        bytes, operations: the least that the call moves and multiplies, in `dtype`; floor: what that takes at least.
        graph: launches are left out.
    """

    op: str
    label: str
    runs: str
    p20: float
    p50: float
    p80: float
    eager: float
    eager_p20: float
    eager_p80: float
    bytes: int
    operations: int
    dtype: str
    floor: float
    graph: bool


def measure(case: Case, device: torch.device, rounds: int = 11, budget: float = 4.0) -> OpSpeed:
    """Compares the op with eager torch and times both in turn, on cold data, for about `budget` seconds.

    Raises RuntimeError when the results differ.
    """
    found: list[timing.Data] = []

    def check(result: object) -> None:
        # a copy: what works in place changes its result when it is called again
        found.append(timing.copy_of(result if isinstance(result, tuple) else (result,)))
        if len(found) == 2 and not (error := timing.error(*found)) <= case.tolerance:
            raise RuntimeError(f"{case.op}, {case.label}: the result is not that of eager torch; off by {error:.1e}")

    sides = {"ours": (case.ours, case.data), "eager": (case.eager, case.eager_data)}
    with torch.no_grad():
        entrants = {
            name: timing.enter(timing.Contender(call, functools.partial(timing.copy_of, data)), device, check)
            for name, (call, data) in sides.items()
        }
        times = timing.race(entrants, rounds, device, budget=budget, graphs=case.graphs)
    ours, eager = times["ours"], times["eager"]
    return OpSpeed(
        op=case.op,
        label=case.label,
        runs=ops.choose(case.op, device, case.dtype)[0].name,
        p20=ours.p20,
        p50=ours.p50,
        p80=ours.p80,
        eager=eager.p50,
        eager_p20=eager.p20,
        eager_p80=eager.p80,
        bytes=case.nbytes,
        operations=case.operations,
        dtype=str(case.dtype).removeprefix("torch."),
        floor=timing.floor(case.nbytes, case.operations, device, case.dtype),
        graph=ours.graph and eager.graph,
    )


def with_floor(found: OpSpeed, device: torch.device) -> OpSpeed:
    """The same beside the floor by the rates known now (`timing.measure_again`)."""
    floor = timing.floor(found.bytes, found.operations, device, getattr(torch, found.dtype))
    return dataclasses.replace(found, floor=floor)


# -------------------------------------------------------------------------------------------------------------- cases


def cases(size: str, device: torch.device, tokens: Sequence[int] = (1, 16, 256)) -> Iterator[Case]:
    """Every op on the weights of a model in `SIZES`: linears for each number of tokens, HSMs for the largest."""
    weight = normal(*SIZES[size], device=device)
    for family in FAMILIES.values():
        yield from family(weight, tokens)


def normal(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random values of unit scale."""
    return torch.randn(shape, device=device).to(dtype)


def _label(weight: Tensor, tokens: int | None = None) -> str:
    rows, columns = weight.shape
    count = "" if tokens is None else f"T={tokens} "
    return f"{rows}x{columns} {count}{_kind(weight.dtype)}"


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _in_torch(
    op: str, label: str, call: Callable[..., object], data: timing.Data, nbytes: int, operations: int = 0, **more: Any
) -> Case:
    """A case whose other side is the same op in plain torch."""

    def eager(*data: Any) -> object:
        with ops.using("reference"):
            return call(*data)

    return Case(op, label, call, data, eager, data, nbytes, operations, **more)


def packed_linears(weight: Tensor, tokens: Sequence[int]) -> Iterator[Case]:
    """`nm_linear` at 2:4, `bitmap_linear` at 50 and 70 %; the other side is torch's product with the same zeros."""
    outputs, inputs = weight.shape
    half = ops.masked_weight(weight, ops.nm_prune(weight.abs(), 2, 4)[0])

    def nm(x: Tensor, values: Tensor, metadata: Tensor) -> Tensor:
        return ops.nm_linear(x, values, metadata, 2, 4)

    def bitmap(x: Tensor, values: Tensor, bits: Tensor, offsets: Tensor) -> Tensor:
        return ops.bitmap_linear(x, values, bits, offsets, outputs, inputs)

    packed: list[tuple[str, str, Tensor, timing.Data, Callable[..., object]]] = [
        ("nm_linear", "", half, ops.nm_compress(half, 2, 4), nm)
    ]
    for share in (50, 70):
        zeros = torch.where(torch.rand(weight.shape, device=weight.device) < share / 100, 0, weight)
        packed.append(("bitmap_linear", f" {share}%", zeros, ops.bitmap_pack(zeros), bitmap))
    # Each side rounds its sums once; those of fp32 also as they grow, which adds up like the root of their length.
    units = max(4.0, inputs**0.5 / 4) if weight.dtype == torch.float32 else 4.0
    tolerance = units * torch.finfo(weight.dtype).eps
    for count in tokens:
        x = normal(count, inputs, device=weight.device, dtype=weight.dtype)
        moved, products = timing.bytes_of(x) + count * outputs * x.element_size(), 2 * count * outputs * inputs
        for op, level, zeros, parts, multiply in packed:
            yield Case(
                op,
                f"{_label(weight, count)}{level}",
                multiply,
                (x, *parts),
                linear,
                (x, zeros),
                nbytes=moved + timing.bytes_of(*parts),
                # 2:4 products have half of the operations where the hardware skips zeros
                operations=products // 2 if op == "nm_linear" else products,
                dtype=weight.dtype,
                tolerance=tolerance,
            )


def selected_linears(weight: Tensor, tokens: Sequence[int]) -> Iterator[Case]:
    """`masked_linear` at 50 %, `gathered_linear` over three quarters of the input channels."""
    outputs, inputs = weight.shape
    bits = pack_bits(torch.rand(outputs, inputs, device=weight.device) < 0.5)
    keep = torch.randperm(inputs, device=weight.device)[: inputs * 3 // 4].sort().values
    more: dict[str, Any] = {"dtype": weight.dtype, "tolerance": 4 * torch.finfo(weight.dtype).eps}
    for count in tokens:
        x, narrow = (normal(count, w, device=weight.device, dtype=weight.dtype) for w in (inputs, len(keep)))
        out = count * outputs * x.element_size()
        yield _in_torch(
            "masked_linear",
            f"{_label(weight, count)} 50%",
            ops.masked_linear,
            (x, weight, bits),
            timing.bytes_of(x, weight, bits) + out,
            2 * count * outputs * inputs,
            **more,
        )
        yield _in_torch(
            "gathered_linear",
            f"{_label(weight, count)} 75%",
            ops.gathered_linear,
            (narrow, weight, keep),
            timing.bytes_of(narrow, keep) + timing.bytes_of(weight) * len(keep) // inputs + out,
            2 * count * outputs * len(keep),
            graphs=False,  # it looks at the indices
            **more,
        )


def hsm_inputs(tokens: int, hidden: int, rank: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x [T, d], l0 [r, d], v [r], l1 [d, r] and mask [d] of `hsm`, then residual [T, d] and weight [d] of its norm, all
    of unit scale."""
    x, residual, weight = (
        normal(*s, device=device, dtype=dtype) for s in ((tokens, hidden), (tokens, hidden), (hidden,))
    )
    l0 = normal(rank, hidden, device=device, dtype=dtype) / hidden**0.5
    l1 = normal(hidden, rank, device=device, dtype=dtype) / rank**0.5
    return [x, l0, torch.randn(rank, device=device), l1, torch.rand(hidden, device=device), residual, weight]


def hsms(weight: Tensor, tokens: Sequence[int]) -> Iterator[Case]:
    """For the largest number of tokens, with a rank of a twentieth of the hidden size, as in PAT."""
    count, hidden, dtype = max(tokens), len(weight), weight.dtype
    rank = max(8, hidden // 160 * 8)
    x, *parts, residual, gain = hsm_inputs(count, hidden, rank, dtype, weight.device)
    grad, h = torch.randn_like(x), x @ parts[0].T
    label = f"T={count} d={hidden} r={rank} {_kind(dtype)}"
    products, row, factors = 4 * count * hidden * rank, timing.bytes_of(x), timing.bytes_of(*parts)
    more: dict[str, Any] = {"dtype": dtype, "tolerance": 16 * torch.finfo(dtype).eps}  # h is rounded between products

    def backward(*data: Tensor) -> object:
        return torch.ops.pyprune.hsm_backward(*data, [True] * 5)

    def norm(x: Tensor, l0: Tensor, v: Tensor, l1: Tensor, mask: Tensor, residual: Tensor, weight: Tensor) -> object:
        return ops.hsm_residual_rmsnorm(x, l0, v, l1, mask, residual, weight, eps=1e-6)

    yield _in_torch("hsm", label, ops.hsm, (x, *parts), 2 * row + factors, products, **more)
    data = (grad, x, h, *parts)
    yield _in_torch("hsm_backward", label, backward, data, 3 * row + 2 * factors, 2 * products, **more)
    data = (x, *parts, residual, gain)
    yield _in_torch("hsm_residual_rmsnorm", label, norm, data, 4 * row + factors, products, **more)


def masks(weight: Tensor, tokens: Sequence[int]) -> Iterator[Case]:
    """Choosing, packing and unpacking; what these give must be the same bits."""
    outputs, inputs = weight.shape
    label, scores = _label(weight), weight.abs()
    bits, _ = ops.nm_prune(scores, 2, 4)
    half = ops.masked_weight(weight, bits)
    nm, bitmap = ops.nm_compress(half, 2, 4), ops.bitmap_pack(half)
    dense, mask, packed, tiled = (timing.bytes_of(*data) for data in ((weight,), (bits,), nm, bitmap))
    kind: dict[str, Any] = {"dtype": weight.dtype}
    reads_back: dict[str, Any] = {"graphs": False, **kind}
    prune = lambda s, previous: ops.nm_prune(s, 2, 4, previous)  # noqa: E731
    yield _in_torch("nm_prune", label, prune, (scores, bits), dense + 2 * mask, **reads_back)
    yield _in_torch("transposable_prune", label, ops.transposable_prune, (scores,), dense + mask, **reads_back)
    yield _in_torch("masked_weight", label, ops.masked_weight, (weight, bits), 2 * dense + mask, **kind)
    yield _in_torch("nm_compress", label, lambda w: ops.nm_compress(w, 2, 4), (half,), dense + packed, **reads_back)
    yield _in_torch("nm_decompress", label, lambda v, m: ops.nm_decompress(v, m, 2, 4), nm, packed + dense, **kind)
    yield _in_torch("bitmap_pack", label, ops.bitmap_pack, (half,), 2 * dense + tiled, **reads_back)
    unpack = lambda v, b, o: ops.bitmap_unpack(v, b, o, outputs, inputs)  # noqa: E731
    yield _in_torch("bitmap_unpack", label, unpack, bitmap, tiled + dense, **kind)


def ranks(weight: Tensor, tokens: Sequence[int]) -> Iterator[Case]:
    """BESA's mask and the gradient of its hundred candidate rates."""
    outputs, inputs = weight.shape
    rank = torch.rand(outputs, inputs, device=weight.device).argsort(1).to(torch.uint16)
    threshold = torch.full((outputs,), inputs // 2, dtype=torch.int32, device=weight.device)
    grad, label, kind = torch.randn_like(weight), _label(weight), weight.dtype
    data = (weight, rank, threshold)
    yield _in_torch("rank_mask", label, ops.rank_mask, data, timing.bytes_of(*data, weight), dtype=kind)
    bucket = functools.partial(ops.rank_bucket_grad, steps=100)
    data = (grad, weight, rank)
    # fp32 sums
    yield _in_torch("rank_bucket_grad", label, bucket, data, timing.bytes_of(*data), dtype=kind, tolerance=1e-5)


def lora_scores(weight: Tensor, tokens: Sequence[int]) -> Iterator[Case]:
    """LoRAPrune's criterion of rows (0) and columns (1): one read of the weight."""
    (outputs, inputs), rank = weight.shape, 8
    shapes = ((rank, inputs), (outputs, rank), (rank, inputs), (outputs, rank))
    factors = (0.1 * torch.randn(shape, device=weight.device) for shape in shapes)
    data = (0.02 * weight, *factors)
    for dim in (0, 1):
        score = functools.partial(ops.lora_group_score, scale=2.0, dim=dim)
        label = f"{outputs}x{inputs} r={rank} dim={dim} {_kind(weight.dtype)}"
        # factors are split into pairs of bf16 on a GPU, right to 2^-16 of a term
        yield _in_torch(
            "lora_group_score", label, score, data, timing.bytes_of(*data), dtype=weight.dtype, tolerance=2**-12
        )


def optimizers(weight: Tensor, tokens: Sequence[int]) -> Iterator[Case]:
    """AST's step with one bit of mask a weight; 16-bit weights are rounded at random, by an ulp at most."""
    grad, bits = torch.randn_like(weight), pack_bits(torch.rand(weight.shape, device=weight.device) < 0.5)
    moments = tuple(torch.zeros(weight.shape, device=weight.device) for _ in range(2))

    def step(param: Tensor, grad: Tensor, first: Tensor, second: Tensor, bits: Tensor) -> tuple[Tensor, ...]:
        ops.nm_adamw_(param, grad, first, second, bits, **ADAMW)
        return param, first, second

    data = (weight, grad, *moments, bits)
    moved = timing.bytes_of(*data) + timing.bytes_of(weight, *moments)
    tolerance = 1e-6 if weight.dtype == torch.float32 else torch.finfo(weight.dtype).eps
    yield _in_torch("nm_adamw_", _label(weight), step, data, moved, dtype=weight.dtype, tolerance=tolerance)


def solves(weight: Tensor, tokens: Sequence[int]) -> Iterator[Case]:
    """SparseGPT's solves of a square linear of as many rows, `LARGEST_SOLVE` at most, in fp32; losses are compared."""
    size, device = min(len(weight), LARGEST_SOLVE), weight.device
    x = torch.randn(2 * size, size, device=device) * (torch.rand(size, device=device) + 0.1)
    hessian = x.T @ x / size
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    square = torch.randn(size, size, device=device)
    for name, n, m in (("50%", 0, 0), ("2:4", 2, 4)):

        def solve(weight: Tensor, factor: Tensor, n: int = n, m: int = m) -> Tensor:
            return ops.sparsegpt_solve(weight, factor, weight.numel() // 2, n=n, m=m)[2]

        # a close choice may fall differently, and all that follows it; each pair of columns is one product of the rows
        yield _in_torch(
            "sparsegpt_solve",
            f"{size}x{size} {name} float32",
            solve,
            (square, factor),
            2 * timing.bytes_of(square) + timing.bytes_of(factor) // 2,
            size**3,
            dtype=torch.float32,
            tolerance=1e-4,
            graphs=False,
        )


FAMILIES: dict[str, Callable[[Tensor, Sequence[int]], Iterator[Case]]] = {
    "linears": packed_linears,
    "selected": selected_linears,
    "hsm": hsms,
    "packing": masks,
    "ranks": ranks,
    "scores": lora_scores,
    "optimizer": optimizers,
    "solve": solves,
}
"""Cases of one weight [out, in] and several numbers of tokens."""


# ------------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class ModelSpeed:
    """One model at one batch; medians in seconds.

    Attributes:
        first_token: of the prompt with the logits of its last token.
        token: of one more token for every sequence of the batch.
        first_token_floor, token_floor: what they take at least: reading the weights once, the products of the linears.
        first_tokens, tokens: every repeat of both.
    """

    batch: int
    first_token: float
    token: float
    first_token_floor: float
    token_floor: float
    first_tokens: timing.Samples
    tokens: timing.Samples

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together, while decoding."""
        return self.batch / self.token


@dataclass(frozen=True)
class Load:
    """How models are measured: sequences decoded together, tokens of their prompts and new ones, repeats."""

    batches: tuple[int, ...] = (1, 4, 16)
    prompt_tokens: int = 128
    new_tokens: int = 32
    repeats: int = 5

    def __post_init__(self) -> None:
        least = {"batches": min(self.batches, default=0), "prompt_tokens": self.prompt_tokens}
        for name, value in {**least, "new_tokens": self.new_tokens, "repeats": self.repeats}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")


def compare(found: Mapping[str, nn.Module], load: Load, progress: bool = False) -> dict[str, list[ModelSpeed]]:
    """For every model, named as they are, its speed at each batch: all of them in turn within every repeat. Floors come
    last, by rates that are measured once more."""
    measured = {
        batch: evaluation.latency(
            found, load.prompt_tokens, load.new_tokens, load.repeats, batch=batch, progress=progress
        )
        for batch in load.batches
    }
    timing.measure_again()
    return {
        name: [_model_speed(model, load, batch, times[name]) for batch, times in measured.items()]
        for name, model in found.items()
    }


def _model_speed(model: nn.Module, load: Load, batch: int, times: evaluation.Latency) -> ModelSpeed:
    """The times with their floors."""
    return ModelSpeed(
        batch,
        times.prefill,
        times.decode,
        first_token_floor=_floor(model, batch * load.prompt_tokens, batch),
        token_floor=_floor(model, batch, batch),
        first_tokens=timing.Samples(tuple(times.prefill_all)),
        tokens=timing.Samples(tuple(times.decode_all)),
    )


def _floor(model: Any, tokens: int, sequences: int) -> float:
    """Seconds of a forward pass of `tokens` through the blocks and the last one of each sequence through the head: the
    weights read once, the products with what is stored of them; attention itself is left out."""
    parameter = next(model.parameters())
    blocks = sum(_products(block.module) for block in describe_blocks(model).blocks)
    operations = 2 * (tokens * blocks + sequences * _products(model.get_output_embeddings()))
    return timing.floor(evaluation.work(model)[1], operations, parameter.device, _dtype(model))


def _products(module: nn.Module) -> int:
    """Weights that one token is multiplied with; of a packed linear those that are stored."""
    from pyprune.modules import SparseLinear

    total = 0
    for part in module.modules():
        if isinstance(part, SparseLinear):
            total += part.values.numel()
        elif isinstance(weight := part._parameters.get("weight"), Tensor) and weight.dim() == 2:
            total += weight.numel()
    return total


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


@dataclass(frozen=True)
class Memory:
    """Bytes of a model's weights, and the peak of loading and running it (None: the system does not tell)."""

    weights: int
    peak: int | None


def memory(path: str, load: Load, dtype: str = "auto", trust_remote_code: bool = False) -> Memory:
    """In a process of its own, so that nothing else counts: the model is opened and decodes at the largest batch."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_memory, path, load, dtype, trust_remote_code).result()


def _memory(path: str, load: Load, dtype: str, trust_remote_code: bool) -> Memory:
    from pyprune import models  # with transformers and peft, which the ops need not wait for

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with evaluation.peak_memory(device) as peak:
        model: Any = models.open_model(path, dtype, trust_remote_code)
        evaluation.latency({"": model}, load.prompt_tokens, 2, 1, batch=max(load.batches))
    return Memory(model.get_memory_footprint(), peak.bytes)
