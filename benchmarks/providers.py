"""What a user would run instead of our ops, as contenders: each as its documentation says it is fastest.

A provider takes a case of `pyprune.speed` and returns a contender, or says in a line why there is none here. What is
not a dependency (bitsandbytes) is found at run time. Models have their rivals in their own scripts: PEFT's LoRA in
bench_pat_step.py and bench_loraprune_step.py, llama.cpp in bench_llama_cpp.py, other methods' recipes in
bench_blockwise.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pyprune import ops, reference
from pyprune._cpu.sparse_gemm import product_dtype
from pyprune.reference.bits import unpack_bits
from pyprune.speed import Case
from pyprune.timing import Contender, Data, copy_of

Provider = Callable[[Case], Contender | str]
CSR_TOKENS = 64
"""Up to which torch's sparse rows are measured on a GPU: 28672 x 4096 at 50 % takes an H100 15.7 ms, dense 0.09."""


def on(run: Callable[..., object], data: Data) -> Contender:
    """A call on data sets of the same values, each in memory of its own."""
    return Contender(run, partial(copy_of, data))


def eager(case: Case) -> Contender:
    """The op in plain torch calls; of a packed weight torch's product with the dense one."""
    return on(case.eager, case.eager_data)


def compiled(write: Callable[[Case], Contender]) -> Provider:
    """What another provider runs, compiled for exactly these shapes."""

    def provider(case: Case) -> Contender:
        torch._dynamo.reset()  # it gives up on a function that it has compiled for eight shapes
        contender = write(case)
        return Contender(torch.compile(contender.run, dynamic=False), contender.make)

    return provider


# ------------------------------------------------------------------------------------- products with a weight of zeros


def dense_fp32(case: Case) -> Contender | str:
    """The dense product in fp32, twice the bytes, where torch multiplies 16 bits in plain loops."""
    x, weight = case.eager_data
    if x.device.type != "cpu" or product_dtype(x.dtype) == x.dtype:
        return f"{str(x.dtype).removeprefix('torch.')} products are as fast here"
    return on(linear, (x.float(), weight.float()))


def onednn(case: Case) -> Contender | str:
    """oneDNN's dense product with the weight in its own layout."""
    from torch.utils.mkldnn import to_mkldnn

    x, weight = case.eager_data
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return "it is for processors, where torch is built with it"
    if product_dtype(x.dtype) != x.dtype:
        return f"this processor has no instructions for {str(x.dtype).removeprefix('torch.')} products"

    def make() -> Data:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight.float(), requires_grad=False)
        return x.clone(), to_mkldnn(layer, weight.dtype)

    return Contender(lambda x, layer: layer(x), make)


def csr(case: Case) -> Contender | str:
    """torch's sparse rows. With indices of 32 bits they are up to four times as fast as with the 64 that torch makes;
    inputs are transposed, twice as fast as `linear` for 16 tokens; on a CPU in fp32, since MKL has no 16-bit products.
    """
    x, weight = case.eager_data
    if x.is_cuda and len(x) > CSR_TOKENS:
        return f"at {CSR_TOKENS} tokens a hundred times slower than dense, and its time grows with them"
    kind = torch.float32 if x.device.type == "cpu" else x.dtype

    def make() -> Data:
        wide = weight.to(kind).to_sparse_csr()
        indices = (part.int() for part in (wide.crow_indices(), wide.col_indices()))
        return x.to(kind, copy=True), torch.sparse_csr_tensor(*indices, wide.values(), wide.shape)

    return Contender(lambda x, weight: (weight @ x.T).T, make)


def semi_structured(backend: str) -> Provider:
    """torch's own 2:4 tensors on the library CUTLASS or CUSPARSELT."""

    def provider(case: Case) -> Contender | str:
        x, weight = case.eager_data
        if weight.device.type != "cuda":
            return "torch's 2:4 tensors need a CUDA device"
        kind = getattr(torch.sparse, f"SparseSemiStructuredTensor{backend}")
        return Contender(linear, lambda: (x.clone(), kind.from_dense(weight)))

    return provider


def bitsandbytes(case: Case) -> Contender | str:
    """Weights of four bits (NF4) instead of fewer weights; products in the dtype of the inputs."""
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError as error:
        return f"bitsandbytes cannot be imported ({error}); pip install bitsandbytes"
    x, weight = case.eager_data

    def make() -> Data:
        rows, columns = weight.shape
        layer = Linear4bit(columns, rows, bias=False, compute_dtype=x.dtype, quant_type="nf4")
        layer.load_state_dict({"weight": weight.cpu()})
        return x.clone(), layer.to(x.device)  # which quantizes

    return Contender(lambda x, layer: layer(x), make)


# --------------------------------------------------------------------------------------------- part of a weight's zeros


def masked(case: Case) -> Contender:
    """The mask, of bytes, multiplied into the weight and the product with that."""
    x, weight, bits = case.data
    return on(lambda x, weight, kept: linear(x, weight * kept), (x, weight, unpack_bits(bits, weight.shape[1])))


def masked_before(case: Case) -> Contender:
    """The product alone, with a weight that has its zeros."""
    x, weight, bits = case.data
    return on(linear, (x, ops.masked_weight(weight, bits)))


def scattered(case: Case) -> Contender:
    """The whole product, on inputs whose other channels are zero."""
    x, weight, keep = case.data
    return on(linear, (x.new_zeros(len(x), weight.shape[1]).index_copy_(1, keep, x), weight))


def sliced(case: Case) -> Contender:
    """The product with a copy of the kept columns, which somebody has to make and to hold."""
    x, weight, keep = case.data
    return on(linear, (x, weight[:, keep].contiguous()))


# ----------------------------------------------------------------------------------------- criteria and the optimiser


def rank_mask(case: Case) -> Contender:
    """BESA's mask in a line."""
    return on(lambda weight, rank, threshold: weight * (rank.int() >= threshold[:, None]), case.data)


def lora_score(case: Case) -> Contender:
    """LoRAPrune's formula as its authors' code computes it."""
    scale, dim = (case.ours.keywords[name] for name in ("scale", "dim"))  # type: ignore[attr-defined]

    def score(w: Tensor, a: Tensor, b: Tensor, ga: Tensor, gb: Tensor) -> Tensor:
        return ((gb @ a + b @ ga - gb @ ga) * (w.to(a.dtype) + scale * b @ a)).abs().sum(1 - dim)

    return on(score, case.data)


def lora_score_in_slabs(case: Case) -> Contender:
    """The same in slabs of rows, so that nothing of the weight's size is made."""
    return on(partial(reference.lora_group_score, **case.ours.keywords), case.data)  # type: ignore[attr-defined]


def plain_adamw(case: Case) -> Contender:
    """AST's step as one writes it in torch, with a mask of bytes and the weight rounded to nearest."""
    weight, *state, bits = case.data
    return on(unfused, (weight, *state, ~unpack_bits(bits, weight.shape[1])))


def unfused(weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, pruned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The third step, at the rates of `speed.ADAMW`."""
    m.lerp_(grad.float(), 0.1)
    u = m + 6e-5 * (weight * pruned)
    v.mul_(0.95).addcmul_(u, u, value=0.05)
    denominator = (v / (1 - 0.95**3)).sqrt_().add_(1e-8)
    weight.mul_(1 - 1e-5)
    weight.addcdiv_(u.to(weight.dtype), denominator.to(weight.dtype), value=-1e-4 / (1 - 0.9**3))
    return weight, m, v


def fused_adamw(case: Case) -> Contender:
    """torch's fused AdamW, which has no mask; its moments have the weight's dtype."""
    weight, grad = case.data[:2]
    rates: dict[str, Any] = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8}

    def step(*data: Tensor) -> None:
        torch._fused_adamw_(*([part] for part in data[:4]), [], [data[4]], amsgrad=False, maximize=False, **rates)

    zeros = torch.zeros_like(weight)
    return on(step, (weight, grad, zeros, zeros, torch.ones((), device=weight.device)))
