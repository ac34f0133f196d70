"""Time of a training step: PEFT LoRA, LoRAPrune before its first mask (all groups scored), masked, and cut.

    python benchmarks/bench_loraprune_step.py --threads 2 --save
    python benchmarks/bench_loraprune_step.py --device cuda --save        all 22 blocks of TinyLlama's shape, in bf16

All have the same LoRA. The contenders take turns, step by step, as in bench_pat_step.py. Before anything is timed, the
logits of LoRAPrune at its start must be LoRA's, and those of the cut model the masked model's. A quarter of the
parameters goes. The limit is the ratio of the floating-point operations, counted while the step runs. Scores do not
count: they multiply each weight with 3 x 8 numbers in a step, where every token multiplies it two or three times.
"""

from __future__ import annotations

import torch
from bench_pat_step import Setting, Tuning, plain_attention, settings, step_options
from harness import Case, Contender, Samples, Session, options
from models import check_equal, logits

from pyprune import LoRAPrune
from pyprune.methods.lora import LoRA

ADAPTERS = {"lora_rank": 8, "lora_alpha": 16.0, "lora_dropout": 0.0}
STEPS = 4  # of a whole pruning; behind the second one all is masked, and cut
LIMITED = {"scoring": "lora", "cut": "lora"}


def contender(setting: Setting, name: str) -> Tuning:
    """One of "lora", "scoring", "masked" or "cut", in the state that is to be measured."""
    model = setting.model()
    if name == "lora":
        return Tuning(model, LoRA(**ADAPTERS), setting.ids(), 1000)
    if name == "scoring":
        return Tuning(model, LoRAPrune(round_to=16, **ADAPTERS), setting.ids(), 100_000)
    schedule = {"warmup_share": 0.0, "cooldown_share": 0.5, "mask_every": 1, "milestones": int(name == "cut")}
    tuning = Tuning(model, LoRAPrune(round_to=16, **schedule, **ADAPTERS), setting.ids(), STEPS)
    with plain_attention(setting.device):
        for _ in range(STEPS):
            tuning.step()
    return tuning


def time_steps(setting: Setting, session: Session) -> None:
    """Checks, times and reports one setting."""
    tunings = {name: contender(setting, name) for name in ("lora", "scoring", "masked", "cut")}
    read = {name: logits(tuning.model, setting.ids()[:1]) for name, tuning in tunings.items()}
    dtype = getattr(torch, setting.dtype)
    layers = tunings["lora"].model.config.num_hidden_layers
    check_equal("LoRAPrune at its start against LoRA at its start", read["scoring"], read["lora"], dtype, layers)
    check_equal("cut against masked", read["cut"], read["masked"], dtype, layers)
    operations = {name: tuning.operations() for name, tuning in tunings.items()}
    case = Case(
        "loraprune step",
        str(setting),
        {name: Contender(tuning.step) for name, tuning in tunings.items()},
        graphs=False,
        unit="ms",
    )
    found = session.measure(case)
    limits = {name: operations[name] / operations[other] for name, other in LIMITED.items()}
    bounds = {
        f"limit of {name}": Samples(tuple(limits[name] * seconds for seconds in found[other].seconds))
        for name, other in LIMITED.items()
    }
    session.report(case, found | bounds)
    for name, other in LIMITED.items():
        print(
            f"  {name} takes {found[name].p50 / found[other].p50:.2f}x the time of {other} (limit {limits[name]:.2f}x)"
        )


def main() -> None:
    """Runs all combinations."""
    parser = options(__doc__, rounds=15)
    step_options(parser)
    arguments = parser.parse_args()
    session = Session(arguments)
    for setting in settings(arguments, session, "smollm2-135m", "llama-2048"):
        time_steps(setting, session)


if __name__ == "__main__":
    main()
