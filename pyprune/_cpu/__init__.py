"""The ops on the C++ CPU kernels of `pyprune._C.cpu`, one file a family. Each class below has its family's ops."""

from pyprune._cpu.hsm import Hsm
from pyprune._cpu.nm_adamw import NmAdamw
from pyprune._cpu.rank import Rank


class CpuKernels(Hsm, NmAdamw, Rank):
    """See `pyprune.ops.Implementation`."""

    name = "cpu"

    @property
    def description(self) -> str:
        """What runs, in words."""
        return f"C++, {self.kernels.isa()}, dense products by torch"
