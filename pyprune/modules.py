"""The `nn.Module`s made of ops."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyprune import ops


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
