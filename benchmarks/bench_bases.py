"""What the basis of a cut costs: a real model cut to a share of its parameters, untuned, in several bases.

    python benchmarks/bench_bases.py --save                      the demo's model: 25 % gone, minutes on a CPU
    python benchmarks/bench_bases.py --model MODEL --removed 0.5 --tolerances 0.05 0.1

"identity" keeps the channels of most variance. "untied" is the rotation to all principal axes, which gives the head a
matrix of its own and so leaves fewer channels. "tied T" rotates only channels whose gains in the final norm are equal,
once those within the tolerance T have been made so; what that alone costs is the perplexity before the cut.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from models import conditions, real_model
from results import Row, append
from torch import Tensor, nn

from pyprune import basis, surgery
from pyprune.architectures import describe
from pyprune.evaluation import perplexity
from pyprune.plan import Rules, Target, widths_for


def rotated(model: nn.Module, covariance: Tensor, tolerance: float | None) -> nn.Module:
    """In its principal axes; with a tolerance the head stays tied."""
    if tolerance is None:
        surgery.untie(describe(model))
    else:
        basis.level(model, tolerance)
    return basis.rotate(model, basis.pca(covariance, basis.mixable(model)))


def cut(model: nn.Module, target: Target, channels: Tensor) -> nn.Module:
    """As many of the channels, which come by falling importance, as the target allows."""
    decoder = describe(model)
    widths = widths_for(decoder, target, Rules(("hidden",), round_to=decoder.width_multiple))
    return surgery.slice_hidden(model, channels[: widths.hidden].sort().values)


def main() -> None:
    """Measures, and keeps the rows with --save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint with a tied head (default: the demo's model)")
    parser.add_argument("--removed", type=float, default=0.25, help="share of the parameters")
    parser.add_argument("--tolerances", type=float, nargs="*", default=[0.0, 0.03, 0.06, 0.1, 0.2])
    parser.add_argument("--windows", type=int, default=32, help="that calibrate")
    parser.add_argument("--measured", type=int, default=32, help="held-out windows")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--save", action="store_true", help="append to results.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    print(conditions(torch.get_num_threads()))
    dense, train, held_out = real_model(arguments.model, arguments.window)
    if not describe(dense).tied:
        parser.error(f"--model: the head of {arguments.model} is untied already, so there is nothing to compare")
    text = held_out[: arguments.measured].flatten()
    calibration = train[:: max(1, len(train) // arguments.windows)][: arguments.windows].split(4)
    covariance = basis.covariance(dense, calibration)
    name = arguments.model.name if arguments.model else "SmolLM2-135M"
    case = f"{name}, {len(text)} held-out tokens, {arguments.windows}x{arguments.window} to calibrate"
    target = Target.parse(f"params={round((1 - arguments.removed) * surgery.parameter_counts(dense)['total'])}")
    tolerances = {"untied": None, **{f"tied {t:g}": t for t in arguments.tolerances}}
    rows = []
    for label in ("identity", *tolerances):
        model, channels = copy.deepcopy(dense), torch.arange(len(covariance))
        if label == "identity":
            channels = covariance.diagonal().argsort(descending=True)
        else:
            rotated(model, covariance, tolerances[label])
        groups = len(basis.mixable(model).unique())
        whole = perplexity(model, text, arguments.window).value
        small = cut(model, target, channels)
        left, width = perplexity(small, text, arguments.window).value, describe(small).hidden_size
        print(f"  {label:9} {groups:3} groups, uncut {whole:9.2f}, cut to {width} channels {left:9.2f}", flush=True)
        for benchmark, value in (("basis, uncut", whole), (f"basis, {arguments.removed:.0%} removed", left)):
            rows.append(Row(benchmark, case, label, "perplexity", value, value, value))
    if arguments.save:
        append(rows, held_out.device.type)


if __name__ == "__main__":
    main()
