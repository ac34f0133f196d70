"""A LoRA step as `pyprune.training.tune` takes it, beside a plain Trainer's, and its loss beside torch's.

    python benchmarks/bench_tune_step.py --threads 2 --save

The same model with the same LoRA, by turns: as a Trainer trains it by default, with the Trainer's `bf16=True` (for bf16
weights), with `HeadLoss` alone, and with both, which is what `tune` does. Steps are those of bench_pat_step.py. Before
anything is timed, the losses of all are compared. Peak memory is that of a fresh process for each.

The loss by itself, forward and backward from the hidden states: whole logits as transformers takes them, in fp32; our
chunks; torch's own chunks, `linear_cross_entropy`, with the options that it chooses itself.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from accelerate import Accelerator
from bench_loraprune_step import Setting
from bench_pat_step import MEBIBYTE, Tuning, give_back
from harness import Case, Contender, Session, options
from models import SHAPES, build, floating_point_operations
from results import Row
from torch import Tensor
from torch.nn import functional as F

from pyprune.evaluation import peak_memory
from pyprune.head_loss import HeadLoss, head_loss
from pyprune.methods.lora import LoRA

ADAPTERS = {"lora_rank": 16, "lora_alpha": 16.0, "lora_dropout": 0.0}
WAYS = {"Trainer": (False, False), "Trainer, bf16=True": (True, False), "HeadLoss": (False, True), "tune": (True, True)}


def ways(setting: Setting) -> list[str]:
    """Those of `WAYS` that differ: fp32 weights are trained in fp32, there `HeadLoss` is what `tune` adds."""
    return list(WAYS) if setting.dtype == "bfloat16" else ["Trainer", "tune"]


def contender(setting: Setting, name: str) -> Tuning:
    """The model in training, in one of the `WAYS`."""
    tuning = Tuning(build(setting.shape, getattr(torch, setting.dtype)), LoRA(**ADAPTERS), setting.ids(), 100_000)
    autocast, chunked = WAYS[name]
    if autocast and setting.dtype == "bfloat16":
        Accelerator(mixed_precision="bf16", cpu=True).prepare_model(tuning.model)  # as the Trainer does
    if chunked:
        HeadLoss(tuning.model)
    return tuning


def time_steps(setting: Setting, session: Session) -> None:
    """Checks, times and reports one setting."""
    tunings = {name: contender(setting, name) for name in ways(setting)}
    losses = {name: tuning.step() for name, tuning in tunings.items()}
    allowed = 2**-8 if setting.dtype == "bfloat16" else 1e-6
    for name, loss in losses.items():
        if not abs(loss - losses["Trainer"]) <= allowed * abs(losses["Trainer"]):
            raise SystemExit(f"{setting}: the loss of {name} is {loss}, that of Trainer {losses['Trainer']}")
    case = Case(
        "tune step",
        str(setting),
        {name: Contender(tuning.step) for name, tuning in tunings.items()},
        operations=floating_point_operations(tunings["tune"].step),
        dtype=getattr(torch, setting.dtype),
        graphs=False,
        unit="ms",
    )
    session.run(case)


def peak(setting: Setting, name: str, threads: int) -> float | None:
    """MiB that a step takes at most, in this process; call it in a fresh one."""
    torch.set_num_threads(threads)
    with peak_memory() as empty:
        pass
    tuning = contender(setting, name)
    tuning.step()  # the optimiser has its moments now
    give_back()
    with peak_memory() as full:
        tuning.step()
    return None if full.bytes is None or empty.bytes is None else (full.bytes - empty.bytes) / MEBIBYTE


def memory(setting: Setting, threads: int) -> list[Row]:
    """Measures the memory of each way, prints its lines, and returns them."""
    found = {}
    for name in ways(setting):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            value = pool.submit(peak, setting, name, threads).result()
        if value is not None:
            found[name] = value
            print(f"  {name:18} {value:9.0f} MiB at most, {value / found['Trainer']:.2f}x Trainer")
    return [Row("tune step memory", str(setting), name, "MiB", value, value, value) for name, value in found.items()]


def time_loss(setting: Setting, session: Session) -> None:
    """The loss and its gradient in the hidden states, three ways."""
    shape, dtype = SHAPES[setting.shape], getattr(torch, setting.dtype)
    width, vocabulary = shape["hidden_size"], shape["vocab_size"]
    hidden = torch.randn(setting.tokens, width, dtype=dtype).requires_grad_()
    head = (torch.randn(vocabulary, width) / width**0.5).to(dtype)
    labels = torch.randint(vocabulary, (setting.tokens,))

    def whole() -> Tensor:
        return F.cross_entropy((hidden @ head.T).float(), labels)

    def chunks() -> Tensor:
        return head_loss(hidden, head, labels)[0]

    def torchs() -> Tensor:
        return F.linear_cross_entropy(hidden, head, labels, options=torch.nn.LinearCrossEntropyOptions())

    def both(loss: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def run() -> tuple[Tensor, Tensor]:
            value = loss()
            (slope,) = torch.autograd.grad(value, hidden)
            return value.detach().float(), slope.float()

        return run

    case = Case(
        "head loss",
        f"T={setting.tokens} d={width} V={vocabulary} {setting.dtype}",
        {name: Contender(both(loss)) for name, loss in (("whole", whole), ("head_loss", chunks), ("torch", torchs))},
        bytes=2 * head.nbytes,
        operations=4 * setting.tokens * width * vocabulary,
        dtype=dtype,
        expected=both(whole)(),
        allowed=2**-6 if dtype == torch.bfloat16 else 1e-5,
        roundings={"torch": 2**-4 if dtype == torch.bfloat16 else 1e-5},  # it adds up in bf16
        graphs=False,
        unit="ms",
    )
    session.run(case)


def main() -> None:
    """Runs all combinations."""
    parser = options(__doc__, rounds=9, devices=("cpu",))
    parser.add_argument("--shapes", nargs="+", default=["smollm2-135m"], choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--tokens", type=int, default=1024, help="in a step")
    parser.add_argument("--window", type=int, default=256)
    arguments: argparse.Namespace = parser.parse_args()
    session = Session(arguments)
    for shape in arguments.shapes:
        for dtype in arguments.dtypes:
            setting = Setting(shape, dtype, arguments.tokens, arguments.window)
            time_loss(setting, session)
            time_steps(setting, session)
            gc.collect()
            session.keep(memory(setting, arguments.threads))


if __name__ == "__main__":
    main()
