"""Every op on weights of real models, beside its floor and what a user would run instead.

    python benchmarks/bench_ops.py --threads 2 --save
    python benchmarks/bench_ops.py --device cuda --save
    python benchmarks/bench_ops.py --families linears --tokens 1 16
    python benchmarks/bench_ops.py --families linears --shapes "1B attention" "135M up" --dtypes float32

Weights are those of Llama-2-7B and Llama-3-8B, or of smaller models if asked for; the cases are `pyprune.speed`'s, the
rivals those of providers.py. The expected result is the op in plain torch and fp64. `hsm` has a script of its own, with
backward passes (bench_hsm.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import providers
import torch
from harness import Case, Contender, Session, failure, options
from providers import Provider, compiled, semi_structured
from torch import Tensor

from pyprune import ops, speed

SHAPES = {
    "attention": (4096, 4096),
    "down": (4096, 11008),
    "gate and up": (28672, 4096),
    "Qwen3-8B gate and up": (24576, 4096),
    "1B attention": (2048, 2048),
    "1B up": (5632, 2048),
    "1B down": (2048, 5632),
    "135M up": (1536, 576),
}
"""[out, in]: of Llama-2-7B, Llama-2-7B, and both halves of Llama-3-8B's MLP in one product, as of Qwen3-8B's;
TinyLlama-1.1B, SmolLM2."""
BOTH = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Family:
    """A family of `pyprune.speed`: on which of `SHAPES` it is measured, in which dtypes, unless asked otherwise."""

    shapes: tuple[str, ...] = ("down",)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)


FAMILIES = {
    "packing": Family(),
    "ranks": Family(dtypes=BOTH),
    "scores": Family(("attention", "down")),
    "optimizer": Family(dtypes=BOTH),
    "linears": Family(("attention", "down", "gate and up")),
    "selected": Family(),
    "solve": Family(),
}

OURS = {"nm_linear": "2:4", "bitmap_linear": "bitmap"}
"""What our contender is called, where that is not "pyprune"."""

RIVALS: dict[str, dict[str, Provider]] = {
    "nm_linear": {
        "dense": providers.eager,
        "dense fp32": providers.dense_fp32,
        "oneDNN": providers.onednn,
        "torch 2:4 CUTLASS": semi_structured("CUTLASS"),
        "torch 2:4 cuSPARSELt": semi_structured("CUSPARSELT"),
        "bitsandbytes 4-bit": providers.bitsandbytes,
    },
    "bitmap_linear": {
        "dense": providers.eager,
        "dense fp32": providers.dense_fp32,
        "oneDNN": providers.onednn,
        "torch CSR": providers.csr,
        "bitsandbytes 4-bit": providers.bitsandbytes,
    },
    "masked_linear": {
        "masked in torch": providers.masked,
        "compile": compiled(providers.masked),
        "dense": providers.masked_before,
    },
    "gathered_linear": {"dense": providers.scattered, "sliced copy": providers.sliced},
    "rank_mask": {"torch": providers.rank_mask, "compile": compiled(providers.rank_mask)},
    "lora_group_score": {
        "torch": providers.lora_score,
        "compile": compiled(providers.lora_score),
        "slabs of torch": providers.lora_score_in_slabs,
    },
    "nm_adamw_": {"plain torch": providers.plain_adamw, "compile": compiled(providers.plain_adamw)},
}
OTHERS: dict[str, Provider] = {"torch": providers.eager}
BOUNDS: dict[str, dict[str, Provider]] = {"nm_adamw_": {"fused AdamW": providers.fused_adamw}}
"""Work that is not the same, for orientation."""
QUANTIZED = {"bitsandbytes 4-bit": 0.2}
"""Of normally distributed weights with 4 bits, relative in the norm; about half of it is lost."""

UNCHECKED: dict[str, Callable[[Any], Callable[..., object]]] = {
    "nm_prune": lambda kernels: lambda scores, bits: kernels.nm_prune(scores, 2, 4, bits)[:2],
    "nm_compress": lambda kernels: lambda weight: kernels.nm_compress(weight, 2, 4)[:2],
    "transposable_prune": lambda kernels: lambda scores: kernels.transposable_prune(scores, None)[:2],
    "gathered_linear": lambda kernels: partial(kernels.gathered_linear, out_index=None, bias=None),
}
"""The kernels of ops whose checks read results back, which a CUDA graph cannot; these are measured by their kernels."""


def contest(case: speed.Case, prefix: str = "", without: Sequence[str] = ()) -> Case:
    """A case of `speed` with all its rivals but those named; the result expected is that of plain torch in fp64."""
    device = case.data[0].device
    wanted = {name: rival for name, rival in RIVALS.get(case.op, OTHERS).items() if name not in without}
    contenders, skipped = provided(wanted, case)
    run, graphs = case.ours, case.graphs
    if case.op in UNCHECKED:
        run, graphs = UNCHECKED[case.op](ops.choose(case.op, device, case.dtype)[0]), True
    contenders[OURS.get(case.op, "pyprune")] = providers.on(run, case.data)
    exact = case.eager(*(wide(part) for part in case.eager_data))
    return Case(
        case.op,
        prefix + case.label,
        contenders,
        case.nbytes,
        case.operations,
        case.dtype,
        expected=exact,  # type: ignore[arg-type]
        allowed=case.tolerance,
        roundings=QUANTIZED,
        graphs=graphs,
        skipped=skipped,
        bounds=provided(BOUNDS.get(case.op, {}), case)[0],
    )


def provided(wanted: dict[str, Provider], case: speed.Case) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders, and the reasons of those that there are not."""
    contenders: dict[str, Contender] = {}
    skipped: dict[str, str] = {}
    for name, provide in wanted.items():
        try:
            found = provide(case)
        except Exception as error:
            found = failure(error)
        if isinstance(found, str):
            skipped[name] = found
        else:
            contenders[name] = found
    return contenders, skipped


def wide(part: object) -> object:
    """Its own copy, in fp64 if it has fractions."""
    if not isinstance(part, Tensor):
        return part
    return part.to(torch.float64 if part.is_floating_point() else part.dtype, copy=True)


def cases(
    family: str,
    device: torch.device,
    tokens: Sequence[int],
    without: Sequence[str] = (),
    shapes: Sequence[str] = (),
    dtypes: Sequence[torch.dtype] = (),
) -> Iterator[Case]:
    """All cases of a family. Products are called by the layer that they are of."""
    for shape in shapes or FAMILIES[family].shapes:
        for dtype in dtypes or FAMILIES[family].dtypes:
            weight = speed.normal(*SHAPES[shape], device=device, dtype=dtype)
            prefix = f"{shape} " if family in ("linears", "selected") else ""
            for case in speed.FAMILIES[family](weight, tokens):
                yield contest(case, prefix, without)


def main() -> None:
    """Runs all families."""
    parser = options(__doc__, rounds=11, budget=30)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 2048])
    parser.add_argument("--without", nargs="+", default=[], metavar="RIVAL", help='such as "compile", which takes long')
    parser.add_argument("--shapes", nargs="+", default=[], choices=SHAPES, help="default: each family's own")
    parser.add_argument(
        "--dtypes", nargs="+", default=[], choices=[str(dtype).removeprefix("torch.") for dtype in BOTH]
    )
    arguments = parser.parse_args()
    session = Session(arguments)
    dtypes = [getattr(torch, name) for name in arguments.dtypes]
    for family in arguments.families:
        for case in cases(family, session.device, arguments.tokens, arguments.without, arguments.shapes, dtypes):
            session.run(case)


if __name__ == "__main__":
    main()
