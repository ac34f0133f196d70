"""AdamW with AST's decay of masked weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from pyprune import ops
from pyprune.masked import MaskedLinear, local, local_mask

MOMENTS = ("exp_avg", "exp_avg_sq")
SEED_OF_STEP, SEED_OF_PARAMETER = 0x9E3779B1, 0x85EBCA6B  # odd numbers that spread small ones over 32 bits


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW, decoupled also from the decay of masked weights (AST, arXiv 2407.20584, section 3.2); see `ops.nm_adamw_`.

    The moments are fp32 whatever the parameters are. bf16 parameters are rounded stochastically, by a hash of step,
    parameter and element, because a step of usual size is smaller than half a unit in their last place.

    Args:
        params: parameters or groups of them; those of no masked layer get plain AdamW.
        masked: the layers whose weights are masked. Their weights and masks are read at each step, so the layers may
            be sharded, and refreshed, after this was built.
        masked_decay: lambda, the decay of the weights that are masked at the moment; a group's entry of that name can
            be changed between steps, as its `lr`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        masked: Sequence[MaskedLinear] = (),
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        masked_decay: float = 0.0,
    ) -> None:
        if lr < 0 or eps < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr is {lr}, betas {betas}, eps {eps}; expected lr, eps >= 0 and betas in 0 <= beta < 1")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "masked_decay": masked_decay}
        super().__init__(params, defaults)
        self.masked = masked

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layers = {layer.weight: layer for layer in self.masked}
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    self._update(parameter, group, layers.get(parameter), number)
        return loss

    def _update(
        self, parameter: torch.nn.Parameter, group: dict[str, Any], layer: MaskedLinear | None, number: int
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
        state["step"] += 1
        assert parameter.grad is not None
        ops.nm_adamw_(
            local(parameter),
            local(parameter.grad),
            local(state["exp_avg"]),
            local(state["exp_avg_sq"]),
            None if layer is None else local_mask(layer),
            step=state["step"],
            seed=state["step"] * SEED_OF_STEP + number * SEED_OF_PARAMETER,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            masked_decay=group["masked_decay"],
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which however would round the moments to the parameters' dtype."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, saved in state_dict["state"].items():
            state = self.state[parameters[index]]
            for name in MOMENTS:
                state[name] = saved[name].to(parameters[index].device)
