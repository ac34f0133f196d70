"""Distillation from the hidden states: cross entropy and forward KL without ever holding the logits of all tokens.

With z the student's logits and t the teacher's, both fp32, over the tokens that carry a label (Hinton et al., 2015,
arXiv 1503.02531; AST, arXiv 2407.20584, section 3.3):

    loss = (ce_weight * sum CE(z, label) + kl_weight * tau^2 * sum KL(softmax(t / tau) || softmax(z / tau))) / items
    dloss/dz = (ce_weight * (softmax(z) - onehot) + kl_weight * tau * (softmax(z / tau) - softmax(t / tau))) / items

The head's product, the loss and both gradients are computed for a few tokens at a time, already in the forward pass,
so that instead of several [tokens, vocabulary] matrices there are five of `CHUNK` elements and the two gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK = 1 << 23  # logits that exist at one time, for each of student and teacher


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
    if not len(hidden) == len(teacher_hidden) == len(labels):
        raise ValueError(
            f"hidden has {len(hidden)} tokens, teacher_hidden {len(teacher_hidden)}, labels {len(labels)}; expected "
            "the same number"
        )
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    counted = (labels != -100).nonzero().squeeze(1)
    divisor = len(counted) if items is None else items
    with torch.autocast(device, enabled=False):
        return _Distillation.apply(
            hidden[counted].to(dtype),
            head,
            teacher_hidden[counted].to(dtype),
            teacher_head.to(dtype),
            labels[counted],
            weights,
            torch.as_tensor(divisor, device=hidden.device),
        )


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        labels: Tensor,
        weights: Weights,
        items: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        ce, kl = hidden.new_zeros((), dtype=wide), hidden.new_zeros((), dtype=wide)
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_head = torch.zeros_like(head) if wants_head else None
        matrix = head.to(hidden.dtype)
        rows = max(1, CHUNK // len(head))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            z = (hidden[part] @ matrix.T).to(wide)
            t = (teacher_hidden[part] @ teacher_head.T).to(wide)
            some_ce, some_kl, grad = _chunk(z, t, labels[part], weights)
            ce += some_ce
            kl += some_kl
            grad_logits = (grad / items).to(hidden.dtype)
            if grad_hidden is not None:
                torch.matmul(grad_logits, matrix, out=grad_hidden[part])
            if grad_head is not None:
                grad_head += grad_logits.T @ hidden[part]
        ce, kl = ce / items, kl / items
        ctx.gradients = (grad_hidden, grad_head)
        ctx.mark_non_differentiable(ce, kl)
        return weights.ce * ce + weights.kl * kl, ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_ce: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        del ctx.gradients  # scaled in place: good for one backward pass
        scaled = (None if gradient is None else gradient.mul_(grad_loss) for gradient in gradients)
        return (*scaled, None, None, None, None, None)


def _chunk(z: Tensor, t: Tensor, labels: Tensor, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of CE, tau^2 times the sum of KL, and the gradient of their weighted sum for z [c, V]. Overwrites z and t."""
    tau = weights.temperature
    log_p = torch.log_softmax(z, -1)
    ce = -log_p.gather(-1, labels[:, None]).sum()
    grad = log_p.exp_()
    grad[torch.arange(len(labels), device=z.device), labels] -= 1
    grad *= weights.ce
    log_p = torch.log_softmax(z.div_(tau), -1)
    log_q = torch.log_softmax(t.div_(tau), -1)
    q = log_q.exp()
    kl = tau**2 * (q * log_q.sub_(log_p)).sum()
    grad += log_p.exp_().sub_(q).mul_(weights.kl * tau)
    return ce, kl, grad


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


class Distillation:
    """Distils into a transformers causal language model while it is trained, whoever calls it, by hooks alone.

    In training mode, when labels are given, the model's loss is `distillation_loss` against `teacher` on the same
    tokens; its own logits then are those of the last token only. Otherwise it computes what it always does.

    Attributes:
        ce, kl: sums of the two parts since `reset`, detached.
        used: whether the model has been asked for its loss since `reset`; some trainers never do.
    """

    def __init__(self, model: Any, stack: nn.Module, teacher: Any, teacher_stack: nn.Module, weights: Weights) -> None:
        """`stack` and `teacher_stack`: the models without their heads.

        Raises:
            ValueError: vocabularies of different sizes, or a head with a bias.
        """
        heads = check_heads(model, teacher)
        self.model, self.head, self.weights = model, heads[0], weights
        self.teacher, self.teacher_stack, self.teacher_head = teacher, teacher_stack, heads[1]
        teacher.requires_grad_(False).eval()
        self.stock_loss = model.loss_function
        model.loss_function = self._loss
        self.hooks = [
            model.register_forward_pre_hook(self._request, with_kwargs=True),
            stack.register_forward_hook(self._capture, with_kwargs=True),
        ]
        self.wanted = False
        self.reset()

    def reset(self) -> None:
        """Begins the sums of a step."""
        self.ce: Tensor | float = 0.0
        self.kl: Tensor | float = 0.0
        self.used = False
        self.captured: tuple[Tensor, Tensor] | None = None

    def remove(self) -> None:
        """Leaves the model as it was."""
        for hook in self.hooks:
            hook.remove()
        self.model.loss_function = self.stock_loss

    def _request(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        self.wanted, self.captured = model.training and kwargs.get("labels") is not None, None
        return args, kwargs | ({"logits_to_keep": 1} if self.wanted else {})

    def _capture(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self.wanted:
            return
        hidden = output[0]
        if next(self.teacher_stack.parameters()).device != hidden.device:
            self.teacher.to(hidden.device)
        with torch.no_grad():
            teacher_hidden = self.teacher_stack(*args, **kwargs | {"past_key_values": None, "use_cache": False})[0]
        self.captured = hidden, teacher_hidden

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """In place of transformers' ForCausalLMLoss, with its arguments."""
        if self.captured is None:
            options = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels, **kwargs}
            return self.stock_loss(logits=logits, labels=labels, vocab_size=vocab_size, **options)
        (hidden, teacher_hidden), self.captured = self.captured, None
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
        loss, ce, kl = distillation_loss(
            hidden.flatten(0, -2),
            self.head.weight,
            teacher_hidden.flatten(0, -2),
            self.teacher_head.weight,
            shift_labels.flatten().to(hidden.device),
            self.weights,
            num_items_in_batch,
        )
        self.ce, self.kl, self.used = self.ce + ce, self.kl + kl, True
        return loss
