"""Measures which kernel, in how many parts, multiplies fastest by a packed weight on this GPU, and keeps the table.

    python benchmarks/tune_sparse_gemm.py --save

For every op, size of an element and number of tokens, each plan runs on the layers of an 8B Llama at 50 % sparsity; the
best one has the least product of its times over the layers. Tokens from which expanding the weight is faster end the
table; where the build has CUTLASS's 2:4 product, from how many tokens on it beats both is measured too. Weights are
cold: copies of them, together four times the L2 cache, take turns. Printed beside each row: its gain over torch's dense
product and over expanding (above 1 is faster); at 50 % the formats allow 1.78x dense. With --save the table goes to
pyprune/_cuda/sparse_gemm.json under the device's name (see pyprune/_cuda/plans.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyprune import _native, ops, timing
from pyprune._cuda import plans, sparse_gemm

LAYERS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
"""[out, in] of an 8B Llama's products: queries, keys and values; attention's output; gate and up; down."""
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CUTLASS_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096)
BLOCKS = (1, 2, 3, 4, 5, 6, 8)
PLAIN_TOKENS = 16
"""Beyond them the plain kernel, which reads the weight once for four tokens, is not tried."""
DEVICE = torch.device("cuda")
DTYPES = {"16-bit": torch.bfloat16, "32-bit": torch.float32}

Choice = tuple[str, int]
"""A kernel and the blocks that keep a multiprocessor busy: what a row of the table has beside its tokens."""
Measure = Callable[[str, torch.dtype, tuple[int, int], int, "Choice | str"], float]
"""Seconds of op, dtype, layer, tokens, and a choice, "expand", "dense" or "cutlass"."""
Times = dict[tuple[int, "Choice | str"], list[float]]
"""Of tokens and a choice: seconds, one value a layer."""


def choices(size: str) -> list[Choice]:
    """The plans to try."""
    kernels = ("tensor cores", "plain") if size == "16-bit" else ("plain",)
    return [(kernel, blocks) for kernel in kernels for blocks in BLOCKS]


@dataclass(frozen=True)
class Row:
    """The best choice for one number of tokens, and its gain over the dense product and over expanding."""

    tokens: int
    choice: Choice
    over_dense: float
    over_expanding: float


def mean_ratio(numerators: list[float], denominators: list[float]) -> float:
    """The geometric mean of their ratios."""
    ratios = [log(a / b) for a, b in zip(numerators, denominators, strict=True)]
    return exp(sum(ratios) / len(ratios))


def all_times(measure: Measure, op: str, size: str) -> Times:
    """Seconds over the layers of every plan that makes sense, of expanding and of torch's dense product. Layers are the
    outermost loop, so that the copies of a weight are made once."""
    found: Times = {}
    for layer in LAYERS:
        for choice in (*choices(size), "expand", "dense"):
            for tokens in TOKENS:
                if isinstance(choice, str) or choice[0] == "tensor cores" or tokens <= PLAIN_TOKENS:
                    found.setdefault((tokens, choice), []).append(measure(op, DTYPES[size], layer, tokens, choice))
    return found


def best(times: Times, tokens: int) -> Row | None:
    """The plan with the least product of its times over the layers; None where none was tried."""
    plans_tried = [choice for count, choice in times if count == tokens and not isinstance(choice, str)]
    if not plans_tried:
        return None
    winner = min(plans_tried, key=lambda choice: sum(map(log, times[tokens, choice])))
    over = [mean_ratio(times[tokens, other], times[tokens, winner]) for other in ("dense", "expand")]
    return Row(tokens, winner, *over)


def table_rows(rows: list[Row]) -> list[list[Any]]:
    """The rows of the table: up to where expanding wins, those with the same choice as one."""
    table: list[list[Any]] = []
    for row in rows:
        if row.over_expanding < 1:
            break
        if table and tuple(table[-1][1:]) == row.choice:
            table[-1][0] = row.tokens
        else:
            table.append([row.tokens, *row.choice])
    return table


def cutlass_tokens(measure: Measure, report: Callable[[str], object], rows: list[Row]) -> int | None:
    """The tokens from which on CUTLASS's product is never slower than expanding, nor than the best plan where one was
    tried; None if there are none. `rows`: those plans."""
    least = None
    over_expanding_by_plan = {row.tokens: row.over_expanding for row in rows}
    for tokens in reversed(CUTLASS_TOKENS):
        times = {
            choice: [measure("nm_linear", torch.bfloat16, layer, tokens, choice) for layer in LAYERS]
            for choice in ("dense", "expand", "cutlass")
        }
        over_dense = mean_ratio(times["dense"], times["cutlass"])
        over_expanding = mean_ratio(times["expand"], times["cutlass"])
        report(f"nm_linear by CUTLASS, {tokens} tokens: {over_dense:.2f}x dense, {over_expanding:.2f}x expanding")
        if over_expanding < max(1.0, over_expanding_by_plan.get(tokens, 0.0)):
            break
        least = tokens
    return least


def tune(measure: Measure, cutlass: bool, report: Callable[[str], object] = print) -> dict[str, Any]:
    """The device's table; without CUTLASS in the build its threshold stays that of "default"."""
    table: dict[str, Any] = {}
    found: dict[str, list[Row]] = {}
    for op in ("nm_linear", "bitmap_linear"):
        table[op] = {}
        for size in DTYPES:
            times = all_times(measure, op, size)
            rows = [row for row in (best(times, tokens) for tokens in TOKENS) if row is not None]
            for row in rows:
                kernel, blocks = row.choice
                report(
                    f"{op:14} {size} {row.tokens:4} tokens: {kernel}, {blocks} blocks; "
                    f"{row.over_dense:.2f}x dense, {row.over_expanding:.2f}x expanding"
                )
            table[op][size] = table_rows(rows)
            found[f"{op} {size}"] = rows
    default = plans.tables()["default"]["cutlass_tokens"]
    table["cutlass_tokens"] = cutlass_tokens(measure, report, found["nm_linear 16-bit"]) if cutlass else default
    return table


class OnDevice:
    """Measures on the current GPU, keeping the copies of one layer at a time."""

    def __init__(self, rounds: int = 7) -> None:
        self.rounds = rounds
        self.key: object = None
        self.weights: list[tuple[Tensor, ...]] = []
        self.found: dict[tuple[int, plans.Plan | str], float] = {}
        """Of tokens and a plan: several numbers of blocks may come to the same one."""

    def __call__(self, op: str, dtype: torch.dtype, layer: tuple[int, int], tokens: int, choice: Choice | str) -> float:
        key = (op, dtype, layer, choice == "dense")
        if key != self.key:
            self.key, self.weights, self.found = key, [], {}
            self.weights = self._copies(op, dtype, layer, choice == "dense")
        plan = self._plan(choice, layer, tokens)
        if (tokens, plan) not in self.found:
            x = torch.randn(tokens, layer[1], device="cuda", dtype=dtype)
            self.found[tokens, plan] = self._time(lambda weight: self._multiply(op, x, weight, layer, plan))
        return self.found[tokens, plan]

    def _plan(self, choice: Choice | str, layer: tuple[int, int], tokens: int) -> plans.Plan | str:
        if isinstance(choice, str):
            return choice
        kernel, blocks = choice
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        shape = (tokens, layer[1], layer[0])
        return plans.Plan(kernel == "tensor cores", plans.splits(blocks, processors, shape))

    def _copies(self, op: str, dtype: torch.dtype, layer: tuple[int, int], dense: bool) -> list[tuple[Tensor, ...]]:
        weight = torch.randn(layer, device="cuda", dtype=dtype)
        packed: tuple[Tensor, ...] = (weight,)
        if not dense and op == "nm_linear":
            bits, _ = ops.nm_prune(weight.abs(), 2, 4)
            packed = ops.nm_compress(ops.masked_weight(weight, bits), 2, 4)
        elif not dense:
            packed = ops.bitmap_pack(torch.where(torch.rand_like(weight) < 0.5, 0, weight))
        size = sum(tensor.nbytes for tensor in packed)
        return [tuple(tensor.clone() for tensor in packed) for _ in range(timing.copies_for(size, DEVICE))]

    def _multiply(
        self, op: str, x: Tensor, weight: tuple[Tensor, ...], layer: tuple[int, int], plan: plans.Plan | str
    ) -> object:
        if plan == "dense":
            return linear(x, weight[0])
        with (
            patch.object(sparse_gemm, "plan", lambda *arguments: None if isinstance(plan, str) else plan),
            patch.object(sparse_gemm, "suits_cutlass", lambda *arguments: plan == "cutlass"),
        ):
            return getattr(ops, op)(x, *weight, *((2, 4) if op == "nm_linear" else layer))

    def _time(self, run: Callable[[tuple[Tensor, ...]], object]) -> float:
        """Median seconds of one product, each on the next copy of the weight."""
        weights = self.weights * -(-20 // len(self.weights))  # so many in a graph that its start does not count
        found = timing.interleave({"": lambda i: run(weights[i])}, self.rounds, DEVICE, {"": len(weights)})[""]
        if not found.graph:
            raise SystemExit(f"tune_sparse_gemm.py: launches would be timed: {found.reason}")
        return found.p50


def save(name: str, table: dict[str, Any]) -> None:
    """Puts the table among the others, a line for each op."""
    tables = {**json.loads(plans.TABLES.read_text()), name: table}
    kinds = []
    for kind, of_kind in tables.items():
        lines = ",\n".join(f"    {json.dumps(op)}: {json.dumps(rows)}" for op, rows in of_kind.items())
        kinds.append(f"  {json.dumps(kind)}: {{\n{lines}\n  }}")
    plans.TABLES.write_text("{\n" + ",\n".join(kinds) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="repetitions of which the median counts")
    parser.add_argument("--save", action="store_true", help="add the table to pyprune/_cuda/sparse_gemm.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune_sparse_gemm.py: torch sees no CUDA device; run it where there is one")
    chosen, why = ops.choose("nm_linear", torch.device("cuda"), torch.bfloat16)
    if chosen.name != "cuda":
        raise SystemExit(f"tune_sparse_gemm.py: the CUDA kernels are not in use: {why}")
    table = tune(OnDevice(arguments.rounds), cutlass=hasattr(_native.cuda, "nm_linear_cutlass"))
    print(json.dumps(table))
    if arguments.save:
        save(torch.cuda.get_device_name(), table)


if __name__ == "__main__":
    main()
