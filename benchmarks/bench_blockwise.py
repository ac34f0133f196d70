"""One-shot pruning, block by block: calibration passes against the plain forward, seconds and peak memory per block.

    python benchmarks/bench_blockwise.py --shape llama-7b --methods wanda --save

Random weights and tokens, which change no time. A calibration pass reads hidden states from host memory, runs one
block and gathers a statistic; the plain forward is the same block on the same batches, called by hand. They take turns
within one process. A machine that others use lends its cores by turns, so on a CPU the seconds are those of the
processor; on a GPU those of the clock.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from models import build, conditions, percentiles
from results import Row, append
from torch import Tensor, nn

from pyprune.architectures import describe_blocks
from pyprune.blockwise import Block, prune
from pyprune.calibration import Gram, InputNorm
from pyprune.evaluation import peak_memory
from pyprune.methods import ONE_SHOT, find
from pyprune.methods.magnitude import Magnitude

GOAL = 0.9  # of the plain forward's speed, for a pass that gathers norms


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Processor time on a CPU, wall time on a GPU."""
    if device.type == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def unit_of(model: nn.Module) -> str:
    """Of `seconds`."""
    return "CPU s" if next(model.parameters()).is_cpu else "s"


class Passes:
    """A step of the engine that times passes over the first block."""

    def __init__(self, rounds: int) -> None:
        self.rounds, self.seconds = rounds, {}  # type: tuple[int, dict[str, list[float]]]

    def __call__(self, block: Block) -> None:
        """Times each contender in turn, after one round that warms up."""
        if block.index:
            return
        plain = [(block.inputs[i].clone(), *block._calls[i]) for i in range(len(block))]
        contenders: dict[str, Callable[[], object]] = {
            "plain forward": lambda: [block.module(x, *args, **kwargs) for x, args, kwargs in plain],
            "replay": lambda: [block.forward(i) for i in range(len(block))],
            "norms": lambda: block.statistics(InputNorm),
            "Gram matrices": lambda: block.statistics(Gram),
        }
        for round_ in range(self.rounds + 1):
            for name, step in contenders.items():
                taken = seconds(step, block.inputs.device)
                if round_:
                    self.seconds.setdefault(name, []).append(taken)


def passes(model: nn.Module, batches: list[Tensor], case: str, rounds: int) -> list[Row]:
    """Tokens per second of each kind of pass."""
    step, tokens = Passes(rounds), sum(ids.numel() for ids in batches)
    method = Magnitude(sparsity=0.5)
    type(method).calibrated = True  # so that it is shown activations
    try:
        prune(model, method, batches, then=[step])
    finally:
        type(method).calibrated = False
    rows, unit = [], "tokens/" + unit_of(model)
    for name, taken in step.seconds.items():
        ratio = sorted(taken)[len(taken) // 2] / sorted(step.seconds["plain forward"])[len(taken) // 2]
        note = f" (goal {GOAL})" if name == "norms" else ""
        print(f"  {name}: {1 / ratio:.2f} of the plain forward's speed{note}")
        rows.append(Row("calibration pass", case, name, unit, *percentiles([tokens / value for value in taken])))
    return rows


def blocks(model: nn.Module, batches: list[Tensor], case: str, name: str) -> list[Row]:
    """Seconds for each block of a method with all its passes, and the peak memory of the whole."""
    device = next(model.parameters()).device
    with peak_memory(device) as peak:
        taken = seconds(lambda: prune(model, find(name)(), batches), device) / len(describe_blocks(model).blocks)
    print(f"  {name}: {taken:.2f} {unit_of(model)} per block, peak {(peak.bytes or 0) / 2**30:.2f} GiB")
    rows = [Row("one-shot block", case, name, unit_of(model), taken, taken, taken)]
    if peak.bytes is not None:
        gigabytes = peak.bytes / 2**30
        rows.append(Row("one-shot peak memory", case, name, "GiB", gigabytes, gigabytes, gigabytes))
    return rows


def main() -> None:
    """Measures, and keeps the rows with --save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--methods", nargs="*", default=["wanda", "sparsegpt"], choices=list(ONE_SHOT))
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", action="store_true", help="append to results.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(conditions(arguments.threads))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = f"{arguments.shape}, {arguments.windows}x{arguments.window} tokens, {arguments.dtype}"

    def make() -> nn.Module:
        return build(arguments.shape, getattr(torch, arguments.dtype), num_hidden_layers=arguments.layers).to(device)

    model = make()
    vocabulary = model.config.vocab_size  # type: ignore[union-attr]
    batches = list(torch.randint(vocabulary, (arguments.windows, arguments.window)).split(1))
    rows = passes(model, batches, case, arguments.rounds) if arguments.rounds else []
    for name in arguments.methods:
        del model
        model = make()
        rows += blocks(model, batches, case, name)
    if arguments.save:
        append(rows, device)


if __name__ == "__main__":
    main()
