"""AST's parts and its whole step: the fused optimiser, the mask refresh, a training step, peak memory.

    python benchmarks/bench_ast_step.py --threads 2 --save
    python benchmarks/bench_ast_step.py --threads 1 --cpu-time --save     on a machine where others are at work
    python benchmarks/bench_ast_step.py --device cuda --save              all 22 blocks of TinyLlama's shape, in bf16

The contenders take turns within one process, and results are checked before they are timed.

op       one step of `nm_adamw_` on one weight, against the same step in plain torch operations ("unfused"), torch's
         dense AdamW ("fused AdamW") and a copy of as many bytes ("copy"), which is what memory allows.
refresh  |W| and `nm_prune` with the count of flips over all linears, beside a step; masks are refreshed every ten.
step     student and teacher forward, backward, clipping, update and, every tenth step, masks; against the same with
         dense linears and torch's AdamW ("dense"), and against its matrix products alone plus that AdamW
         ("products + AdamW"). The batch is random, which changes no time.
memory   the peak of a step in a fresh process, on a GPU of the allocator, above what is held without a model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from bench_ops import contest
from bench_pat_step import MEBIBYTE, Setting, alone, settings, step_options
from harness import Case, Contender, Session, options
from results import Row
from torch import Tensor, nn

from pyprune import AST, speed
from pyprune.architectures import describe_blocks
from pyprune.distillation import Distillation, Weights
from pyprune.evaluation import peak_memory
from pyprune.optim import MaskedAdamW
from pyprune.reference.bits import unpack_bits

GOALS = {"bandwidth": 0.8, "unfused": 3.0, "refresh": 0.02, "step": 1.1}
REFRESH = 10


# ------------------------------------------------------------------------------------------------------------- the op


def bench_op(shape: tuple[int, int], dtype: torch.dtype, session: Session) -> None:
    """One weight, cold in the caches as in a step, which has many."""
    weight = speed.normal(*shape, device=session.device, dtype=dtype)
    case = contest(next(speed.optimizers(weight, ())), without=["compile"])
    source, target = (torch.ones(case.bytes // 8, device=session.device) for _ in range(2))
    case.op, case.unit = "nm_adamw step", "ms"
    case.contenders = {"unfused": case.contenders["plain torch"], "pyprune": case.contenders["pyprune"]}
    case.bounds["copy"] = Contender(lambda: target.copy_(source))
    found = session.measure(case)
    session.report(case, found)
    time = {name: samples.p50 for name, samples in found.items()}
    print(
        f"  {case.bytes / time['pyprune'] / 1e9:.1f} GB/s, {time['copy'] / time['pyprune']:.0%} of a copy's (goal "
        f"{GOALS['bandwidth']:.0%}); goal against unfused {GOALS['unfused']:.0f}x"
    )


# ----------------------------------------------------------------------------------------------------------- the step


class Tuning:
    """A model in training; `masked` or dense, with the same teacher and loss."""

    def __init__(self, setting: Setting, masked: bool) -> None:
        self.model, self.ids, self.masked, self.done = setting.model(), setting.ids(), masked, 0
        if masked:
            method = AST(refresh=REFRESH)
            self.model = method.prepare(self.model)
            self.tuning = method._prepared("bench")
            self.tuning.plan(1000)
            self.optimizer: torch.optim.Optimizer = MaskedAdamW(self.model.parameters(), self.tuning.masked(), lr=1e-5)
        else:
            teacher = copy.deepcopy(self.model)
            self.distillation = Distillation(self.model, teacher, Weights(0.67, 0.33, 2.0))
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.model.train()

    def step(self) -> Tensor:
        """One optimiser step; returns the loss, for which no GPU is waited."""
        if self.masked:
            self.tuning.begin(self.done, self.optimizer)
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        return loss.detach()


def products(setting: Setting) -> Callable[[], None]:
    """The matrix products of a step, without anything around them: student forward, both of backward, teacher."""
    model, dtype, device = setting.model(), getattr(torch, setting.dtype), setting.device
    linears = [m for block in describe_blocks(model).blocks for m in block.module.modules() if isinstance(m, nn.Linear)]
    shapes = [tuple(linear.weight.shape) for linear in (*linears, model.get_output_embeddings())]
    weights = {shape: torch.randn(shape, device=device).to(dtype) for shape in shapes}
    widths = {width for shape in shapes for width in shape}
    inputs = {width: torch.randn(setting.tokens, width, device=device).to(dtype) for width in widths}

    def run() -> None:
        for out, into in shapes:
            weight, x, grad = weights[out, into], inputs[into], inputs[out]
            for _ in range(2):
                x @ weight.T
            grad @ weight
            grad.T @ x

    return run


def bench_step(setting: Setting, session: Session) -> None:
    """Time of the step and of the refresh within it."""
    tunings = {"AST": Tuning(setting, True), "dense": Tuning(setting, False)}
    fresh = AST(kl_weight=0.0)
    masked = fresh.prepare(setting.model())
    with torch.no_grad():  # masked products are dense products with masked weights
        found = masked.eval()(tunings["AST"].ids[:1]).logits
        for layer in fresh._prepared("bench").masked():
            layer.weight.masked_fill_(~unpack_bits(layer.mask, layer.in_features), 0)
        stock = fresh.finalize(masked)
        torch.testing.assert_close(found, stock(tunings["AST"].ids[:1]).logits)
    del masked, stock
    tuning, adamw = tunings["AST"].tuning, tunings["dense"].optimizer
    parameters = list(tunings["dense"].model.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    gemms = products(setting)

    def bound() -> None:
        gemms()
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        adamw.step()

    case = Case(
        "ast step",
        str(setting),
        {name: Contender(tuning.step) for name, tuning in tunings.items()},
        bounds={"products + AdamW": Contender(bound), "mask refresh": Contender(lambda: tuning.refresh(REFRESH))},
        graphs=False,
        unit="ms",
    )
    found = session.measure(case)
    session.report(case, found)
    time = {name: samples.p50 for name, samples in found.items()}
    print(
        f"  AST takes {time['AST'] / time['products + AdamW']:.2f}x its products and a dense AdamW (goal "
        f"{GOALS['step']:.2f}x), {time['AST'] / time['dense']:.2f}x the same step on dense linears; masks, every "
        f"{REFRESH} steps, are {time['mask refresh'] / REFRESH / time['AST']:.1%} of it (goal {GOALS['refresh']:.0%})"
    )


# --------------------------------------------------------------------------------------------------------- its memory


def peak(setting: Setting, masked: bool) -> tuple[float, float]:
    """MiB at most in a step, and of parameters, gradients, moments, masks and teacher; call it by `alone`."""
    torch.set_num_threads(setting.threads)
    with peak_memory(setting.device) as empty:
        pass
    tuning = Tuning(setting, masked)
    tuning.step()
    with peak_memory(setting.device) as full:
        tuning.step()
    parameters = list(tuning.model.parameters())
    held = sum(p.numel() * (3 * p.element_size()) for p in parameters)  # with gradients and the teacher
    held += sum(x.nbytes for state in tuning.optimizer.state.values() for x in state.values() if isinstance(x, Tensor))
    held += sum(buffer.nbytes for name, buffer in tuning.model.named_buffers() if name.endswith("mask"))
    assert full.bytes is not None and empty.bytes is not None
    return (full.bytes - empty.bytes) / MEBIBYTE, held / MEBIBYTE


def bench_memory(setting: Setting) -> list[Row]:
    """AST beside the dense step."""
    rows = []
    for name, masked in (("AST", True), ("dense", False)):
        total, held = alone(setting, peak, masked)
        print(f"  {name:6} {total:8.0f} MiB at most, {held:.0f} of it parameters, gradients, moments, masks, teacher")
        rows += [Row("ast step memory", str(setting), f"{name}{what}", "MiB", *[value] * 3) for what, value in
                 (("", total), (" held", held))]  # fmt: skip
    return rows


def main() -> None:
    """Runs all parts."""
    parser = options(__doc__, rounds=10)
    step_options(parser)
    parser.add_argument("--parts", nargs="+", default=["op", "step", "memory"], choices=["op", "step", "memory"])
    arguments = parser.parse_args()
    session = Session(arguments)
    for setting in settings(arguments, session, "llama-2048"):
        if "op" in arguments.parts:
            bench_op((5632, 2048), getattr(torch, setting.dtype), session)
        if "step" in arguments.parts:
            bench_step(setting, session)
        if "memory" in arguments.parts:
            session.keep(bench_memory(setting))


if __name__ == "__main__":
    main()
