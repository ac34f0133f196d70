"""Which kernel multiplies by a packed weight, and into how many parts it cuts the sum: a table for each kind of GPU.

`sparse_gemm.json` holds the tables, by the device's name as torch tells it; `benchmarks/tune_sparse_gemm.py` measures
one and adds it. A kind that is not there takes "default": what the counts of docs/kernels.md suggest, not a
measurement. For each op and size of an element a table has rows

    [up to so many tokens, "tensor cores" or "plain", blocks that keep a multiprocessor busy]

with tokens rising. Above the last row the weight is expanded and multiplied by torch; or, 2:4 on sm_90a where the build
has it, given to CUTLASS, from "cutlass_tokens" on (null for never).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLES = Path(__file__).with_name("sparse_gemm.json")
ROWS = 64
"""Outputs of a block (csrc/sparse_gemm.cu)."""
STAGE = 128
"""Inputs of a stage, the least that a part has (csrc/sparse_gemm.cu)."""
MOST_SPLITS = 16
"""More than an H100 ever gained from."""
RESIDENT = 6
"""Blocks that a multiprocessor works on at a time; some kernels find room for fewer."""
START = 0.2
"""What a block costs beside its stages, in stages."""
SUM_COST = 1 / 576
"""What a part of one result costs, in stages of a multiprocessor. Its 8 bytes, written and read, are 1 / 1152 of a
packed stage; twice that agrees best with an H100."""


@dataclass(frozen=True)
class Plan:
    """SparsePlan of csrc/sparse_gemm.h."""

    tensor_cores: bool
    splits: int


@cache
def tables() -> dict[str, Any]:
    """Device name -> op -> "16-bit" or "32-bit" -> rows; and "cutlass_tokens"."""
    return json.loads(TABLES.read_text())


@cache
def machine(device: torch.device) -> tuple[str, int]:
    """The name that has a table, or "default", and the number of multiprocessors."""
    if device.type != "cuda":  # The tests' emulator, which runs the kernels on tensors of the CPU.
        return "default", 4
    properties = torch.cuda.get_device_properties(device)
    return properties.name if properties.name in tables() else "default", properties.multi_processor_count


def plan(op: str, x: Tensor, outputs: int) -> Plan | None:
    """How to multiply x [tokens, inputs] by a weight of so many outputs, or None for expanding it."""
    tokens, inputs = x.shape
    kind, processors = machine(x.device)
    size = "32-bit" if x.dtype == torch.float32 else "16-bit"
    for most_tokens, kernel, blocks in tables()[kind][op][size]:
        if tokens <= most_tokens:
            return Plan(kernel == "tensor cores", splits(blocks, processors, (tokens, inputs, outputs)))
    return None


def suits_cutlass(x: Tensor, outputs: int) -> bool:
    """Whether CUTLASS's 2:4 product takes this one (csrc/cutlass/sparse_gemm.h) and is expected to be faster."""
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) != (9, 0):
        return False
    tokens, inputs = x.shape
    least = tables()[machine(x.device)[0]]["cutlass_tokens"]
    takes = x.dtype in (torch.bfloat16, torch.float16) and inputs % 16 == 0 and outputs % 8 == 0 and outputs > 0
    return takes and least is not None and tokens >= least


@cache
def splits(blocks: int, processors: int, shape: tuple[int, int, int]) -> int:
    """Into how many parts to cut the sums of a product of (tokens, inputs, outputs), the fewest that cost least.

    Counted are the stages that a multiprocessor works off one after the other: those of all its blocks while there are
    enough of them; the last ones, if fewer than `blocks`, take as long as so many, because the time is then that from
    memory. On an H100 it chooses within 2 % of the best of 1 to 16 parts (docs/kernels.md).
    """
    tokens, inputs, outputs = shape
    stages, tiles = max(1, -(-inputs // STAGE)), max(1, -(-outputs // ROWS))

    def cost(parts: int) -> float:
        rounds, last = divmod(tiles * parts, RESIDENT * processors)
        worked_off = rounds * RESIDENT + (max(-(-last // processors), blocks) if last else 0)
        sums = parts * tokens * outputs / processors * SUM_COST if parts > 1 else 0
        return round(worked_off * (stages / parts + START) + sums, 3)

    return min(range(1, min(stages, MOST_SPLITS) + 1), key=cost)
