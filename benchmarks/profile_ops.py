"""Every CUDA kernel of the ops once, for a profiler to count its bytes, instructions and stalls.

    ncu --profile-from-start off --kernel-name-base demangled -k regex:pyprune --csv --page details \
        --section SpeedOfLight --section Occupancy --section WarpStateStats python benchmarks/profile_ops.py

The cases are those of bench_ops.py and bench_hsm.py; only our contender of each runs while the profiler counts.
"""

from __future__ import annotations

import argparse

import torch
from bench_hsm import backward_step, forward_step, problems
from bench_ops import FAMILIES, RIVALS, cases

OURS = ("pyprune", "2:4", "bitmap")
NOBODY_ELSE = ["torch", *(name for rivals in RIVALS.values() for name in rivals)]


def profiled(step) -> None:  # type: ignore[no-untyped-def]
    """Once to warm up, once for the profiler."""
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", choices=FAMILIES, default=["packing", "ranks", "scores", "linears"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16], help="of the products")
    parser.add_argument("--hsm-tokens", type=int, nargs="*", default=[2048, 16384])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda")
    for tokens in arguments.hsm_tokens:
        for problem in problems(tokens, 2048, 104, torch.bfloat16, "cuda"):
            for make in (forward_step, backward_step):
                profiled(make(problem.fused, problem))
    for family in arguments.families:
        for case in cases(family, device, arguments.tokens, without=NOBODY_ELSE):
            for name in OURS:
                if name in case.contenders:
                    contender = case.contenders[name]
                    data = contender.make()
                    print(f"{case.op}, {case.label}", flush=True)
                    profiled(lambda contender=contender, data=data: contender.run(*data))


if __name__ == "__main__":
    main()
