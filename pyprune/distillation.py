"""Distillation from the hidden states: cross entropy and forward KL without ever holding the logits of all tokens.

With z the student's logits and t the teacher's, both fp32, over the tokens that carry a label (Hinton et al., 2015,
arXiv 1503.02531; AST, arXiv 2407.20584, section 3.3):

    loss = (ce_weight * sum CE(z, label) + kl_weight * tau^2 * sum KL(softmax(t / tau) || softmax(z / tau))) / items
    dloss/dz = (ce_weight * (softmax(z) - onehot) + kl_weight * tau * (softmax(z / tau) - softmax(t / tau))) / items

Computed as `head_loss` does, a few tokens at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.architectures import describe_blocks
from pyprune.head_loss import HeadLoss, cross_entropy, head_loss


@dataclass(frozen=True)
class Weights:
    """The mixture of both losses. AST: 0.67 KL + 0.33 CE for small models, 0.5 KL + 1.0 CE for 7B, temperature 2."""

    kl: float
    ce: float
    temperature: float


def distillation_loss(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    weights: Weights,
    items: Tensor | int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a student that is trained, against a teacher that is not; differentiable in `hidden` and `head`.

    Under autocast the products have its dtype, else that of `hidden`; everything between them is fp32 (fp64 for fp64).

    Args:
        hidden: the student's last hidden states, [T, d].
        head: the weight of its head, [V, d].
        teacher_hidden, teacher_head: the same of the teacher, whose width may differ: [T, d'], [V, d'].
        labels: the next token of each row, [T]; rows of label -100 count for neither loss.
        items: what the sums are divided by; the number of labels when None. With gradient accumulation, that of all
            passes of a step.

    Returns:
        The loss, and for the log its two parts before they are weighted, sum CE / items and tau^2 sum KL / items.

    Raises:
        ValueError: the vocabularies or the numbers of tokens differ.
    """
    if len(head) != len(teacher_head):
        raise ValueError(
            f"the teacher's vocabulary has {len(teacher_head)} tokens, the student's {len(head)}; distil from a model "
            "with the same tokenizer"
        )
    if len(hidden) != len(teacher_hidden):
        raise ValueError(
            f"hidden has {len(hidden)} tokens, teacher_hidden {len(teacher_hidden)}; expected the same number"
        )

    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    matrix = teacher_head.to(dtype)

    def terms(z: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = (teacher_hidden[rows].to(dtype) @ matrix.T).to(z.dtype)
        slope = z.clone()
        (ce,) = cross_entropy(slope, labels, rows)
        log_p = torch.log_softmax(z / weights.temperature, -1)
        log_q = torch.log_softmax(t / weights.temperature, -1)
        q = log_q.exp()
        kl = weights.temperature**2 * (q * log_q.sub_(log_p)).sum()
        torch.sub(log_p.exp_(), q, out=z).mul_(weights.kl * weights.temperature).add_(slope, alpha=weights.ce)
        return weights.ce * ce + weights.kl * kl, ce, kl

    loss, ce, kl = head_loss(hidden, head, labels, items, terms)
    return loss, ce, kl


def check_heads(model: Any, teacher: Any) -> list[Any]:
    """The heads of both, which may be on the meta device. Raises ValueError when their vocabularies differ in size, or
    one has a bias."""
    heads = [found.get_output_embeddings() for found in (model, teacher)]
    sizes = [len(head.weight) for head in heads]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the teacher's vocabulary has {sizes[1]} tokens, the student's {sizes[0]}; distil from a model with the "
            "same tokenizer"
        )
    if any(getattr(head, "bias", None) is not None for head in heads):
        raise ValueError("distillation: the head has a bias, which is not supported; train with kl_weight=0")
    return heads


class Distillation(HeadLoss):
    """`HeadLoss` that distils: the loss is `distillation_loss` against `teacher` on the same tokens.

    Attributes:
        ce, kl: sums of the two parts since `reset`, detached.
        used: whether the model has been asked for its loss since `reset`; some trainers never do.
    """

    def __init__(self, model: Any, teacher: Any, weights: Weights) -> None:
        """Raises ValueError for vocabularies of different sizes, a head with a bias, a teacher of an unknown family."""
        _, self.teacher_head = check_heads(model, teacher)
        self.teacher, self.teacher_stack, self.weights = teacher, describe_blocks(teacher).stack, weights
        teacher.requires_grad_(False).eval()
        super().__init__(model)
        self.reset()

    def reset(self) -> None:
        """Begins the sums of a step."""
        self.ce: Tensor | float = 0.0
        self.kl: Tensor | float = 0.0
        self.used = False
        self.hidden: Tensor | None = None
        self.teacher_hidden: Tensor | None = None

    def _capture(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        super()._capture(stack, args, kwargs, output)
        if self.hidden is None:
            return
        if self.teacher.device != self.hidden.device:
            self.teacher.to(self.hidden.device)
        with torch.no_grad():
            known = kwargs | {"past_key_values": None, "use_cache": False}
            self.teacher_hidden = self.teacher_stack(*args, **known)[0]

    def loss(self, hidden: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        """The loss for hidden [T, d] and labels [T]."""
        assert self.teacher_hidden is not None
        teacher_hidden, self.teacher_hidden = self.teacher_hidden.flatten(0, -2), None
        loss, ce, kl = distillation_loss(
            hidden, self.head.weight, teacher_hidden, self.teacher_head.weight, labels, self.weights, items
        )
        self.ce, self.kl, self.used = self.ce + ce, self.kl + kl, True
        return loss
