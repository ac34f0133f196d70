"""Every op in plain torch, for any floating dtype and device: the oracle of the tests and the fallback.

Shapes and dtypes are those of `pyprune.ops`, flattened to two dimensions. Each function rounds where a careful user of
plain torch would: intermediate results are stored in the inputs' dtype.
"""

from pyprune.reference.hsm import hsm, hsm_backward, hsm_residual_rmsnorm, hsm_residual_rmsnorm_backward
from pyprune.reference.lora_score import lora_group_score
from pyprune.reference.nm_adamw import masked_weight, nm_adamw_
from pyprune.reference.transposable import transposable_prune

name = "reference"
description = "plain torch"

__all__ = [
    "description",
    "hsm",
    "hsm_backward",
    "hsm_residual_rmsnorm",
    "hsm_residual_rmsnorm_backward",
    "lora_group_score",
    "masked_weight",
    "name",
    "nm_adamw_",
    "transposable_prune",
]
