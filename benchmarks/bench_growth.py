"""How time and memory grow with tokens, hidden size and layers, beside what arithmetic says; on a CPU, a few minutes.

    python benchmarks/bench_growth.py --save
    python benchmarks/bench_growth.py --scenarios prefill --tokens 512 2048 8192

One axis grows while the others stay at the second of their values. The exponent b of c size^b is fitted to the medians
by least squares of the logarithms; "within" is the root mean square of what the fit leaves, as a factor. The
predicted exponent is the same fit to a count at the same sizes: of operations (products, attention, solves), or of the
bytes read by a decoded token. Where a measured exponent is lower, fixed costs still count at these sizes: larger models
grow faster than measured here. All sizes of a scenario take turns, so that a busy machine slows all of them.

Memory is the peak above what is held between calls (weights, and optimiser states in training, are not in it), beside
a count of the largest tensors: what autograd keeps and the gradients, the cache, the calibration's hidden states, the
copies of a block's weights and the Gram matrices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from bench_pat_step import Tuning, give_back
from bench_serving import Decoding
from harness import Case, Contender, Session, options
from models import build, floating_point_operations
from results import Row
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaForCausalLM

from pyprune import PAT, ops
from pyprune.architectures import describe_blocks
from pyprune.blockwise import prune
from pyprune.evaluation import peak_memory
from pyprune.methods import find
from pyprune.methods.lora import LoRA
from pyprune.models import fast_dtype

AXES = ("tokens", "hidden", "layers")
VOCABULARY = 512
HEAD = 64  # channels of an attention head
TRAINED, CALIBRATED = 256, 128  # tokens of a window: only a prompt grows in length


@dataclass(frozen=True)
class Size:
    """Of a model and of what it is given."""

    tokens: int
    hidden: int
    layers: int

    def __str__(self) -> str:
        layers = f" L={self.layers}" if self.layers else ""
        return f"T={self.tokens} d={self.hidden}{layers} {fast_dtype()}"


@dataclass(frozen=True)
class Work:
    """A scenario at one size: a call, what its time should grow with (operations, or bytes), and the bytes of the
    largest tensors that it makes; `held` is the call whose peak counts, where that is another one."""

    call: Callable[[], object]
    count: int
    nbytes: int
    held: Callable[[], object] | None = None


@dataclass(frozen=True)
class Scenario:
    """What is measured; `times` scales the sizes asked for to those at which it takes long enough, layers to none
    where it has none."""

    make: Callable[[Size], Work]
    axes: tuple[str, ...] = AXES
    times: Size = Size(1, 1, 1)


@dataclass(frozen=True)
class Fit:
    """values = c sizes^exponent within a factor of 1 +- residual (root mean square)."""

    exponent: float
    residual: float


def fit(sizes: Sequence[float], values: Sequence[float]) -> Fit:
    """By least squares of the logarithms.

    Raises:
        ValueError: fewer than three sizes, which leave nothing to judge the fit by; values that have no logarithm.
    """
    if len(sizes) != len(values) or len(set(sizes)) < 3:
        raise ValueError(f"{len(set(sizes))} sizes for {len(values)} values; expected a value each for three or more")
    if min(*sizes, *values) <= 0:
        raise ValueError(f"the least size or value is {min(*sizes, *values)}; expected positive ones")
    x, y = (torch.tensor([math.log(v) for v in row], dtype=torch.float64) for row in (sizes, values))
    x, y = x - x.mean(), y - y.mean()
    exponent = (x @ y / (x @ x)).item()
    return Fit(exponent, math.expm1((y - exponent * x).square().mean().sqrt().item()))


# ------------------------------------------------------------------------------------------------------------ scenarios


def model_of(size: Size) -> LlamaForCausalLM:
    """A Llama with heads of 64 channels and an MLP of three times the hidden size."""
    heads = max(1, size.hidden // HEAD)
    return build(
        "toy",
        getattr(torch, fast_dtype()),
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=VOCABULARY,
    ).eval()


def tokens_of(size: Size, window: int) -> Tensor:
    """[tokens / window, window]."""
    return torch.randint(VOCABULARY, (size.tokens,)).view(-1, min(window, size.tokens))


def hsm(size: Size) -> Work:
    """Forward and backward of the op, its rank a twentieth of the hidden size as PAT has it."""
    tokens, hidden, rank = size.tokens, size.hidden, max(1, size.hidden // 20)
    shapes = ((tokens, hidden), (rank, hidden), (rank,), (hidden, rank), (hidden,))
    leaves = [torch.randn(shape).to(getattr(torch, fast_dtype())).requires_grad_() for shape in shapes]
    grad = torch.randn_like(leaves[0])

    def call() -> object:
        return torch.autograd.grad(ops.hsm(*leaves), leaves, grad)

    made = 2 * tokens * hidden + 2 * tokens * rank + 2 * hidden * rank  # y, h, l0 and their gradients
    return Work(call, floating_point_operations(call), made * grad.itemsize)


def training(size: Size, method: LoRA | PAT) -> Work:
    """A step on windows of 256 tokens."""
    ids = tokens_of(size, TRAINED)
    tuning = Tuning(model_of(size).train(), method, ids, 1_000_000)
    tuning.step()  # the optimiser has its moments now
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = tuning.model(input_ids=ids, labels=ids, use_cache=False).loss
    for parameter in tuning.model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    del loss
    gradients = sum(parameter.nbytes for parameter in tuning.trained)
    return Work(tuning.step, floating_point_operations(tuning.step), sum(kept.values()) + gradients)


def prefill(size: Size) -> Work:
    """One prompt, whose keys and values stay."""
    model, ids = model_of(size), tokens_of(size, size.tokens)

    @torch.inference_mode()
    def call() -> object:
        return model(input_ids=ids, use_cache=True, logits_to_keep=1)

    made = size.tokens * size.hidden * (2 * size.layers + 2 + 3 * 3)  # the cache, the residual stream, inside an MLP
    return Work(call, floating_point_operations(call), made * model.dtype.itemsize)


def decode(size: Size) -> Work:
    """A token behind `tokens` others; its memory is that of their cache."""
    model = model_of(size)
    decoding = Decoding(model, 1, size.tokens)
    cache = 2 * size.layers * size.tokens * size.hidden * model.dtype.itemsize
    return Work(decoding.step, decoding.bytes(), cache, lambda: Decoding(model, 1, size.tokens))


def one_shot(size: Size, method: str) -> Work:
    """A whole model, block by block, with windows of 128 tokens of calibration text."""
    model, batches = model_of(size), list(tokens_of(size, CALIBRATED).split(1))

    def call() -> object:
        return prune(model, find(method)(sparsity=0.5), batches)

    branches = describe_blocks(model).blocks[0].branches
    inputs = [linear.matrix.shape[1] for branch in branches for linear in (branch.reads[0], branch.write)]
    weights = [linear.matrix for branch in branches for linear in (*branch.reads, branch.write)]
    states, copies = size.tokens * size.hidden * model.dtype.itemsize, sum(weight.nbytes for weight in weights)
    operations = floating_point_operations(call)
    if method == "wanda":
        return Work(call, operations, states + copies + 4 * max(weight.numel() for weight in weights))
    # two Cholesky factors and an inverse for each Gram matrix; a column of a weight changes all columns behind it
    factors = sum(4 * width**3 // 3 for width in inputs)
    solves = sum(outputs * width**2 for outputs, width in (weight.shape for weight in weights))
    # the Gram matrix, the Hessian, its factor, and the inverse's
    return Work(call, operations + size.layers * (factors + solves), states + copies + 4 * 4 * max(inputs) ** 2)


SCENARIOS = {
    "hsm": Scenario(hsm, AXES[:2], Size(2, 4, 0)),
    "LoRA step": Scenario(lambda size: training(size, LoRA())),
    "PAT step": Scenario(lambda size: training(size, PAT(ratio=0.25, round_to=16))),
    "prefill": Scenario(prefill, times=Size(1, 2, 1)),
    "decoded token": Scenario(decode, times=Size(8, 2, 1)),
    "Wanda": Scenario(lambda size: one_shot(size, "wanda")),
    "SparseGPT": Scenario(lambda size: one_shot(size, "sparsegpt")),
}


# ---------------------------------------------------------------------------------------------------------- measurement


def peak(call: Callable[[], object]) -> int:
    """Bytes that a call takes above what is held before it."""
    give_back()
    with peak_memory() as before:
        pass
    with peak_memory() as after:
        call()
    if before.bytes is None or after.bytes is None:
        raise SystemExit("this system does not tell a process's memory")
    return after.bytes - before.bytes


def measure(name: str, values: dict[str, list[int]], session: Session) -> list[Row]:
    """All sizes of a scenario in turn; prints a line for each axis, and returns the rows of sizes and exponents."""
    scenario, benchmark = SCENARIOS[name], f"growth of {name}"
    scaled = {axis: [getattr(scenario.times, axis) * value for value in values[axis]] for axis in AXES}
    base = Size(**{axis: found[1] for axis, found in scaled.items()})
    along = {axis: [replace(base, **{axis: value}) for value in scaled[axis]] for axis in scenario.axes}
    works = {size: scenario.make(size) for sizes in along.values() for size in sizes}
    memory = {size: peak(work.held or work.call) / 2**20 for size, work in works.items()}
    case = Case(benchmark, str(base), {str(size): Contender(work.call) for size, work in works.items()})
    taken = session.measure(case)
    if case.skipped:
        raise SystemExit(f"{benchmark}: {case.skipped}")
    rows, unit = [], "ms CPU time" if session.clock is time.process_time else "ms"
    for size in works:
        times = taken[str(size)]
        rows.append(Row(benchmark, str(size), "pyprune", unit, *(1e3 * t for t in (times.p20, times.p50, times.p80))))
        rows.append(Row(benchmark, str(size), "pyprune", "MiB", *[memory[size]] * 3))
    for axis, sizes in along.items():
        label, cells = f"{axis} {scaled[axis][0]} to {scaled[axis][-1]} from {base}", []
        for what, found, counted in (
            ("time", [taken[str(size)].p50 for size in sizes], [works[size].count for size in sizes]),
            ("memory", [memory[size] for size in sizes], [works[size].nbytes for size in sizes]),
        ):
            measured, predicted = fit(scaled[axis], found), fit(scaled[axis], counted)
            figures = {"measured": measured.exponent, "predicted": predicted.exponent, "within": measured.residual}
            rows += [Row(benchmark, label, who, f"exponent of {what}", *[value] * 3) for who, value in figures.items()]
            cells.append(f"{measured.exponent:.2f} | {predicted.exponent:.2f} | {measured.residual:.0%}")
        print(f"| {name} | {axis} | {' | '.join(cells)} |", flush=True)
    return rows


def main() -> None:
    """Runs all scenarios."""
    parser = options(__doc__, rounds=3, devices=["cpu"])
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=SCENARIOS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments = parser.parse_args()
    session = Session(arguments)
    print("| | grows with | time, exponent | predicted | within | memory, exponent | predicted | within |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for name in arguments.scenarios:
        session.keep(measure(name, {axis: getattr(arguments, axis) for axis in AXES}, session))


if __name__ == "__main__":
    main()
