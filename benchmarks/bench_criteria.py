"""What each criterion would drop first, and what that costs: the loss of a real model with one group of heads masked.

    python benchmarks/bench_criteria.py --save                   the demo's model: 90 groups, minutes on a CPU
    python benchmarks/bench_criteria.py --model MODEL --criteria activation lora

The truth is the loss on text that calibrates nothing, with each key/value group, its query heads included, masked
alone. Of each block, a criterion loses what the group costs that it scores lowest; "best" is the group that costs
least, "random" the mean. Printed and kept are the sum over the blocks, and the dearest block, in nats a token.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from models import conditions, real_model
from results import Row, append
from torch import Tensor, nn

from pyprune import criteria
from pyprune.architectures import Groups, describe

CHOICES = ("activation", "wanda", "magnitude", "taylor", "lora")


@torch.no_grad()
def loss(model: nn.Module, ids: Tensor) -> float:
    """Mean over the tokens."""
    return float(model(input_ids=ids, labels=ids, use_cache=False).loss)


def costs(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """By name of a block's heads, what masking each group alone adds to the loss [count]."""
    whole = loss(model, ids)
    return {
        groups.name: torch.tensor([masked(model, ids, groups, i) - whole for i in range(groups.count)])
        for groups in describe(model).groups()
        if groups.axis == "heads"
    }


def masked(model: nn.Module, ids: Tensor, groups: Groups, index: int) -> float:
    """The loss without one group."""
    mask = torch.ones(groups.count)
    mask[index] = 0
    entries = mask.repeat_interleave(groups.writer.width)
    handle = groups.writer.linear.register_forward_pre_hook(lambda module, args: (args[0] * entries.to(args[0]),))
    try:
        return loss(model, ids)
    finally:
        handle.remove()


def dropped(cost: dict[str, Tensor], scores: criteria.Scores) -> Tensor:
    """What the lowest score of each block costs [blocks]."""
    return torch.stack([values[int(scores[name].argmin())] for name, values in cost.items()])


def main() -> None:
    """Measures, and keeps the rows with --save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint (default: the demo's model)")
    parser.add_argument("--criteria", nargs="+", default=list(CHOICES), choices=list(criteria.CRITERIA))
    parser.add_argument("--windows", type=int, default=8, help="that calibrate")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--measured", type=int, default=2, help="windows of the loss")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--save", action="store_true", help="append to results.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    print(conditions(torch.get_num_threads()))
    model, train, held_out = real_model(arguments.model, arguments.window)
    calibration = train[:: max(1, len(train) // arguments.windows)][: arguments.windows]
    cost = costs(model, held_out[: arguments.measured])
    of_best, of_random = (torch.stack([pick(values) for values in cost.values()]) for pick in (torch.min, torch.mean))
    found = {"best": of_best, "random": of_random}
    for name in arguments.criteria:
        torch.manual_seed(0)
        found[name] = dropped(cost, criteria.score(model, calibration.split(4), name))
    name = arguments.model.name if arguments.model else "SmolLM2-135M"
    case = f"{name}, {arguments.windows}x{arguments.window} tokens, loss on {arguments.measured}x{arguments.window}"
    rows = []
    for label, values in found.items():
        block, blocks = int(values.argmax()), len(values)
        print(f"  {label:12} {values.sum():7.3f} nats over {blocks} blocks, {values[block]:.3f} in block {block}")
        rows += [Row("heads dropped first", case, label, "nats", *[float(values.sum())] * 3)]
        rows += [Row("heads dropped first, worst block", case, label, "nats", *[float(values.max())] * 3)]
    if arguments.save:
        append(rows, held_out.device.type)


if __name__ == "__main__":
    main()
