"""Time and memory of a training step: PEFT LoRA, PAT before its milestone, and after it with and without compaction.

    python benchmarks/bench_pat_step.py --threads 2 --save
    python benchmarks/bench_pat_step.py --device cuda --save              all 22 blocks of TinyLlama's shape, in bf16

LoRA gets the rank with which it trains as many parameters as PAT's LoRA and HSMs (the mask, or the subspace that the
learned basis moves, comes on top). All contenders live in one process and take turns, step by step; each step is
forward, backward, clipping, AdamW, and PAT's own callbacks, called by the Trainer's own handler at the moments at which
the Trainer calls them. Before anything is timed, the logits of PAT at its start must be LoRA's, and those after
compaction the masked model's. Weights and tokens are random, which changes no time. Peak memory is that of a fresh
process for each contender, on a GPU that of the allocator, above what is held without a model.

The limit is the ratio of the floating-point operations, counted while the step runs: what a step would take if all of
its time were matrix products at the same speed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from harness import Case, Contender, Samples, Session, options
from models import SHAPES, batch_of, build, check_equal, floating_point_operations, logits
from results import Row
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DefaultFlowCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from pyprune import PAT
from pyprune.architectures import describe
from pyprune.evaluation import peak_memory
from pyprune.methods import Method
from pyprune.methods.lora import LoRA

CONTENDERS = ("lora", "before", "masked", "compact")
GOALS = {"before": ("lora", 1.15), "compact": ("before", 1 / 1.15)}  # at most so much of the other's time
MEBIBYTE = 1 << 20
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """One model and batch of a benchmark of steps. `layers`: how many blocks, None for the shape's own. `threads`: of
    the processes that measure memory."""

    shape: str
    dtype: str
    tokens: int
    window: int
    layers: int | None = None
    device: torch.device = CPU
    threads: int = 1

    def __str__(self) -> str:
        return f"{self.title()} batch={self.tokens // self.window}x{self.window}"

    def title(self) -> str:
        """The model."""
        blocks = f" {self.layers} blocks" if self.layers else ""
        return f"{self.shape}{blocks} {self.dtype}"

    def model(self) -> nn.Module:
        """A stock model, made where it is used."""
        changes = {"num_hidden_layers": self.layers} if self.layers else {}
        with self.device:
            return build(self.shape, getattr(torch, self.dtype), **changes)

    def ids(self) -> Tensor:
        """The batch [tokens / window, window]."""
        return batch_of(self.shape, self.tokens, self.window).to(self.device)


@dataclass(frozen=True)
class PatSetting(Setting):
    """With the basis of PAT."""

    basis: str = "identity"

    def __str__(self) -> str:
        return f"{self.title()} basis={self.basis} batch={self.tokens // self.window}x{self.window}"


def step_options(parser: argparse.ArgumentParser) -> None:
    """What the command lines of benchmarks of steps share; `settings` reads it."""
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: on a GPU llama-2048 with 22 blocks")
    parser.add_argument("--layers", type=int, help="blocks of them")
    parser.add_argument("--dtypes", nargs="+", help="default: bfloat16 float32, on a GPU bfloat16")
    parser.add_argument("--tokens", type=int, help="in a step (default: 1024, on a GPU 8192)")
    parser.add_argument("--window", type=int, help="default: 256, on a GPU 512")


def settings(arguments: argparse.Namespace, session: Session, *shapes: str) -> Iterator[Setting]:
    """One for each shape and dtype; `shapes`: those of a CPU, where none is asked for."""
    gpu = session.device.type == "cuda"
    layers = arguments.layers or (22 if gpu and arguments.shapes is None else None)
    tokens, window = (8192, 512) if gpu else (1024, 256)
    batch = (arguments.tokens or tokens, arguments.window or window)
    for shape in arguments.shapes or (["llama-2048"] if gpu else shapes):
        for dtype in arguments.dtypes or (["bfloat16"] if gpu else ["bfloat16", "float32"]):
            yield Setting(shape, dtype, *batch, layers, session.device, arguments.threads)


class Tuning:
    """A model in training. Steps are the Trainer's, without its data loading and logging."""

    def __init__(self, model: nn.Module, method: Method, ids: Tensor, total_steps: int) -> None:
        self.ids, self.method = ids, method
        torch.manual_seed(0)
        self.model = method.prepare(model, [ids]).train()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        callbacks = [DefaultFlowCallback(), *method.callbacks()]
        self.events = CallbackHandler(callbacks, self.model, None, self.optimizer, None)
        self.state = TrainerState(max_steps=total_steps)
        arguments = TrainingArguments(tempfile.gettempdir(), report_to="none", use_cpu=ids.device.type == "cpu")
        self.context = (arguments, self.state, TrainerControl())
        self.events.on_train_begin(*self.context)

    def step(self) -> Tensor:
        """One optimiser step; returns the loss, for which no GPU is waited: nor does the Trainer."""
        self.events.on_step_begin(*self.context)
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.events.on_pre_optimizer_step(*self.context)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.global_step += 1
        self.events.on_step_end(*self.context)
        return loss.detach()

    def parameters(self) -> int:
        """How many are trained by the optimiser."""
        return sum(parameter.numel() for parameter in self.trained)

    def operations(self) -> int:
        """Of a step. On a GPU its attention counts as six whole products, instead of seven of which the causal mask
        leaves half: 2 to 3 % of all are too many at 512 tokens."""
        with plain_attention(self.ids.device):  # not every torch can count the fused backward pass of grouped heads
            return floating_point_operations(self.step)


def plain_attention(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """On a GPU, attention as products, which give the same bits at every run; the fused kernels' gradients do not, and
    steps that choose what to prune would choose differently. They need memory for all pairs of tokens."""
    return contextlib.nullcontext() if device.type == "cpu" else sdpa_kernel(SDPBackend.MATH)


def contender(setting: PatSetting, name: str, trained: int) -> Tuning:
    """One of `CONTENDERS`, in the state that is to be measured. `trained`: how many parameters LoRA is to have."""
    model = setting.model()
    if name == "lora":
        per_rank = sum(sum(weight.shape) for weight in _block_weights(model))
        return Tuning(model, LoRA(lora_rank=max(1, round(trained / per_rank))), setting.ids(), 1000)
    after = name != "before"
    method = PAT(ratio=0.25, round_to=16, basis=setting.basis, milestone=0.5, compact=name == "compact")
    tuning = Tuning(model, method, setting.ids(), 4 if after else 100_000)
    with plain_attention(setting.device):
        for _ in range(2 if after else 0):  # to the milestone
            tuning.step()
    return tuning


def _block_weights(model: nn.Module) -> list[Tensor]:
    decoder = describe(model)
    linears = [linear for block in decoder.blocks for reads in block.reads for linear in reads.linears]
    return [linear.weight for linear in (*linears, *(writer for block in decoder.blocks for writer in block.writes))]


def contenders(setting: PatSetting) -> dict[str, Tuning]:
    """All of them, checked against each other."""
    before = contender(setting, "before", 0)
    found = {name: before if name == "before" else contender(setting, name, before.parameters()) for name in CONTENDERS}
    read = {name: logits(tuning.model, setting.ids()[:1]) for name, tuning in found.items()}
    dtype = getattr(torch, setting.dtype)
    layers = before.model.config.num_hidden_layers
    check_equal("PAT at its start against LoRA at its start", read["before"], read["lora"], dtype, layers)
    check_equal("compact against masked", read["compact"], read["masked"], dtype, layers)
    return found


def give_back() -> None:
    """Returns freed memory to the system, so that what steps in the old shapes took is not counted later."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def alone(setting: Setting, measure: Callable[..., Any], *arguments: Any) -> Any:
    """What `measure` returns for a setting and arguments in a fresh process, whose peak is then that of one contender.
    On a GPU in this one: the allocator begins anew whenever it is asked."""
    if setting.device.type == "cuda":
        return measure(setting, *arguments)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, setting, *arguments).result()


def peak_of_a_step(setting: Setting, make: Callable[[], Tuning]) -> float | None:
    """MiB that training takes at most, in this process; call it by `alone`."""
    torch.set_num_threads(setting.threads)
    with peak_memory(setting.device) as empty:
        pass
    tuning = make()
    tuning.step()  # the optimiser has its moments now
    give_back()
    with peak_memory(setting.device) as full:
        tuning.step()
    return None if full.bytes is None or empty.bytes is None else (full.bytes - empty.bytes) / MEBIBYTE


def peak(setting: PatSetting, name: str, trained: int) -> float | None:
    """`peak_of_a_step` of one contender."""
    return peak_of_a_step(setting, lambda: contender(setting, name, trained))


def peaks(setting: PatSetting, trained: int) -> dict[str, float | None]:
    """`peak` of every contender."""
    return {name: alone(setting, peak, name, trained) for name in CONTENDERS}


def time_steps(setting: PatSetting, session: Session) -> None:
    """Time of a step of each."""
    tunings = contenders(setting)
    operations = {name: tuning.operations() for name, tuning in tunings.items()}
    steps = {name: Contender(tuning.step) for name, tuning in tunings.items()}
    case = Case("pat step", str(setting), steps, graphs=False, unit="ms")
    found = session.measure(case)
    if not all(torch.isfinite(tuning.step()) for tuning in tunings.values()):
        raise SystemExit("a loss is not finite at the end: the times are of no training")
    limits = {name: operations[name] / operations[other] for name, (other, _) in GOALS.items()}
    bounds = {
        f"limit of {name}": Samples(tuple(limits[name] * seconds for seconds in found[other].seconds))
        for name, (other, _) in GOALS.items()
    }
    session.report(case, found | bounds)
    print("  trained: " + ", ".join(f"{name} {tuning.parameters():,}" for name, tuning in tunings.items()))
    for name, (other, goal) in GOALS.items():
        ratio, limit = found[name].p50 / found[other].p50, limits[name]
        print(
            f"  {name} takes {ratio:.2f}x the time of {other}, {1 / ratio:.2f}x its speed (limit {limit:.2f}x, "
            f"{1 / limit:.2f}x; goal {goal:.2f}x, {1 / goal:.2f}x: {'met' if ratio <= goal else 'not met'})"
        )


def memory(setting: PatSetting) -> list[Row]:
    """Measures the contenders' memory, prints its lines, and returns them."""
    trained = contender(setting, "before", 0).parameters()
    found = {name: value for name, value in peaks(setting, trained).items() if value is not None}
    for name, value in found.items():
        print(f"  {name:7} {value:9.0f} MiB at most, {value / found['before']:.2f}x PAT before the milestone")
    return [Row("pat step memory", str(setting), name, "MiB", value, value, value) for name, value in found.items()]


def main() -> None:
    """Runs all combinations."""
    parser = options(__doc__, rounds=15)
    step_options(parser)
    parser.add_argument("--bases", nargs="+", default=["identity", "learned"], help="of PAT: identity, pca, learned")
    parser.add_argument("--time", action=argparse.BooleanOptionalAction, default=True, help="measure time")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure memory")
    arguments = parser.parse_args()
    session = Session(arguments)
    for found in settings(arguments, session, "smollm2-135m", "llama-2048"):
        for basis in arguments.bases:
            setting = PatSetting(**vars(found), basis=basis)
            if arguments.time:
                time_steps(setting, session)
            gc.collect()
            if arguments.memory:
                session.keep(memory(setting))


if __name__ == "__main__":
    main()
