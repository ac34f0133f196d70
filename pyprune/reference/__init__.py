"""Every op in plain torch, for any floating dtype and device: the oracle of the tests and the fallback.

Shapes and dtypes are those of `pyprune.ops`, flattened to two dimensions. Each function rounds where a careful user of
plain torch would: intermediate results are stored in the inputs' dtype.
"""

from pyprune.reference.bitmap import bitmap_pack, bitmap_unpack
from pyprune.reference.hsm import hsm, hsm_backward, hsm_residual_rmsnorm, hsm_residual_rmsnorm_backward
from pyprune.reference.lora_score import lora_group_score
from pyprune.reference.nm import nm_compress, nm_decompress, nm_prune
from pyprune.reference.nm_adamw import masked_weight, nm_adamw_
from pyprune.reference.rank import rank_bucket_grad, rank_mask
from pyprune.reference.sparse_gemm import bitmap_linear, gathered_linear, masked_linear, nm_linear
from pyprune.reference.sparsegpt import sparsegpt_solve
from pyprune.reference.transposable import transposable_prune

name = "reference"
description = "plain torch"

__all__ = [
    "bitmap_linear",
    "bitmap_pack",
    "bitmap_unpack",
    "description",
    "gathered_linear",
    "hsm",
    "hsm_backward",
    "hsm_residual_rmsnorm",
    "hsm_residual_rmsnorm_backward",
    "lora_group_score",
    "masked_linear",
    "masked_weight",
    "name",
    "nm_adamw_",
    "nm_compress",
    "nm_decompress",
    "nm_linear",
    "nm_prune",
    "rank_bucket_grad",
    "rank_mask",
    "sparsegpt_solve",
    "transposable_prune",
]
