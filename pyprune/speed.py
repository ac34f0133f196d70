"""What pyprune gives on this machine: every op beside eager torch, a model beside another, each beside its floor.

Eager torch is the op as `pyprune.reference` writes it, of plain torch calls; for linears with packed weights it is what
one runs instead, torch's dense product of the same zeros. Results are compared before anything is timed. The floor
(`timing.floor`) is bytes at the bandwidth of a copy, operations at the rate of a matrix product, both measured here.
"""

from __future__ import annotations

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
from pyprune.architectures import describe
from pyprune.reference.bits import pack_bits

SIZES = {"SmolLM2-135M": (576, 1536), "Llama-3.2-1B": (2048, 8192), "Llama-3-8B": (4096, 14336)}
"""Hidden and intermediate size of models that people prune."""
LARGEST_SOLVE = 2048
"""Columns of the largest linear that SparseGPT's solve is timed on: its time grows with their cube."""
ADAMW: dict[str, Any] = dict(lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, masked_decay=6e-5, step=3)

Data = tuple[Any, ...]


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
    data: Data
    eager: Callable[..., object]
    eager_data: Data
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
        p20, p50, p80: of the op; eager: the median of eager torch.
        floor: what the call takes at least.
        graph: launches are left out.
    """

    op: str
    label: str
    runs: str
    p20: float
    p50: float
    p80: float
    eager: float
    floor: float
    graph: bool


def measure(case: Case, device: torch.device, rounds: int = 11, budget: float = 4.0) -> OpSpeed:
    """Compares the op with eager torch and times both in turn, on cold data.

    Slow calls get fewer rounds, at least 3, so that these take about `budget` seconds, and fewer copies of their data:
    a call that takes far longer than reading its data is as slow where it finds it in a cache.

    Raises RuntimeError when the results differ.
    """
    with torch.no_grad():
        calls, data = {"ours": case.ours, "eager": case.eager}, {"ours": case.data, "eager": case.eager_data}
        _check(case, *(call(*_clone(data[name])) for name, call in calls.items()))
        sets, turn = {}, 0.0
        for name, call in calls.items():
            once = _once(call, _clone(data[name]), device)
            cold = timing.copies_for(_bytes(*data[name]), device)
            sets[name] = [_clone(data[name]) for _ in range(max(1, min(cold, int(budget / rounds / 2 / once))))]
            turn += once * len(sets[name])
        found = timing.interleave(
            {name: lambda i, call=call, sets=sets[name]: call(*sets[i]) for name, call in calls.items()},  # type: ignore[misc]
            max(3, min(rounds, int(budget / turn))),
            device,
            {name: len(copies) for name, copies in sets.items()},
            graphs=case.graphs,
        )
    ours = found["ours"]
    return OpSpeed(
        op=case.op,
        label=case.label,
        runs=ops.choose(case.op, device, case.dtype)[0].name,
        p20=ours.p20,
        p50=ours.p50,
        p80=ours.p80,
        eager=found["eager"].p50,
        floor=timing.floor(case.nbytes, case.operations, device, case.dtype),
        graph=ours.graph and found["eager"].graph,
    )


def _check(case: Case, ours: object, eager: object) -> None:
    first, second = (result[0] if isinstance(result, tuple) else result for result in (ours, eager))
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    difference = (first.double() - second.double()).norm()
    if not difference <= case.tolerance * second.double().norm():
        raise RuntimeError(f"{case.op}, {case.label}: the result is not that of eager torch; off by {difference:.1e}")


def _clone(data: Data) -> Data:
    return tuple(part.clone() if isinstance(part, Tensor) else part for part in data)


def _bytes(*tensors: object) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def _once(call: Callable[..., object], data: Data, device: torch.device) -> float:
    """Seconds of one call, not of the first."""
    start = timing.now(device)
    call(*data)
    return timing.now(device) - start


# -------------------------------------------------------------------------------------------------------------- cases


def cases(size: str, device: torch.device, tokens: Sequence[int] = (1, 16, 256)) -> Iterator[Case]:
    """Every op on the weights of a model in `SIZES`: linears for each number of tokens, HSMs for the largest."""
    hidden, intermediate = SIZES[size]
    weight = _normal(hidden, intermediate, device=device)
    yield from _packed_linears(weight, tokens)
    yield from _selected_linears(weight, tokens)
    yield from _hsms(hidden, max(tokens), device)
    yield from _masks(weight)
    yield from _ranks(weight)
    yield from _lora_scores(weight)
    yield _optimizer(weight)
    yield _solve(min(hidden, LARGEST_SOLVE), device)


def _normal(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _label(weight: Tensor, tokens: int | None = None) -> str:
    rows, columns = weight.shape
    kind = {torch.bfloat16: "bf16", torch.float32: "fp32"}[weight.dtype]
    return f"{rows}x{columns} {kind}" if tokens is None else f"T={tokens} {rows}x{columns} {kind}"


def _in_torch(
    op: str, label: str, call: Callable[..., object], data: Data, nbytes: int, operations: int = 0, **more: Any
) -> Case:
    """A case whose other side is the same op in plain torch."""

    def eager(*data: Any) -> object:
        with ops.using("reference"):
            return call(*data)

    return Case(op, label, call, data, eager, data, nbytes, operations, **more)


def _packed_linears(weight: Tensor, tokens: Sequence[int]) -> Iterator[Case]:
    outputs, inputs = weight.shape
    half = ops.masked_weight(weight, ops.nm_prune(weight.abs(), 2, 4)[0])
    nm, bitmap = ops.nm_compress(half, 2, 4), ops.bitmap_pack(half)
    tolerance = 4 * torch.finfo(weight.dtype).eps  # each side rounds its sums once
    for count in tokens:
        x = _normal(count, inputs, device=weight.device)
        moved, products = _bytes(x) + count * outputs * x.element_size(), 2 * count * outputs * inputs
        for op, zeros, packed, multiply in (
            ("nm_linear", "2:4", nm, lambda x, v, m: ops.nm_linear(x, v, m, 2, 4)),
            ("bitmap_linear", "50%", bitmap, lambda x, v, b, o: ops.bitmap_linear(x, v, b, o, outputs, inputs)),
        ):
            yield Case(
                op,
                f"{_label(weight, count)} {zeros}",
                multiply,
                (x, *packed),
                linear,
                (x, half),
                nbytes=moved + _bytes(*packed),
                operations=products // 2,  # those with zeros need not be made
                tolerance=tolerance,
            )


def _selected_linears(weight: Tensor, tokens: Sequence[int]) -> Iterator[Case]:
    outputs, inputs = weight.shape
    bits = pack_bits(torch.rand(outputs, inputs, device=weight.device) < 0.5)
    keep = torch.randperm(inputs, device=weight.device)[: inputs * 3 // 4].sort().values
    tolerance = 4 * torch.finfo(weight.dtype).eps
    for count in tokens:
        x, narrow = (_normal(count, width, device=weight.device) for width in (inputs, len(keep)))
        out = count * outputs * x.element_size()
        yield _in_torch(
            "masked_linear",
            f"{_label(weight, count)} 50%",
            ops.masked_linear,
            (x, weight, bits),
            _bytes(x, weight, bits) + out,
            2 * count * outputs * inputs,
            tolerance=tolerance,
        )
        yield _in_torch(
            "gathered_linear",
            f"{_label(weight, count)} 75%",
            ops.gathered_linear,
            (narrow, weight, keep),
            _bytes(narrow, keep) + _bytes(weight) * len(keep) // inputs + out,
            2 * count * outputs * len(keep),
            tolerance=tolerance,
            graphs=False,  # it looks at the indices
        )


def _hsms(hidden: int, tokens: int, device: torch.device) -> Iterator[Case]:
    """With a rank of a twentieth of the hidden size, as in PAT."""
    rank = max(8, hidden // 160 * 8)
    x, residual, grad = (_normal(tokens, hidden, device=device) for _ in range(3))
    l0 = _normal(rank, hidden, device=device) / hidden**0.5
    l1 = _normal(hidden, rank, device=device) / rank**0.5
    v, mask = torch.randn(rank, device=device), torch.rand(hidden, device=device)
    weight, h = _normal(hidden, device=device), x @ l0.T
    label = f"T={tokens} d={hidden} r={rank} bf16"
    products, factors = 4 * tokens * hidden * rank, _bytes(l0, v, l1, mask)
    tolerance = 16 * torch.finfo(torch.bfloat16).eps  # h is rounded between the two products

    def backward(*data: Tensor) -> object:
        return torch.ops.pyprune.hsm_backward(*data, [True] * 5)

    def norm(x: Tensor, l0: Tensor, v: Tensor, l1: Tensor, mask: Tensor, residual: Tensor, weight: Tensor) -> object:
        return ops.hsm_residual_rmsnorm(x, l0, v, l1, mask, residual, weight, eps=1e-6)

    parts = (l0, v, l1, mask)
    yield _in_torch("hsm", label, ops.hsm, (x, *parts), 2 * _bytes(x) + factors, products, tolerance=tolerance)
    yield _in_torch(
        "hsm_backward",
        label,
        backward,
        (grad, x, h, *parts),
        3 * _bytes(x) + 2 * factors,
        2 * products,
        tolerance=tolerance,
    )
    yield _in_torch(
        "hsm_residual_rmsnorm",
        label,
        norm,
        (x, *parts, residual, weight),
        4 * _bytes(x) + factors,
        products,
        tolerance=tolerance,
    )


def _masks(weight: Tensor) -> Iterator[Case]:
    """Choosing, packing and unpacking; what these give must be the same bits."""
    outputs, inputs = weight.shape
    label, scores = _label(weight), weight.abs()
    bits, _ = ops.nm_prune(scores, 2, 4)
    half = ops.masked_weight(weight, bits)
    nm, bitmap = ops.nm_compress(half, 2, 4), ops.bitmap_pack(half)
    dense, mask, packed, tiled = _bytes(weight), _bytes(bits), _bytes(*nm), _bytes(*bitmap)
    reads_back = {"graphs": False}
    yield _in_torch("nm_prune", label, lambda s: ops.nm_prune(s, 2, 4), (scores,), dense + mask, **reads_back)
    yield _in_torch("transposable_prune", label, ops.transposable_prune, (scores,), dense + mask, **reads_back)
    yield _in_torch("masked_weight", label, ops.masked_weight, (weight, bits), 2 * dense + mask)
    yield _in_torch("nm_compress", label, lambda w: ops.nm_compress(w, 2, 4), (half,), dense + packed, **reads_back)
    yield _in_torch("nm_decompress", label, lambda v, m: ops.nm_decompress(v, m, 2, 4), nm, packed + dense)
    yield _in_torch("bitmap_pack", label, ops.bitmap_pack, (half,), 2 * dense + tiled, **reads_back)
    unpack = lambda v, b, o: ops.bitmap_unpack(v, b, o, outputs, inputs)  # noqa: E731
    yield _in_torch("bitmap_unpack", label, unpack, bitmap, tiled + dense)


def _ranks(weight: Tensor) -> Iterator[Case]:
    outputs, inputs = weight.shape
    rank = torch.rand(outputs, inputs, device=weight.device).argsort(1).to(torch.uint16)
    threshold = torch.full((outputs,), inputs // 2, dtype=torch.int32, device=weight.device)
    grad, label = torch.randn_like(weight), _label(weight)
    data = (weight, rank, threshold)
    yield _in_torch("rank_mask", label, ops.rank_mask, data, _bytes(*data, weight))
    bucket = functools.partial(ops.rank_bucket_grad, steps=100)
    data = (grad, weight, rank)
    yield _in_torch("rank_bucket_grad", label, bucket, data, _bytes(*data), tolerance=1e-5)  # sums of fp32


def _lora_scores(weight: Tensor) -> Iterator[Case]:
    (outputs, inputs), rank = weight.shape, 8
    shapes = ((rank, inputs), (outputs, rank), (rank, inputs), (outputs, rank))
    data = (weight, *(0.1 * torch.randn(shape, device=weight.device) for shape in shapes))
    score = functools.partial(ops.lora_group_score, scale=2.0, dim=0)
    # factors are split into pairs of bf16 on a GPU, right to 2^-16 of a term
    yield _in_torch("lora_group_score", f"{_label(weight)} r={rank}", score, data, _bytes(*data), tolerance=2**-12)


def _optimizer(weight: Tensor) -> Case:
    """AST's step in fp32, where nothing is rounded at random."""
    param = weight.float()
    grad, bits = torch.randn_like(param), pack_bits(torch.rand_like(param) < 0.5)
    moments = (torch.zeros_like(param), torch.zeros_like(param))

    def step(param: Tensor, grad: Tensor, first: Tensor, second: Tensor, bits: Tensor) -> Tensor:
        ops.nm_adamw_(param, grad, first, second, bits, **ADAMW)
        return param

    moved = _bytes(param, grad, *moments, bits) + _bytes(param, *moments)
    data = (param, grad, *moments, bits)
    return _in_torch("nm_adamw_", _label(param), step, data, moved, dtype=torch.float32, tolerance=1e-6)


def _solve(size: int, device: torch.device) -> Case:
    """SparseGPT's solve of a square linear to 2:4 in fp32; its losses are compared."""
    x = torch.randn(2 * size, size, device=device) * (torch.rand(size, device=device) + 0.1)
    hessian = x.T @ x / size
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    weight = torch.randn(size, size, device=device)

    def solve(weight: Tensor, factor: Tensor) -> Tensor:
        return ops.sparsegpt_solve(weight, factor, weight.numel() // 2, n=2, m=4)[2]

    # a close choice may fall differently, and all that follows it; each pair of columns is one product of the rows
    return _in_torch(
        "sparsegpt_solve",
        _label(weight),
        solve,
        (weight, factor),
        2 * _bytes(weight) + _bytes(factor) // 2,
        size**3,
        dtype=torch.float32,
        tolerance=1e-4,
        graphs=False,
    )


# ------------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class ModelSpeed:
    """One model at one batch; medians in seconds.

    Attributes:
        first_token: of the prompt with the logits of its last token.
        token: of one more token for every sequence of the batch.
        first_token_floor, token_floor: what they take at least: reading the weights once, the products of the linears.
    """

    batch: int
    first_token: float
    token: float
    first_token_floor: float
    token_floor: float

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
    """For every model, named as they are, its speed at each batch: all of them in turn within every repeat."""
    speeds: dict[str, list[ModelSpeed]] = {name: [] for name in found}
    for batch in load.batches:
        measured = evaluation.latency(
            found, load.prompt_tokens, load.new_tokens, load.repeats, batch=batch, progress=progress
        )
        for name, model in found.items():
            times = measured[name]
            floors = (_floor(model, batch * load.prompt_tokens, batch), _floor(model, batch, batch))
            speeds[name].append(ModelSpeed(batch, times.prefill, times.decode, *floors))
    return speeds


def _floor(model: nn.Module, tokens: int, sequences: int) -> float:
    """Seconds of a forward pass of `tokens` through the blocks and the last one of each sequence through the head: the
    weights read once, the products with what is stored of them; attention itself is left out."""
    parameter = next(model.parameters())
    decoder = describe(model)
    blocks = sum(map(_products, (block.module for block in decoder.blocks)))
    operations = 2 * (tokens * blocks + sequences * _products(decoder.head))
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
