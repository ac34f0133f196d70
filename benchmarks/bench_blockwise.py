"""One-shot pruning, block by block: calibration passes against the plain forward, seconds and peak memory per block.

    python benchmarks/bench_blockwise.py --shape llama-7b --methods wanda --save

Random weights and tokens, which change no time. A calibration pass reads hidden states from host memory, runs one
block and gathers a statistic; the plain forward is the same block on the same batches, called by hand. They take turns
within one process. A machine that others use lends its cores by turns, so on a CPU the seconds are those of the
processor; on a GPU those of the clock. LLM-Pruner, which takes the model as a whole, is counted by its blocks too.
"""

from __future__ import annotations

import time

import torch
from harness import Case, Contender, Samples, Session, options
from models import build
from results import Row
from torch import Tensor, nn

from pyprune import timing
from pyprune.architectures import describe_blocks
from pyprune.blockwise import Block, prune
from pyprune.calibration import Gram, InputNorm
from pyprune.evaluation import peak_memory
from pyprune.methods import ONE_SHOT, find
from pyprune.methods.magnitude import Magnitude

METHODS = [*ONE_SHOT, "llm-pruner"]
GOAL = 0.9  # of the plain forward's speed, for a pass that gathers norms


class Passes:
    """A step of the engine that times passes over the first block."""

    def __init__(self, session: Session, case: str) -> None:
        self.session, self.case, self.found = session, case, dict[str, Samples]()

    def __call__(self, block: Block) -> None:
        """All kinds in turn."""
        if block.index:
            return
        plain = [(block.inputs[i].clone(), *block._calls[i]) for i in range(len(block))]
        contenders = {
            "plain forward": Contender(lambda: [block.module(x, *args, **kwargs) for x, args, kwargs in plain]),
            "replay": Contender(lambda: [block.forward(i) for i in range(len(block))]),
            "norms": Contender(lambda: block.statistics(InputNorm)),
            "Gram matrices": Contender(lambda: block.statistics(Gram)),
        }
        self.found = self.session.measure(Case("calibration pass", self.case, contenders, graphs=False))


def unit_of(session: Session) -> str:
    """Seconds of the processor, or of the clock."""
    return "CPU s" if session.clock is time.process_time else "s"


def passes(model: nn.Module, batches: list[Tensor], case: str, session: Session) -> None:
    """Tokens per second of each kind of pass."""
    step, tokens = Passes(session, case), sum(ids.numel() for ids in batches)
    method = Magnitude(sparsity=0.5)
    type(method).calibrated = True  # so that it is shown activations
    try:
        prune(model, method, batches, then=[step])
    finally:
        type(method).calibrated = False
    print(f"\ncalibration pass, {case}")
    rows, unit, plain = [], "tokens/" + unit_of(session), step.found["plain forward"]
    for name, taken in step.found.items():
        note = f" (goal {GOAL})" if name == "norms" else ""
        print(f"  {name}: {plain.p50 / taken.p50:.2f} of the plain forward's speed{note}")
        rates = Samples(tuple(tokens / seconds for seconds in taken.seconds))
        rows.append(Row("calibration pass", case, name, unit, rates.p20, rates.p50, rates.p80))
    session.keep(rows)


def blocks(model: nn.Module, batches: list[Tensor], case: str, name: str, session: Session) -> None:
    """Seconds for each block of a method with all its passes, and the peak memory of the whole."""
    # beside a large embedding a few blocks cannot spare a quarter of the parameters, and the time is that of the scores
    options = {} if name in ONE_SHOT else {"target": "params=0.9"}
    count, method = len(describe_blocks(model).blocks), find(name)(**options)
    start = timing.now(session.device, session.clock)
    with peak_memory(session.device) as peak:
        if name in ONE_SHOT:
            prune(model, method, batches)
        else:
            method.cut(model, batches)
    taken = (timing.now(session.device, session.clock) - start) / count
    print(f"  {name}: {taken:.2f} {unit_of(session)} per block, peak {(peak.bytes or 0) / 2**30:.2f} GiB")
    rows = [Row("one-shot block", case, name, unit_of(session), taken, taken, taken)]
    if peak.bytes is not None:
        gigabytes = peak.bytes / 2**30
        rows.append(Row("one-shot peak memory", case, name, "GiB", gigabytes, gigabytes, gigabytes))
    session.keep(rows)


def main() -> None:
    """Measures, and keeps the rows with --save."""
    parser = options(__doc__, rounds=5)
    parser.set_defaults(cpu_time=not torch.cuda.is_available(), device="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--methods", nargs="*", default=["wanda", "sparsegpt", "llm-pruner"], choices=METHODS)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    session = Session(arguments)
    case = f"{arguments.shape}, {arguments.windows}x{arguments.window} tokens, {arguments.dtype}"

    def make() -> nn.Module:
        dtype = getattr(torch, arguments.dtype)
        return build(arguments.shape, dtype, num_hidden_layers=arguments.layers).to(session.device)

    model = make()
    vocabulary = model.config.vocab_size  # type: ignore[union-attr]
    batches = list(torch.randint(vocabulary, (arguments.windows, arguments.window)).split(1))
    if arguments.rounds:
        passes(model, batches, case, session)
    for name in arguments.methods:
        del model
        model = make()
        blocks(model, batches, case, name, session)


if __name__ == "__main__":
    main()
