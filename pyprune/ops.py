"""The functional API: ops with gradients, fake kernels and `torch.compile` support.

Each function is documented where it is defined, in `pyprune/_ops/`, a file for each family; `pack_bits` and
`unpack_bits` turn a mask into the bits that the ops take. `using` runs all of them on
one implementation, `choose` tells which one an op would run on, and `OPS` names what the torch dispatcher has.
"""

from __future__ import annotations

from pyprune._ops.bitmap import bitmap_pack, bitmap_unpack, check_bitmap
from pyprune._ops.dispatch import OPS, Implementation, choose, using
from pyprune._ops.hsm import hsm, hsm_residual_rmsnorm
from pyprune._ops.lora_score import lora_group_score
from pyprune._ops.nm import check_nm, nm_compress, nm_decompress, nm_prune
from pyprune._ops.nm_adamw import masked_weight, nm_adamw_
from pyprune._ops.rank import rank_allocate, rank_bucket_grad, rank_mask
from pyprune._ops.sparse_gemm import bitmap_linear, gathered_linear, masked_linear, nm_linear
from pyprune._ops.sparsegpt import sparsegpt_solve
from pyprune._ops.transposable import transposable_prune
from pyprune.reference.bits import pack_bits, unpack_bits

__all__ = [
    "OPS",
    "Implementation",
    "bitmap_linear",
    "bitmap_pack",
    "bitmap_unpack",
    "check_bitmap",
    "check_nm",
    "choose",
    "gathered_linear",
    "hsm",
    "hsm_residual_rmsnorm",
    "lora_group_score",
    "masked_linear",
    "masked_weight",
    "nm_adamw_",
    "nm_compress",
    "nm_decompress",
    "nm_linear",
    "nm_prune",
    "pack_bits",
    "rank_allocate",
    "rank_bucket_grad",
    "rank_mask",
    "sparsegpt_solve",
    "transposable_prune",
    "unpack_bits",
    "using",
]
