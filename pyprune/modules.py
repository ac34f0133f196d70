"""The `nn.Module`s made of ops."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from pyprune import ops
from pyprune.schedules import Schedule


class HSM(nn.Module):
    """Hybrid sparsification module: y = mask * (D x), D = L1 diag(v) L0 + I (PAT, arXiv 2408.14721, eq. 4-6).

    L0 and L1 start orthonormal and v at zero, so D = I exactly; `identity_loss` keeps them orthonormal while v takes
    the scale. Parameters are fp32 whatever the model's dtype.

    Attributes:
        l0: [r, d], v: [r], l1: [d, r].
        outputs: how many channels `forward` writes, d until `keep`. It is not part of the state dict.
    """

    def __init__(
        self,
        hidden_size: int,
        rank: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Starts as the identity.

        Args:
            hidden_size: d.
            rank: r, between 1 and d; the paper takes about d / 20.
            device: where the parameters live.
            generator: draws L0 and L1; on `device`.

        Raises:
            ValueError: `rank` is not between 1 and `hidden_size`: more than d rows of length d cannot be orthonormal.
        """
        super().__init__()
        if not 1 <= rank <= hidden_size:
            raise ValueError(f"HSM: rank is {rank}, expected 1 to hidden_size = {hidden_size}")
        self.hidden_size = hidden_size
        self.rank = rank
        self.outputs = hidden_size
        self.l0 = nn.Parameter(torch.empty(rank, hidden_size, dtype=torch.float32, device=device))
        self.v = nn.Parameter(torch.zeros(rank, dtype=torch.float32, device=device))
        self.l1 = nn.Parameter(torch.empty(hidden_size, rank, dtype=torch.float32, device=device))
        for matrix in (self.l0, self.l1):
            nn.init.orthogonal_(matrix, generator=generator)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [..., d], mask [outputs] -> [..., outputs] in x's dtype."""
        l0, l1 = self.l0.to(x.dtype), self.l1[: self.outputs].to(x.dtype)
        statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
        return ops.hsm(x, l0, self.v.to(statistics), l1, mask.to(statistics))

    def identity_loss(self) -> Tensor:
        """||L0 L0^T - I||_F + ||L1^T L1 - I||_F, a scalar. At exactly zero the gradient is zero (vector_norm's own)."""
        identity = torch.eye(self.rank, dtype=self.l0.dtype, device=self.l0.device)
        products = (self.l0 @ self.l0.T, self.l1.T @ self.l1)
        return sum((torch.linalg.vector_norm(product - identity) for product in products), start=self.v.new_zeros(()))

    @torch.no_grad()
    def transform(self) -> Tensor:
        """D [d, d] in fp64, for folding into the weights before it: y = mask * (x D^T). After `keep`, kept first."""
        l0, v, l1 = self.l0.double(), self.v.double(), self.l1.double()
        return l1 @ (v[:, None] * l0) + torch.eye(self.hidden_size, dtype=torch.float64, device=l0.device)

    @torch.no_grad()
    def keep(self, kept: Tensor) -> Tensor:
        """Early compaction: from now on x comes with the kept channels first, and only they are written.

        L0's columns and L1's rows are reordered in place. L1 keeps its pruned rows, so identity_loss does not change.

        Args:
            kept: indices of the channels to keep, in the order wanted.

        Returns:
            The order [d]: new channel i is old channel order[i]. Optimiser state of l0 (columns) and l1 (rows) needs
            the same reordering.

        Raises:
            ValueError: no index, a repeated one, one outside 0 ... d - 1, or the module is compact already.
        """
        if self.outputs != self.hidden_size:
            raise ValueError(f"HSM.keep: already compact, {self.outputs} of {self.hidden_size} channels are written")
        kept = kept.to(self.l0.device, torch.long)
        valid = kept.dim() == 1 and len(kept) > 0 and int(kept.min()) >= 0 and int(kept.max()) < self.hidden_size
        if not valid or len(kept.unique()) != len(kept):
            raise ValueError(
                f"HSM.keep: kept is {kept.tolist()}, expected distinct indices in 0 ... {self.hidden_size - 1}"
            )
        pruned = torch.ones(self.hidden_size, dtype=torch.bool, device=kept.device)
        pruned[kept] = False
        order = torch.cat([kept, pruned.nonzero().flatten()])
        self.l0.copy_(self.l0[:, order])
        self.l1.copy_(self.l1[order])
        self.outputs = len(kept)
        return order

    def extra_repr(self) -> str:
        compact = f", outputs={self.outputs}" if self.outputs != self.hidden_size else ""
        return f"hidden_size={self.hidden_size}, rank={self.rank}{compact}"


class SparseLinear(nn.Linear):
    """y = x W^T + b with W [out, in] packed: N:M, or a bitmap of any sparsity (docs/architecture.md, "Packed weights").

    It is an `nn.Linear` whose `weight` is None, so that PEFT puts LoRA on top of it. The packed tensors are frozen
    parameters: gradients go to x, to the bias and to SLoRB's part.

    Attributes:
        pattern: (n, m), or None for a bitmap.
        values, metadata (N:M) or values, bitmap, offsets: what `ops.nm_compress` or `ops.bitmap_pack` returns.
        slorb: the low-rank part beside it (`pyprune.masked.SLoRB`), or None.
        transposed: whether it stands for a layer that stores [in, out], transformers' Conv1D.
    """

    values: nn.Parameter
    metadata: nn.Parameter
    bitmap: nn.Parameter
    offsets: nn.Parameter

    def __init__(
        self,
        packed: Mapping[str, Tensor],
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None = None,
        pattern: tuple[int, int] | None = None,
        *,
        slorb: nn.Module | None = None,
        transposed: bool = False,
    ) -> None:
        """Takes packed tensors as they are; `check` looks into those that come from elsewhere."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.pattern, self.slorb, self.transposed = pattern, slorb, transposed
        self.register_parameter("weight", None)
        for name in self.parts(pattern):
            self.register_parameter(name, nn.Parameter(packed[name], requires_grad=False))
        self.register_parameter("bias", bias)

    @staticmethod
    def parts(pattern: tuple[int, int] | None) -> tuple[str, ...]:
        """Names of the packed tensors."""
        return ("values", "bitmap", "offsets") if pattern is None else ("values", "metadata")

    @classmethod
    @torch.no_grad()
    def pack(
        cls, weight: Tensor, bias: nn.Parameter | None = None, pattern: tuple[int, int] | None = None, **options: Any
    ) -> SparseLinear:
        """Packs a dense weight [out, in] bit for bit; `options` as of the class.

        Raises:
            TypeError: `pattern` is not two numbers, such as (2, 4), or None.
            ValueError: the zeros are not those of `pattern`; the first group that does not fit is named.
        """
        if isinstance(pattern, str):
            raise TypeError(f"pattern is {pattern!r}; expected two numbers, such as (2, 4), or None for a bitmap")
        tensors = ops.bitmap_pack(weight) if pattern is None else ops.nm_compress(weight, *pattern)
        packed = dict(zip(cls.parts(pattern), tensors, strict=True))
        return cls(packed, weight.shape[1], weight.shape[0], bias, pattern, **options)

    def packed(self) -> dict[str, Tensor]:
        """The packed tensors by name."""
        return {name: self.get_parameter(name) for name in self.parts(self.pattern)}

    def check(self) -> None:
        """Raises TypeError or ValueError unless the packed tensors are consistent; kernels trust them."""
        shape = (self.out_features, self.in_features)
        if self.pattern is None:
            ops.check_bitmap(self.values, self.bitmap, self.offsets, *shape)
        else:
            ops.check_nm(self.values, self.metadata, *self.pattern, shape)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]; under autocast in the dtype of the values."""
        if self.pattern is None:
            sizes = (self.out_features, self.in_features)
            y = ops.bitmap_linear(x, self.values, self.bitmap, self.offsets, *sizes, self.bias)
        else:
            y = ops.nm_linear(x, self.values, self.metadata, *self.pattern, self.bias)
        return y if self.slorb is None else y + self.slorb(x)

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """W [out, in], dense, with SLoRB's part added."""
        if self.pattern is None:
            sizes = (self.out_features, self.in_features)
            weight = ops.bitmap_unpack(self.values, self.bitmap, self.offsets, *sizes)
        else:
            weight = ops.nm_decompress(self.values, self.metadata, *self.pattern)
        low_rank: Any = self.slorb
        return weight if low_rank is None else weight + low_rank.matrix().to(weight.dtype)

    @property
    def qweight(self) -> Tensor:
        """The values, by the name at which PEFT looks for the device and dtype of a layer without a weight."""
        return self.values

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight, without bias and SLoRB's part."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.packed().values())

    def extra_repr(self) -> str:
        packing = "bitmap" if self.pattern is None else "{}:{}".format(*self.pattern)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {packing}"
        )


class _OwnOptimizer(nn.Module):
    """A choice of channels that is trained by its own Adam, apart from the Trainer's optimiser.

    `forward` reads a leaf tensor, `value`, whose gradient gathers over all passes of an optimiser step; `learn` turns
    it into a step. State is in buffers, so that it moves and is saved with the model.
    """

    value: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: Tensor

    def _track(self, shape: torch.Size) -> None:
        self.register_buffer("exp_avg", torch.zeros(shape))
        self.register_buffer("exp_avg_sq", torch.zeros(shape))
        self.register_buffer("steps", torch.zeros(()))

    def _take_gradient(self) -> Tensor:
        """The leaf's gradient, the mean over all processes."""
        if self.value.grad is None:
            raise RuntimeError(f"{type(self).__name__}: no gradient reached it; is the loss computed with its model?")
        gradient, self.value.grad = self.value.grad, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(gradient)
            gradient /= torch.distributed.get_world_size()
        return gradient

    def _adam(self, parameter: Tensor, gradient: Tensor, learning_rate: float) -> None:
        adam(
            [parameter],
            [gradient],
            [self.exp_avg],
            [self.exp_avg_sq],
            [],
            [self.steps],
            foreach=False,
            amsgrad=False,
            beta1=0.9,
            beta2=0.99,
            lr=learning_rate,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )


def temperature(step: int, milestone: int) -> float:
    """tau(s) = 1 / (1 - ln s / ln s0) for s < s0, which rises from 0 without bound (PAT, eq. 8)."""
    return 0.0 if step == 0 else 1 / (1 - math.log(step) / math.log(milestone))


def offset(step: int, milestone: int) -> float:
    """beta(s) = max(1/2 - s/s0, 0) (PAT, eq. 9)."""
    return max(0.5 - step / milestone, 0.0)


class UnifiedMask(_OwnOptimizer):
    """The mask that all HSMs share: m = sigmoid(tau(s) w) + beta(s), one proxy w a channel (PAT, eq. 7-9).

    With w = 0 at the start, m = 1 at s = 0. The proxies follow the task's gradient and the active loss
    |count - target|, count = sum 1(w > 0). The straight-through gradient of that loss is the same for every proxy, so
    it is followed to its minimum in one go: a shift of all proxies, after which the count *is* the target. The target
    falls linearly from d to `kept` and is there before the milestone, so that nothing is left to be cut then.

    Attributes:
        proxy: w [d]. value: m [d] of this step. kept: how many channels are to stay.
    """

    PULL = 2.5  # a step moves a proxy by this times the learning rate times its distance from +-1/2
    ANNEALED = 0.8  # share of the way to the milestone after which the target count is `kept`

    proxy: Tensor

    def __init__(self, hidden_size: int, kept: int, learning_rate: float) -> None:
        """Starts with m = 1; of equal proxies the last channels, those of least variance in a pca basis, go first."""
        super().__init__()
        self.kept, self.learning_rate = kept, learning_rate
        self.register_buffer("proxy", torch.linspace(1e-3, 1e-4, hidden_size))
        self.register_buffer("value", torch.ones(hidden_size), persistent=False)
        self._track(self.proxy.shape)

    def forward(self, x: Tensor, hsm: HSM | None) -> Tensor:
        """x [..., d], a writer's output -> [..., n], transformed by its HSM if it has one, and masked."""
        return x * self.value.to(x.dtype) if hsm is None else hsm(x, self.value)

    def begin(self, step: int, milestone: int) -> None:
        """Sets the mask of `step`, counted from 0, as a fresh leaf."""
        mask = torch.sigmoid(temperature(step, milestone) * self.proxy) + offset(step, milestone)
        self.value = mask.detach().requires_grad_()

    @torch.no_grad()
    def learn(self, step: int, milestone: int) -> dict[str, float]:
        """Moves the proxies by the gradient that has gathered; returns figures for the log."""
        target, before = self.target(step + 1, milestone), self.count()
        slope = temperature(step, milestone) or 1e-3  # at s = 0 the mask does not depend on w; its order still does
        sigmoid = torch.sigmoid(slope * self.proxy)
        self._adam(self.proxy, self._take_gradient() * slope * sigmoid * (1 - sigmoid), self.learning_rate)
        ends = torch.where(self.proxy > 0, 0.5, -0.5)
        self.proxy += self.PULL * self.learning_rate * (ends - self.proxy)
        self._meet(target)
        return self._figures(before, target)

    def _figures(self, before: Tensor, target: int) -> dict[str, float]:
        """For the log, in one transfer: the counts before and now; and the mask of this step: of as many of the
        smallest values as are to go, the mean and the largest; of those that stay, the smallest and the mean."""
        ranked = self.value.detach().sort().values
        going, staying = ranked.split([len(ranked) - self.kept, self.kept])
        names = ("mask_going", "mask_going_max", "mask_staying_min", "mask_staying")
        counts = before.to(ranked), self.count().to(ranked)
        was, now, *spread = torch.stack([*counts, going.mean(), going[-1], staying[0], staying.mean()]).tolist()
        figures = {"mask_count": int(now), "mask_target": target, "active_loss": abs(was - target) / self.kept}
        return figures | dict(zip(names, spread, strict=True))

    def target(self, step: int, milestone: int) -> int:
        """How many proxies are to be positive at `step`."""
        ramp = Schedule(len(self.proxy), self.kept, math.ceil(self.ANNEALED * milestone), shape="linear")
        return round(ramp(step))

    def count(self) -> Tensor:
        """How many proxies are positive, a scalar on their device."""
        return (self.proxy > 0).sum()

    def _meet(self, target: int) -> None:
        order = self.proxy.sort(descending=True).values
        below = order[target] if target < len(order) else order[-1] - 2e-4
        shift = (order[target - 1] + below) / 2
        self.proxy -= shift.masked_fill(self.count() == target, 0)

    @torch.no_grad()
    def freeze(self) -> tuple[None, Tensor]:
        """No rotation, and the channels that stay: the `kept` largest proxies.

        Raises:
            RuntimeError: the count misses the target by more than 1 %, so that the choice would be an arbitrary one.
        """
        count = int(self.count())
        if abs(count - self.kept) > 0.01 * self.kept:
            raise RuntimeError(
                f"the mask keeps {count} channels at the milestone, not {self.kept}, though each step sets the count; "
                "its proxies are not finite, or equal: look at the loss, and lower mask_learning_rate"
            )
        return None, self.proxy.topk(self.kept).indices.sort().values.cpu()

    @classmethod
    def binary(cls, hidden_size: int, kept: Tensor, compact: bool) -> UnifiedMask:
        """The frozen mask: ones on the channels `kept`, zeros elsewhere; only the ones if the model is `compact`."""
        mask = cls(len(kept) if compact else hidden_size, len(kept), 0.0)
        if not compact:
            mask.value = torch.zeros(hidden_size).index_fill_(0, kept, 1.0)
        return mask


class LearnedSubspace(_OwnOptimizer):
    """Drops a *learned* subspace of the hidden space instead of a choice of channels: y = z - (1 - m) U U^T z.

    U [d, k] is orthonormal, the same for all HSMs, and follows the task's gradient on the Grassmann manifold (tangent
    projection, Adam, QR as retraction), from the k principal axes of least variance at the start. m, one number, is the
    mask of a channel whose proxy is at -1/2. With `groups` [d], the numbers of those channels that a rotation may mix
    (`basis.mixable`), every column stays in the group where it starts. `freeze` returns the rotation that makes U the
    last k axes, so the result is an ordinary pruned model: choosing among channels is the special case in which U is a
    set of axes.
    """

    CLOSED = 0.1  # share of the way to the milestone at which m is zero; U goes on learning until the milestone

    def __init__(self, hidden_size: int, kept: int, learning_rate: float, groups: Tensor | None = None) -> None:
        super().__init__()
        self.kept, self.learning_rate, self.mask = kept, learning_rate, 1.0
        groups = torch.zeros(hidden_size, dtype=torch.int64) if groups is None else groups
        self.register_buffer("value", torch.eye(hidden_size)[:, kept:].contiguous())
        self.register_buffer("groups", groups, persistent=False)
        self.register_buffer("everything", torch.ones(hidden_size), persistent=False)
        self._track(self.value.shape)

    def forward(self, x: Tensor, hsm: HSM | None) -> Tensor:
        """x [..., d], a writer's output -> [..., d], transformed by its HSM if it has one, without U's share."""
        z = x if hsm is None else hsm(x, self.get_buffer("everything"))
        u = self.value.to(z.dtype)  # by each writer: of one for all, z's dtype would have to hold the sum of gradients
        return z - ((1 - self.mask) * (z @ u)) @ u.T

    def begin(self, step: int, milestone: int) -> None:
        """Sets the strength of the mask at `step` and U as a fresh leaf."""
        closed = max(1, round(self.CLOSED * milestone))
        soft = torch.sigmoid(torch.tensor(-0.5 * temperature(step, closed))) if step < closed else 0.0
        self.mask = float(soft) + offset(step, closed)
        self.value = self.value.detach().requires_grad_()

    @torch.no_grad()
    def learn(self, step: int, milestone: int) -> dict[str, float]:
        """Moves U by the gradient that has gathered, in steps that fall to zero at the milestone."""
        u, groups = self.value.detach(), self.get_buffer("groups")
        inside = groups[:, None] == groups[self.kept :]
        gradient = self._take_gradient() * inside
        tangent = gradient - u @ (u.T @ gradient)
        self._adam(u, tangent, self.learning_rate * (1 - step / milestone))
        q, r = torch.linalg.qr(u)
        q = q * r.diagonal().sign() * inside
        self.value = q.contiguous()  # as a checkpoint has it: products round by layout
        return {"mask": self.mask, "mask_count": self.kept, "mask_target": self.kept}

    @torch.no_grad()
    def freeze(self) -> tuple[Tensor, Tensor]:
        """R [d, d] in fp64, orthogonal, whose last k columns span U, and the channels of x R that stay: the first."""
        u, groups = self.value.detach().double().cpu(), self.get_buffer("groups").cpu()
        kept, dropped = [], []
        for group in groups.unique():
            rows, columns = groups == group, groups[self.kept :] == group
            q = torch.zeros(len(u), int(rows.sum()), dtype=u.dtype)
            q[rows] = torch.linalg.qr(u[rows][:, columns], mode="complete").Q
            dropped.append(q[:, : int(columns.sum())])
            kept.append(q[:, int(columns.sum()) :])
        return torch.cat([*kept, *dropped], dim=1), torch.arange(self.kept)
