"""A LoRA step as `pyprune.training.tune` takes it, beside a plain Trainer's, and its loss beside torch's.

    python benchmarks/bench_tune_step.py --threads 2 --save
    python benchmarks/bench_tune_step.py --device cuda --save             all 22 blocks of TinyLlama's shape, in bf16

The same model with the same LoRA, by turns: as a Trainer trains it by default, with the Trainer's `bf16=True` (for bf16
weights), with `HeadLoss` alone, and with both, which is what `tune` does. Steps are those of bench_pat_step.py. Before
anything is timed, the losses of all are compared. Peak memory is that of a fresh process for each, on a GPU that of the
allocator.

The loss by itself, forward and backward from the hidden states: whole logits as transformers takes them, in fp32; our
chunks; torch's own chunks, `linear_cross_entropy`, with the options that it chooses itself.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from accelerate import Accelerator
from bench_pat_step import Setting, Tuning, alone, peak_of_a_step, settings, step_options
from harness import Case, Contender, Session, options
from models import SHAPES
from results import Row
from torch import Tensor
from torch.nn import functional as F

from pyprune.head_loss import HeadLoss, head_loss
from pyprune.methods.lora import LoRA

ADAPTERS = {"lora_rank": 16, "lora_alpha": 16.0, "lora_dropout": 0.0}
WAYS = {"Trainer": (False, False), "Trainer, bf16=True": (True, False), "HeadLoss": (False, True), "tune": (True, True)}


def ways(setting: Setting) -> list[str]:
    """Those of `WAYS` that differ: fp32 weights are trained in fp32, there `HeadLoss` is what `tune` adds."""
    return list(WAYS) if setting.dtype == "bfloat16" else ["Trainer", "tune"]


def contender(setting: Setting, name: str) -> Tuning:
    """The model in training, in one of the `WAYS`."""
    tuning = Tuning(setting.model(), LoRA(**ADAPTERS), setting.ids(), 100_000)
    autocast, chunked = WAYS[name]
    if autocast and setting.dtype == "bfloat16":
        on_cpu = setting.device.type == "cpu"
        Accelerator(mixed_precision="bf16", cpu=on_cpu).prepare_model(tuning.model)  # as the Trainer does
    if chunked:
        HeadLoss(tuning.model)
    return tuning


def time_steps(setting: Setting, session: Session) -> None:
    """Checks, times and reports one setting."""
    tunings = {name: contender(setting, name) for name in ways(setting)}
    losses = {name: tuning.step().item() for name, tuning in tunings.items()}
    allowed = 2**-8 if setting.dtype == "bfloat16" else 1e-6
    for name, loss in losses.items():
        if not abs(loss - losses["Trainer"]) <= allowed * abs(losses["Trainer"]):
            raise SystemExit(f"{setting}: the loss of {name} is {loss}, that of Trainer {losses['Trainer']}")
    case = Case(
        "tune step",
        str(setting),
        {name: Contender(tuning.step) for name, tuning in tunings.items()},
        operations=tunings["tune"].operations(),
        dtype=getattr(torch, setting.dtype),
        graphs=False,
        unit="ms",
    )
    session.run(case)


def peak(setting: Setting, name: str) -> float | None:
    """MiB that a step takes at most, in this process; call it by `alone`."""
    return peak_of_a_step(setting, lambda: contender(setting, name))


def memory(setting: Setting) -> list[Row]:
    """Measures the memory of each way, prints its lines, and returns them."""
    found = {}
    for name in ways(setting):
        value = alone(setting, peak, name)
        if value is not None:
            found[name] = value
            print(f"  {name:18} {value:9.0f} MiB at most, {value / found['Trainer']:.2f}x Trainer")
    return [Row("tune step memory", str(setting), name, "MiB", value, value, value) for name, value in found.items()]


def time_loss(setting: Setting, session: Session) -> None:
    """The loss and its gradient in the hidden states, three ways."""
    shape, dtype, device = SHAPES[setting.shape], getattr(torch, setting.dtype), setting.device
    width, vocabulary = shape["hidden_size"], shape["vocab_size"]
    hidden = torch.randn(setting.tokens, width, dtype=dtype, device=device).requires_grad_()
    head = (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype)
    labels = torch.randint(vocabulary, (setting.tokens,), device=device)

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
    parser = options(__doc__, rounds=9)
    step_options(parser)
    arguments = parser.parse_args()
    session = Session(arguments)
    for setting in settings(arguments, session, "smollm2-135m"):
        time_loss(setting, session)
        time_steps(setting, session)
        gc.collect()
        session.keep(memory(setting))


if __name__ == "__main__":
    main()
