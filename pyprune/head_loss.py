"""Losses from the last hidden states, without ever holding the logits of all tokens.

The head's product, the loss and both gradients are computed for a few tokens at a time, already in the forward pass:
of logits only `CHUNK` (`GPU_CHUNK`) exist at one time, in the products' dtype and in fp32.
`torch.nn.functional.linear_cross_entropy` (torch 2.13) does the same for the cross entropy alone; on a CPU it took four
times as long as whole logits, and this two thirds in bf16 (benchmarks/bench_tune_step.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from pyprune.architectures import stack_of, unwrap

CHUNK = 1 << 23  # logits that exist at one time: few fit in a CPU's caches, and products want many rows,
GPU_CHUNK = 1 << 26  # on a GPU more of them: half a thousand with a vocabulary of 128k (docs/pat.md)
IGNORED = -100  # the label of a token that does not count

# (z [c, V], labels [c], rows [c]: which tokens these are) -> sums over them, the loss first; z becomes its gradient.
Terms = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def cross_entropy(z: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor]:
    """`Terms` of the sum of -log softmax(z)[label], whose gradient is softmax(z) - onehot(label)."""
    z -= z.amax(-1, keepdim=True)
    chosen = z.gather(-1, labels[:, None])
    total = z.exp_().sum(-1, keepdim=True)
    loss = (total.log() - chosen).sum()
    z /= total
    z[torch.arange(len(z), device=z.device), labels] -= 1
    return (loss,)


def head_loss(
    hidden: Tensor, head: Tensor, labels: Tensor, items: Tensor | int | None = None, terms: Terms = cross_entropy
) -> tuple[Tensor, ...]:
    """A loss of the logits z = hidden head^T, differentiable once in `hidden` and `head`.

    Under autocast the products have its dtype, else that of `hidden`; everything between them is fp32 (fp64 for fp64).

    Args:
        hidden: the last hidden states, [T, d].
        head: the head's weight, [V, d].
        labels: the next token of each row, [T]; rows of label -100 do not count.
        items: what the sums are divided by; the number of labels when None. With gradient accumulation, that of all
            passes of a step.
        terms: what is summed over the tokens.

    Returns:
        The loss, and for the log whatever else `terms` sums up, detached; all divided by `items`.

    Raises:
        ValueError: the numbers of tokens differ.
    """
    if len(hidden) != len(labels):
        raise ValueError(f"hidden has {len(hidden)} tokens, labels {len(labels)}; expected the same number")
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    rows = (labels != IGNORED).nonzero().squeeze(1)
    divisor = torch.as_tensor(len(rows) if items is None else items, device=hidden.device)
    with torch.autocast(device, enabled=False):
        sums: tuple[Tensor, ...] = _HeadLoss.apply(hidden[rows].to(dtype), head, labels[rows], rows, divisor, terms)
    return sums


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, rows: Tensor, items: Tensor, terms: Terms
    ) -> tuple[Tensor, ...]:
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_head = torch.zeros_like(head) if wants_head else None
        matrix = head.to(hidden.dtype)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        chunk = GPU_CHUNK if hidden.is_cuda else CHUNK
        size = min(len(hidden), max(1, chunk // len(head)))
        # Written again and again: memory that is new at every chunk costs a CPU more than the arithmetic in it.
        narrow_z = hidden.new_empty(size, len(head))
        wide_z = narrow_z if hidden.dtype == wide else torch.empty_like(narrow_z, dtype=wide)
        sums: list[Tensor] = []
        for start in range(0, max(1, len(hidden)), max(1, size)):  # once, if no token counts
            part = slice(start, start + size)
            logits, z = narrow_z[: len(labels[part])], wide_z[: len(labels[part])]
            torch.matmul(hidden[part], matrix.T, out=logits)
            if z is not logits:
                z.copy_(logits)
            found = terms(z, labels[part], rows[part])
            sums = [one + other for one, other in zip(sums, found, strict=True)] if sums else list(found)
            z /= items
            logits.copy_(z)
            if grad_hidden is not None:
                torch.matmul(logits, matrix, out=grad_hidden[part])
            if grad_head is not None:
                grad_head += logits.T @ hidden[part]
        ctx.gradients = (grad_hidden, grad_head)
        loss, *others = (value / items for value in sums)
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        del ctx.gradients  # scaled in place: good for one backward pass
        scaled = (None if gradient is None else gradient.mul_(grad_loss) for gradient in gradients)
        return (*scaled, None, None, None, None)


class HeadLoss:
    """`head_loss` in a transformers causal language model while it is trained, whoever calls it, by hooks alone.

    In training mode, when labels are given, the model's loss is `head_loss` of its last hidden states, and its own
    logits are those of the last token only. Otherwise it computes what it always does.
    """

    def __init__(self, model: Any) -> None:
        """Begins. `applies` says whether the model suits; it may be a PeftModel."""
        stack = stack_of(model)
        assert stack is not None, "applies(model) is to be asked first"
        self.model = cast(Any, unwrap(model))
        self.head = self.model.get_output_embeddings()
        self.stock_loss = self.model.loss_function
        self.model.loss_function = self._loss
        self.hooks = [
            model.register_forward_pre_hook(self._request, with_kwargs=True),
            stack.register_forward_hook(self._capture, with_kwargs=True),
        ]
        self.hidden: Tensor | None = None
        self.wanted = False

    def remove(self) -> None:
        """Leaves the model as it was."""
        for hook in self.hooks:
            hook.remove()
        self.model.loss_function = self.stock_loss

    def loss(self, hidden: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        """The loss for hidden [T, d] and labels [T]."""
        return head_loss(hidden, self.head.weight, labels, items)[0]

    def _request(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        self.wanted, self.hidden = model.training and kwargs.get("labels") is not None, None
        if self.wanted:  # an index, not 1: torch copies the head for every row of a batch that is a slice
            kwargs = kwargs | {"logits_to_keep": torch.tensor([-1], device=self.head.weight.device)}
        return args, kwargs

    def _capture(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.wanted:
            self.hidden = output[0]

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
        if self.hidden is None:
            options = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels, **kwargs}
            loss: Tensor = self.stock_loss(logits=logits, labels=labels, vocab_size=vocab_size, **options)
            return loss
        hidden, self.hidden = self.hidden, None  # it holds the graph
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        return self.loss(hidden.flatten(0, -2), shift_labels.flatten().to(hidden.device), num_items_in_batch)


def applies(model: nn.Module) -> bool:
    """Whether `HeadLoss` gives what the model does: transformers' own loss on the plain product of a known family."""
    stock = cast(Any, unwrap(model))
    if stack_of(stock) is None or getattr(stock, "loss_function", None) is not ForCausalLMLoss:
        return False
    head = stock.get_output_embeddings()
    return type(head) is nn.Linear and head.bias is None  # a packed, quantised or adapted one computes something else
