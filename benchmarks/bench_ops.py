"""Every op on weights of real models, beside its floor and what a user would run instead.

    python benchmarks/bench_ops.py --threads 2 --save
    python benchmarks/bench_ops.py --device cuda --save
    python benchmarks/bench_ops.py --families linears --tokens 1 16

Weights are those of Llama-2-7B and Llama-3-8B. `hsm` has a script of its own (bench_hsm.py), with torch.compile.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from harness import Case, Contender, Data, bytes_of, run
from models import conditions
from results import append
from torch import Tensor
from torch.nn.functional import linear

from pyprune import ops, reference
from pyprune.reference.bits import pack_bits

SHAPES = {"attention": (4096, 4096), "down": (4096, 11008), "gate and up": (28672, 4096)}
"""[out, in]: of Llama-2-7B, Llama-2-7B, and both halves of Llama-3-8B's MLP in one product."""
STEPS = 100  # of BESA's candidate rates
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "masked_decay": 6e-5, "step": 3}


def normal(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def clones(data: Data) -> Callable[[], Data]:
    """Data sets of the same values in memory of their own."""
    return lambda: tuple(part.clone() if isinstance(part, Tensor) else part for part in data)


def kernels(op: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The implementation that an op runs on: its kernels without the checks, which read results back."""
    return ops.choose(op, device, dtype)[0]


def two_four(weight: Tensor) -> Tensor:
    """The weight with two of four zeroed."""
    return ops.masked_weight(weight, ops.nm_prune(weight.abs(), 2, 4)[0])


def thinned(weight: Tensor, sparsity: float) -> Tensor:
    """The weight with a random share zeroed."""
    return torch.where(torch.rand_like(weight, dtype=torch.float32) < sparsity, torch.zeros_like(weight), weight)


# ------------------------------------------------------------------------------------------- packed and masked products


def semi_structured(weight: Tensor, x: Tensor) -> tuple[Contender | None, str]:
    """torch's own 2:4 product, which users of 2:4 have today; or None and why not."""
    if weight.device.type != "cuda":
        return None, "torch's 2:4 tensors need a CUDA device"
    from torch.sparse import to_sparse_semi_structured

    try:
        linear(x, to_sparse_semi_structured(weight))
    except (RuntimeError, NotImplementedError, ImportError) as error:
        return None, str(error).splitlines()[0]
    return Contender(linear, lambda: (x.clone(), to_sparse_semi_structured(weight.clone()))), ""


def packed_linears(device: torch.device, tokens: list[int]) -> Iterator[Case]:
    """`nm_linear` at 2:4 and `bitmap_linear` at 50 and 70 %, each against torch's dense product of the same zeros."""
    for label, (outputs, inputs) in SHAPES.items():
        weight = normal(outputs, inputs, device=device)
        half, fifty, seventy = two_four(weight), thinned(weight, 0.5), thinned(weight, 0.7)
        nm, bitmaps = ops.nm_compress(half, 2, 4), {"50%": ops.bitmap_pack(fifty), "70%": ops.bitmap_pack(seventy)}
        for count in tokens:
            x = normal(count, inputs, device=device)
            dense = Contender(linear, clones((x, half)))
            ours = Contender(lambda x, v, m: ops.nm_linear(x, v, m, 2, 4), clones((x, *nm)))
            contenders = {"dense": dense, "2:4": ours}
            theirs, why = semi_structured(half, x)
            contenders |= {"torch 2:4": theirs} if theirs else {}
            operations, case = 2 * count * outputs * inputs, f"{label} {outputs}x{inputs} T={count} bfloat16"
            common = bytes_of((x,)) + 2 * count * outputs
            allowed = 4 * torch.finfo(torch.bfloat16).eps
            expected = x.double() @ half.double().T
            # 2:4 products have half of the operations where the hardware skips zeros
            yield Case(
                "nm_linear",
                case,
                contenders,
                bytes_of(nm) + common,
                operations // 2,
                x.dtype,
                expected,
                allowed,
                skipped={} if theirs else {"torch 2:4": why},
            )
            for share, zeros in (("50%", fifty), ("70%", seventy)):
                packed = bitmaps[share]
                multiply = lambda x, v, b, o, n=outputs, k=inputs: ops.bitmap_linear(x, v, b, o, n, k)  # noqa: E731
                yield Case(
                    "bitmap_linear",
                    f"{case} {share}",
                    {
                        "dense": Contender(linear, clones((x, zeros))),
                        "bitmap": Contender(multiply, clones((x, *packed))),
                    },
                    bytes_of(packed) + common,
                    operations,
                    x.dtype,
                    x.double() @ zeros.double().T,
                    allowed,
                )


def selected_linears(device: torch.device, tokens: list[int]) -> Iterator[Case]:
    """`gathered_linear` over three quarters of the channels, `masked_linear` at 50 %."""
    outputs, inputs = SHAPES["down"]
    weight = normal(outputs, inputs, device=device)
    keep = torch.randperm(inputs, device=device)[: inputs * 3 // 4].sort().values
    sliced = weight[:, keep].contiguous()
    kept = torch.rand(outputs, inputs, device=device) < 0.5
    bits = pack_bits(kept)
    masked = torch.where(kept, weight, torch.zeros_like(weight))
    allowed = 4 * torch.finfo(torch.bfloat16).eps
    for count in tokens:
        case = f"down {outputs}x{inputs} T={count} bfloat16"
        x, narrow = normal(count, inputs, device=device), normal(count, len(keep), device=device)
        gathered = partial(kernels("gathered_linear", device).gathered_linear, out_index=None, bias=None)
        yield Case(
            "gathered_linear",
            f"{case} 75%",
            {
                "dense": Contender(linear, clones((x, weight))),
                "sliced copy": Contender(linear, clones((narrow, sliced))),
                "pyprune": Contender(gathered, clones((narrow, weight, keep))),
            },
            bytes_of((sliced, narrow)) + 2 * count * outputs,
            2 * count * outputs * len(keep),
        )
        yield Case(
            "masked_linear",
            f"{case} 50%",
            {
                "masked in torch": Contender(lambda x, w, k: linear(x, w * k), clones((x, weight, kept))),
                "dense": Contender(linear, clones((x, masked))),
                "pyprune": Contender(ops.masked_linear, clones((x, weight, bits))),
            },
            bytes_of((weight, bits, x)) + 2 * count * outputs,
            2 * count * outputs * inputs,
            expected=x.double() @ masked.double().T,
            allowed=allowed,
        )


# ------------------------------------------------------------------------------------------------- masks and packing


def packing(device: torch.device, tokens: list[int]) -> Iterator[Case]:
    """Masks, packing and unpacking of one weight, by their kernels; bytes are those read and written."""
    outputs, inputs = SHAPES["down"]
    case = f"{outputs}x{inputs} bfloat16"
    weight = normal(outputs, inputs, device=device)
    half, on = two_four(weight), kernels("nm_prune", device)
    bits, _ = ops.nm_prune(weight.abs(), 2, 4)
    nm, bitmap = ops.nm_compress(half, 2, 4), ops.bitmap_pack(half)
    dense = bytes_of((weight,))

    def one(op: str, moved: int, run: Callable[..., object], data: Data, expected: Tensor) -> Case:
        # the same bits or not the same: there is nothing to round
        return Case(op, case, {"pyprune": Contender(run, clones(data))}, moved, expected=expected)

    prune = lambda scores, previous: on.nm_prune(scores, 2, 4, previous)  # noqa: E731
    yield one("nm_prune", dense + 2 * bytes_of((bits,)), prune, (weight.abs(), bits), bits)
    yield one("nm_compress", dense + bytes_of(nm), lambda w: on.nm_compress(w, 2, 4), (half,), nm[0])
    yield one("nm_decompress", dense + bytes_of(nm), lambda v, m: on.nm_decompress(v, m, 2, 4), nm, half)
    pack = one("bitmap_pack", 2 * dense + bytes_of(bitmap), ops.bitmap_pack, (half,), bitmap[0])
    yield replace(pack, graphs=False)  # it reads back how many values there are
    unpack = lambda v, b, o: on.bitmap_unpack(v, b, o, outputs, inputs)  # noqa: E731
    yield one("bitmap_unpack", dense + bytes_of(bitmap), unpack, bitmap, half)
    yield one("masked_weight", 2 * dense + bytes_of((bits,)), ops.masked_weight, (weight, bits), half)
    scores = weight.abs()
    with ops.using("reference"):
        transposable, _ = ops.transposable_prune(scores[:256])
    found = Contender(lambda s: on.transposable_prune(s, None)[0], clones((scores,)))
    if not torch.equal(found.run(scores)[:256], transposable):  # type: ignore[index]
        raise SystemExit("transposable_prune differs from the reference")
    yield Case("transposable_prune", case, {"pyprune": found}, dense + bytes_of((bits,)))


# ----------------------------------------------------------------------------------------- criteria, solves, optimiser


def ranks(device: torch.device, tokens: list[int]) -> Iterator[Case]:
    """BESA's mask and its gradient, 6 bytes a 16-bit weight each."""
    outputs, inputs = SHAPES["down"]
    for dtype in (torch.bfloat16, torch.float32):
        case = f"{outputs}x{inputs} {str(dtype).removeprefix('torch.')}"
        weight, grad = (normal(outputs, inputs, device=device, dtype=dtype) for _ in range(2))
        rank = torch.rand(outputs, inputs, device=device).argsort(1).to(torch.uint16)
        threshold = torch.full((outputs,), inputs // 2, dtype=torch.int32, device=device)
        with ops.using("reference"):
            masked = ops.rank_mask(weight, rank, threshold)
            sums = ops.rank_bucket_grad(grad.double(), weight.double(), rank, STEPS)
        mask = {
            "torch": Contender(lambda w, r, t: w * (r.int() >= t[:, None]), clones((weight, rank, threshold))),
            "pyprune": Contender(ops.rank_mask, clones((weight, rank, threshold))),
        }
        yield Case("rank_mask", case, mask, bytes_of((weight, rank, masked)), expected=masked)
        bucket = Contender(partial(ops.rank_bucket_grad, steps=STEPS), clones((grad, weight, rank)))
        allowed = 1e-5  # fp32 sums of a hundred products
        yield Case(
            "rank_bucket_grad",
            case,
            {"pyprune": bucket},
            bytes_of((grad, weight, rank)),
            expected=sums,
            allowed=allowed,
        )


def lora_scores(device: torch.device, tokens: list[int]) -> Iterator[Case]:
    """LoRAPrune's criterion, one read of the weight; `torch` is the formula as the authors' code computes it."""
    scale, rank = 2.0, 8

    def plain(w: Tensor, a: Tensor, b: Tensor, ga: Tensor, gb: Tensor, dim: int) -> Tensor:
        return ((gb @ a + b @ ga - gb @ ga) * (w.to(a.dtype) + scale * b @ a)).abs().sum(1 - dim)

    for outputs, inputs in (SHAPES["attention"], SHAPES["down"]):
        weight = 0.02 * normal(outputs, inputs, device=device)
        shapes = ((rank, inputs), (outputs, rank), (rank, inputs), (outputs, rank))
        factors = [0.1 * normal(*shape, device=device, dtype=torch.float32) for shape in shapes]
        data = (weight, *factors)
        for dim in (0, 1):
            expected = plain(*(tensor.double() for tensor in data), dim=dim)
            contenders = {
                "torch": Contender(partial(plain, dim=dim), clones(data)),
                "slabs of torch": Contender(partial(reference.lora_group_score, scale=scale, dim=dim), clones(data)),
                "pyprune": Contender(partial(ops.lora_group_score, scale=scale, dim=dim), clones(data)),
            }
            # factors are split into pairs of bf16 on a GPU, right to 2^-16 of a term
            case = f"{outputs}x{inputs} r={rank} dim={dim} bfloat16"
            yield Case("lora_group_score", case, contenders, bytes_of(data), expected=expected, allowed=2**-12)


def unfused(weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, pruned: Tensor) -> None:
    """AST's step as one writes it in torch, with a mask of bytes and the weight rounded to nearest."""
    m.lerp_(grad.float(), 0.1)
    u = m + 6e-5 * (weight * pruned)
    v.mul_(0.95).addcmul_(u, u, value=0.05)
    denominator = (v / (1 - 0.95**3)).sqrt_().add_(1e-8)
    weight.mul_(1 - 1e-5)
    weight.addcdiv_(u.to(weight.dtype), denominator.to(weight.dtype), value=-1e-4 / (1 - 0.9**3))


def optimizers(device: torch.device, tokens: list[int]) -> Iterator[Case]:
    """AST's optimiser step: weight, gradient and two moments read, weight and moments written, one bit of mask."""
    outputs, inputs = SHAPES["down"]
    for dtype in (torch.bfloat16, torch.float32):
        kept = torch.rand(outputs, inputs, device=device) < 0.5
        weight, grad = (normal(outputs, inputs, device=device, dtype=dtype) for _ in range(2))
        moments = [torch.zeros(outputs, inputs, device=device) for _ in range(2)]
        bits = pack_bits(kept)
        ours, plain = ([weight.clone(), grad, *(m.clone() for m in moments)] for _ in range(2))
        ops.nm_adamw_(*ours, bits, **ADAMW)
        unfused(*plain, ~kept)
        torch.testing.assert_close(ours[0], plain[0], rtol=2**-7, atol=1e-5)  # bf16 is rounded at random

        def adamw(data: Data) -> None:
            torch._fused_adamw_(
                [data[0]], [data[1]], [data[2]], [data[3]], [], [data[4]], amsgrad=False, lr=1e-4, beta1=0.9,
                beta2=0.95, weight_decay=0.1, eps=1e-8, maximize=False,
            )  # fmt: skip

        data, moved = (weight, grad, *moments), 3 * bytes_of((weight,)) + 4 * bytes_of(moments[:1]) + bytes_of((bits,))
        contenders = {
            "plain torch": Contender(unfused, clones((*data, ~kept))),
            "pyprune": Contender(lambda w, g, m, v, b: ops.nm_adamw_(w, g, m, v, b, **ADAMW), clones((*data, bits))),
        }
        if device.type == "cuda":  # without a mask; its moments have the weight's dtype
            step = torch.ones((), device=device)
            like = (weight, grad, *(m.to(dtype) for m in moments), step)
            contenders["fused AdamW"] = Contender(lambda *data: adamw(data), clones(like))
        yield Case("nm_adamw_", f"{outputs}x{inputs} {str(dtype).removeprefix('torch.')}", contenders, moved)


def solves(device: torch.device, tokens: list[int]) -> Iterator[Case]:
    """SparseGPT's solve of a square linear, fp32, against the reference in torch."""
    size = 4096 if device.type == "cuda" else 2048
    x = torch.randn(2 * size, size, device=device) * (torch.rand(size, device=device) + 0.1)
    hessian = x.T @ x / size
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    weight = torch.randn(size, size, device=device)
    for name, pattern in {"50%": {}, "2:4": {"n": 2, "m": 4}}.items():

        def solve(weight: Tensor, factor: Tensor, pattern: dict[str, int] = pattern) -> tuple[Tensor, ...]:
            return ops.sparsegpt_solve(weight, factor, size * size // 2, **pattern)

        def plain(weight: Tensor, factor: Tensor, solve: Callable[..., Any] = solve) -> tuple[Tensor, ...]:
            with ops.using("reference"):
                return solve(weight, factor)

        losses = [float(result(weight, factor)[2]) for result in (solve, plain)]
        if not abs(losses[0] - losses[1]) < 1e-4 * losses[1]:
            raise SystemExit(f"sparsegpt_solve: losses {losses} differ")
        contenders = {
            "torch": Contender(plain, lambda: (weight, factor)),
            "pyprune": Contender(solve, lambda: (weight, factor)),
        }
        # of the products that carry errors on: each pair of columns once
        yield Case(
            "sparsegpt_solve", f"{size}x{size} {name} float32", contenders, 2 * bytes_of((weight,)), size**3,
            torch.float32, graphs=False,
        )  # fmt: skip


FAMILIES: dict[str, Callable[[torch.device, list[int]], Iterator[Case]]] = {
    "packing": packing,
    "ranks": ranks,
    "scores": lora_scores,
    "optimizer": optimizers,
    "linears": packed_linears,
    "selected": selected_linears,
    "solve": solves,
}


def main() -> None:
    """Runs all families."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 2048])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for one thread on a busy machine")
    parser.add_argument("--save", action="store_true", help="append to results.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    print(conditions(arguments.threads))
    for name in arguments.families:
        for case in FAMILIES[name](device, arguments.tokens):
            rows = run(case, device, arguments.rounds, clock)
            if arguments.save:  # case by case: what was measured stays when a later one fails
                append(rows, arguments.device)


if __name__ == "__main__":
    main()
