"""Prefill and decoding of an exported model, 25 % of its hidden channels cut, against the dense one.

    python benchmarks/bench_export.py --threads 2 --save

The weights are random, which changes no time. Before anything is timed, the logits of the exported model must be those
of the dense one with the same channels masked. The models take turns within one process.

Two limits stand beside each ratio. For a prefill, bound by arithmetic: that of the blocks' parameters, and that of all
operations counted, which has attention's scores and sums in it, and these do not shrink. For decoding, bound by
memory: that of the bytes of blocks and head.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from models import SHAPES, build, check_equal, conditions, floating_point_operations, logits, masked, percentiles
from results import Row, append
from torch import nn
from transformers import AutoModelForCausalLM

from pyprune import surgery
from pyprune.evaluation import latency, speedup

RATIO, GOAL = 0.25, 1.28
GOAL_SHAPE = "llama-2048"  # the goal is one for its hidden size


def export(shape: str, layers: int, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """(dense, pruned): the pruned one went through a checkpoint on disk and is stock."""
    make = partial(build, shape, dtype, num_hidden_layers=layers)
    dense = make().eval()
    keep = torch.arange(round((1 - RATIO) * dense.config.hidden_size))
    with tempfile.TemporaryDirectory() as folder:
        surgery.export(surgery.slice_hidden(make(), keep), None, Path(folder) / "model")
        pruned = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype="auto").eval()
    prompt = torch.randint(dense.config.vocab_size, (2, 32))
    with masked(dense, keep):
        expected = logits(dense, prompt)
    check_equal("exported against masked", logits(pruned, prompt), expected, dtype)
    return dense, pruned


def prefill(model: nn.Module, tokens: int) -> Callable[[], object]:
    """One prefill as `evaluation.latency` does it."""

    @torch.no_grad()
    def step() -> object:
        return model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=True, logits_to_keep=1)

    return step


def run(dense: nn.Module, pruned: nn.Module, case: str, tokens: int, new_tokens: int, repeats: int) -> list[Row]:
    """Measures one prompt length, prints its lines, and returns them."""
    models = {"dense": dense, "pruned": pruned}
    counted = {name: floating_point_operations(prefill(model, tokens)) for name, model in models.items()}
    measured = latency(models, tokens, new_tokens, repeats)
    ratios = speedup(dense, pruned, measured)
    case = f"{case} prompt={tokens}"
    print(f"\nexport, {case}, {repeats} repeats of {new_tokens} new tokens")
    limits = {
        "prefill": {"parameters": ratios.prefill_limit, "operations": counted["dense"] / counted["pruned"]},
        "decode": {"bytes": ratios.decode_limit},
    }
    rows = []
    for phase, unit in (("prefill", "ms"), ("decode", "ms a token")):
        bounds = ", ".join(f"{value:.2f}x by {what}" for what, value in limits[phase].items())
        print(f"  {phase:7} {getattr(ratios, phase):.2f}x dense   (limit {bounds})")
        times = {
            name: percentiles([1e3 * s for s in getattr(found, f"{phase}_all")]) for name, found in measured.items()
        }
        least = min(limits[phase].values())
        times["limit"] = tuple(time / least for time in times["dense"])
        for name, (p20, p50, p80) in times.items():
            print(f"    {name:7} {p50:9.2f} {unit}   ({p20:.2f} to {p80:.2f})")
            rows.append(Row(f"export {phase}", case, name, unit, p20, p50, p80))
    return rows


def main() -> None:
    """Runs all combinations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default=GOAL_SHAPE, choices=SHAPES)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--save", action="store_true", help="append to results.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(conditions(arguments.threads))
    rows = []
    for dtype in arguments.dtypes:
        dense, pruned = export(arguments.shape, arguments.layers, getattr(torch, dtype))
        case = f"{arguments.shape} {arguments.layers} layers {dtype} cut {RATIO:.0%}"
        for tokens in arguments.prompts:
            rows += run(dense, pruned, case, tokens, arguments.new_tokens, arguments.repeats)
        del dense, pruned
        gc.collect()
    if arguments.shape == GOAL_SHAPE:
        print(f"\nThe goal for the prefill is {GOAL}x.")
    if arguments.save:
        append(rows)


if __name__ == "__main__":
    main()
