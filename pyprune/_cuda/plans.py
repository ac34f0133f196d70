"""Which kernel multiplies by a packed weight, and into how many parts it cuts the sum: a table for each kind of GPU.

`sparse_gemm.json` holds the tables, by the device's name as torch tells it; `benchmarks/tune_sparse_gemm.py` measures
one and adds it. A kind that is not there takes "default": what the counts of docs/kernels.md suggest, not a
measurement. For each op and size of an element a table has rows

    [up to so many tokens, a kernel ("plain", "tensor cores", "two tokens"), blocks for each multiprocessor]

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
"""More than an H100 ever gained from: every part is written and read once more."""
START, SHORT = 0.25, 0.3
"""What a block costs beside its stages, in stages, and how far its number may stay under the one asked for. They choose
within 1 % of the best of 1 to 16 parts for 1 to 4 tokens, on an H100 over five layers (docs/kernels.md)."""
KERNELS = {"plain": 0, "tensor cores": 1, "two tokens": 2}
"""SparseKernel of csrc/sparse_gemm.h."""


@dataclass(frozen=True)
class Plan:
    """SparsePlan of csrc/sparse_gemm.h."""

    kernel: str
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
            return Plan(kernel, splits(blocks, processors, inputs, outputs))
    return None


def suits_cutlass(x: Tensor, outputs: int) -> bool:
    """Whether CUTLASS's 2:4 product takes this one (csrc/cutlass/sparse_gemm.h) and is expected to be faster."""
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) != (9, 0):
        return False
    tokens, inputs = x.shape
    least = tables()[machine(x.device)[0]]["cutlass_tokens"]
    takes = x.dtype in (torch.bfloat16, torch.float16) and inputs % 16 == 0 and outputs % 8 == 0 and outputs > 0
    return takes and least is not None and tokens >= least


def splits(blocks: int, processors: int, inputs: int, outputs: int) -> int:
    """Parts of the sum that give each multiprocessor about so many blocks, as far as there are stages; of those the
    number that leaves the busiest one the least to do. A block costs START of a stage beside its stages."""
    stages, tiles = max(1, -(-inputs // STAGE)), max(1, -(-outputs // ROWS))
    most = min(stages, MOST_SPLITS)
    enough = [parts for parts in range(1, most + 1) if tiles * parts >= (blocks - SHORT) * processors] or [most]
    return min(enough, key=lambda parts: -(-tiles * parts // processors) * (stages / parts + START))
