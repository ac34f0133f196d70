"""The ops on the C++ CPU kernels of `pyprune._C.cpu`, one file a family. Each class below has its family's ops."""

from pyprune._cpu.hsm import Hsm
from pyprune._cpu.lora_score import LoraScore
from pyprune._cpu.nm_adamw import NmAdamw
from pyprune._cpu.rank import Rank
from pyprune._cpu.sparse_gemm import SparseGemm
from pyprune._cpu.sparsegpt import SparseGpt
from pyprune._cpu.transposable import Transposable


class CpuKernels(Hsm, LoraScore, NmAdamw, Rank, SparseGemm, SparseGpt, Transposable):
    """See `pyprune.ops.Implementation`."""

    name = "cpu"

    @property
    def description(self) -> str:
        """What runs, in words."""
        return f"C++, {self.kernels.isa()}, dense products by torch"
