"""The launchers of csrc/hsm_fused.h against fp64: inputs, the maths once more in plain torch, the tolerance.

Used on the emulator (test_kernels.py) and on a device (tests/gpu/test_device_kernels.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DTYPES = tuple(DTYPE_CODES)
EPS = 1e-5

Tensors = dict[str, Tensor]


class Shape(NamedTuple):
    tokens: int
    hidden: int
    rank: int
    outputs: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


SHAPES = (
    Shape(1, 1, 1, 1),
    Shape(1, 128, 8, 128),  # One token: the sum over d is split over blocks.
    Shape(65, 192, 24, 136),  # A second row block of one row; outputs < hidden; rows in whole 16-byte pieces.
    Shape(33, 131, 31, 97),  # Nothing aligned.
    Shape(130, 264, 136, 264),  # Two column blocks of h, three of y, three of rows.
    Shape(7, 40, 65, 33),  # Rank above hidden size, one past the pipeline stage.
)
EMPTY_SHAPES = (Shape(0, 16, 4, 8), Shape(3, 16, 4, 0), Shape(3, 16, 0, 8))


@dataclass
class Launchers:
    """The bound functions of one build, and where its memory comes from."""

    cuda: ModuleType
    copy: Callable[[Tensor], Tensor]
    empty: Callable[..., Tensor]
    stream: Callable[[], int] = lambda: 0

    def run(self, function: str, shape: Shape, inputs: Tensors, outputs: Tensors, *options: float) -> Tensors:
        """Calls one launcher on fresh copies; `outputs` are like the given ones, poisoned with NaN first."""
        dtype = inputs["dtype_of"].dtype
        arguments = [self.copy(tensor) for name, tensor in inputs.items() if name != "dtype_of"]
        results = {name: self.poisoned(tensor) for name, tensor in outputs.items()}
        code = DTYPE_CODES[dtype]
        workspace = self.empty(self.cuda.hsm_workspace(shape, code), dtype=torch.uint8).fill_(0xFF)
        addresses = [tensor.data_ptr() for tensor in (*arguments, *results.values(), workspace)]
        getattr(self.cuda, function)(shape, code, *options, *addresses, self.stream())
        for before, after in zip((t for n, t in inputs.items() if n != "dtype_of"), arguments, strict=True):
            assert torch.equal(before.cpu(), after.cpu()), f"{function} changed an input"
        return {name: tensor.cpu().clone() for name, tensor in results.items()}

    def poisoned(self, like: Tensor) -> Tensor:
        return self.empty(*like.shape, dtype=like.dtype).fill_(float("nan"))


def make_inputs(shape: Shape, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Tensors:
    """Everything any launcher reads, of the sizes met in training: unit-variance rows, orthonormal-like l0 and l1."""
    tokens, hidden, rank, outputs = shape
    g = torch.Generator(device).manual_seed(seed)
    draw = {"generator": g, "device": device}

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, **draw) * scale).to(dtype)

    mask = torch.rand(outputs, **draw)
    mask[::5] = 0.0  # A pruned channel is exactly zero.
    return {
        "x": normal(tokens, hidden),
        "l0": normal(rank, hidden, scale=max(hidden, 1) ** -0.5),
        "v": torch.randn(rank, **draw),
        "l1": normal(outputs, rank, scale=max(rank, 1) ** -0.5),
        "mask": mask,
        "residual": normal(tokens, outputs),
        "weight": normal(outputs),
        "h": normal(tokens, rank),
        "grad_y": normal(tokens, outputs),
        "residual_out": normal(tokens, outputs),
        "grad_normed": normal(tokens, outputs),
        "rstd": torch.rand(tokens, **draw) + 0.5,
    }


# The maths of csrc/hsm_fused.h for any dtype: in fp64 the reference, in the inputs' dtype what plain torch makes of it.


def forward(t: Tensors) -> Tensors:
    x, n = t["x"], len(t["mask"])
    h = x @ t["l0"].T
    z = (h * t["v"].to(x.dtype)) @ t["l1"].T
    return {"y": t["mask"].to(x.dtype) * (x[:, :n] + z), "h": h}


def residual_rmsnorm(t: Tensors) -> Tensors:
    y, h = forward(t).values()
    residual_out = t["residual"] + y
    rstd = (residual_out.to(t["v"].dtype).square().mean(-1) + EPS).rsqrt()
    normed = residual_out * rstd[:, None].to(y.dtype) * t["weight"]
    return {"residual_out": residual_out, "normed": normed, "h": h, "rstd": rstd}


def backward(t: Tensors) -> Tensors:
    x, grad_y, n = t["x"], t["grad_y"], len(t["mask"])
    wide = t["v"].dtype
    masked = grad_y * t["mask"].to(x.dtype)
    u = masked @ t["l1"]
    grad_p = u * t["v"].to(x.dtype)
    grad_x = grad_p @ t["l0"]
    grad_x[:, :n] += masked
    return {
        "grad_x": grad_x,
        "grad_p": grad_p,
        "grad_v": (t["h"].to(wide) * u.to(wide)).sum(0),
        "column_dot": (grad_y.to(wide) * x[:, :n].to(wide)).sum(0),
    }


def rmsnorm_backward(t: Tensors) -> Tensors:
    dtype, wide = t["weight"].dtype, t["rstd"].dtype
    rstd = t["rstd"][:, None].to(dtype)
    q = t["residual_out"] * rstd
    a = t["weight"] * t["grad_normed"]
    mean = (a * q).to(wide).mean(-1, keepdim=True).to(dtype)
    return {
        "grad_residual": t["grad_y"] + rstd * (a - q * mean),
        "grad_weight": (t["grad_normed"].to(wide) * q.to(wide)).sum(0),
    }


@dataclass(frozen=True)
class Op:
    """One launcher: its C++ name, its inputs in order, its maths, its options."""

    function: str
    inputs: tuple[str, ...]
    maths: Callable[[Tensors], Tensors]
    options: tuple[float, ...] = ()

    def __str__(self) -> str:
        return self.function

    def launch(self, launchers: Launchers, shape: Shape, tensors: Tensors) -> Tensors:
        like = self.maths(tensors)
        if self.function == "hsm_residual_rmsnorm_forward":
            like["rstd"] = like["rstd"].float()
        arguments = {"dtype_of": tensors["x"]} | {name: tensors[name] for name in self.inputs}
        return launchers.run(self.function, shape, arguments, like, *self.options)


OPS = (
    Op("hsm_forward", ("x", "l0", "v", "l1", "mask"), forward),
    Op(
        "hsm_residual_rmsnorm_forward",
        ("x", "l0", "v", "l1", "mask", "residual", "weight"),
        residual_rmsnorm,
        (EPS,),
    ),
    Op("hsm_backward", ("grad_y", "x", "h", "l0", "v", "l1", "mask"), backward),
    Op("rmsnorm_backward", ("grad_y", "grad_normed", "residual_out", "rstd", "weight"), rmsnorm_backward),
)


def roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to nearest in `dtype`."""
    return torch.finfo(dtype).eps / 2


def check(op: Op, tensors: Tensors, results: Tensors) -> None:
    """Each output's largest error is at most twice that of plain torch in the same dtype, plus one rounding.

    The added term is the roundoff of the output's dtype at its largest element (of the fp32 sums: at four times that),
    without which a plain result that happens to be exact, as for one token, would demand exactness.
    """
    exact = op.maths({name: tensor.double() for name, tensor in tensors.items()})
    plain = op.maths(tensors)
    for name, found in results.items():
        right = exact[name]
        result = found.to(right.device)
        assert torch.equal(result.isnan(), right.isnan()), f"{op}: {name} holds NaN: wrong, or never written"
        if right.isnan().any() or right.numel() == 0:  # The mean over no column.
            continue
        scale = right.abs().max()
        slack = roundoff(result.dtype) * scale * (4 if result.dtype == torch.float32 else 1)
        error = (result.double() - right).abs().max()
        allowed = 2 * (plain[name].double() - right).abs().max() + slack
        assert error <= allowed, f"{op}: {name} is off by {error:.3e}, allowed {allowed:.3e} at scale {scale:.2e}"
