"""The ops on the CUDA launchers of `pyprune._C.cuda`, one file a family. Each class below has its family's ops."""

from pyprune._cuda.common import runs_on
from pyprune._cuda.hsm import Hsm
from pyprune._cuda.lora_score import LoraScore
from pyprune._cuda.rank import Rank
from pyprune._cuda.sparse_gemm import SparseGemm
from pyprune._cuda.sparsegpt import SparseGpt
from pyprune._cuda.transposable import Transposable

__all__ = ["CudaKernels", "runs_on"]


class CudaKernels(Hsm, LoraScore, Rank, SparseGemm, SparseGpt, Transposable):
    """See `pyprune.ops.Implementation`."""

    name = "cuda"
    description = "CUDA, dense products by torch"
