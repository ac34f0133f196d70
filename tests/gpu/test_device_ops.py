"""Every op of pyprune.ops that has a CUDA kernel, as users call it: on the kernels, the same bits from run to run, on
any stream, in CUDA graphs, and compiled. Right numbers are the business of the other files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hsm_checks import Shape, make_inputs
from sparse_checks import nm_weight
from torch import Tensor

from pyprune import ops
from pyprune.reference.bits import pack_bits

pytestmark = pytest.mark.gpu

OUT, IN, TOKENS = 1024, 2048, 7
DTYPE = torch.bfloat16


class Call(NamedTuple):
    """An op, what makes its tensors, and what follows them. `capturable`: it asks the host for nothing on its way."""

    op: str
    make: Callable[[], dict[str, Tensor]]
    call: Callable[..., Any]
    capturable: bool = True

    def __str__(self) -> str:
        return self.op

    def run(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """All results; of an op in place, what it changed."""
        found = self.call(**tensors)
        return tuple(tensors.values()) if found is None else found if isinstance(found, tuple) else (found,)


def hsm(*names: str) -> Callable[[], dict[str, Tensor]]:
    def make() -> dict[str, Tensor]:
        tensors = make_inputs(Shape(300, 512, 24, 448), DTYPE, device="cuda")
        return {name: tensors[name] for name in names}

    return make


def x() -> Tensor:
    return torch.randn(TOKENS, IN, device="cuda", dtype=DTYPE)


def weight() -> Tensor:
    return nm_weight(OUT, IN, 2, 4, DTYPE, device="cuda")


def mask() -> Tensor:
    return pack_bits(torch.rand(OUT, IN, device="cuda") < 0.5)


def nm() -> dict[str, Tensor]:
    return dict(zip(("values", "metadata"), ops.nm_compress(weight(), 2, 4), strict=True))


def bitmap() -> dict[str, Tensor]:
    return dict(zip(("values", "bitmap", "offsets"), ops.bitmap_pack(weight()), strict=True))


def ranked() -> dict[str, Tensor]:
    rank = torch.rand(OUT, IN, device="cuda").argsort(1).to(torch.uint16)
    return {"weight": weight(), "rank": rank}


def factors() -> dict[str, Tensor]:
    shapes = {"a": (8, IN), "b": (OUT, 8), "grad_a": (8, IN), "grad_b": (OUT, 8)}
    return {"weight": weight()} | {name: torch.randn(shape, device="cuda") for name, shape in shapes.items()}


def moments() -> dict[str, Tensor]:
    exp_avg = torch.randn(OUT, IN, device="cuda")
    return {"param": weight(), "grad": weight(), "exp_avg": exp_avg, "exp_avg_sq": exp_avg.square(), "mask": mask()}


def scores() -> dict[str, Tensor]:
    return {"scores": torch.randn(OUT, IN, device="cuda", dtype=DTYPE), "previous_bits": mask()}


def solvable() -> dict[str, Tensor]:
    upper = torch.eye(IN, device="cuda") + 0.01 * torch.randn(IN, IN, device="cuda").triu(1)
    return {"weight": torch.randn(OUT, IN, device="cuda"), "hinv_upper": upper}


ADAMW: dict[str, Any] = {
    **{"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1},
    **{"masked_decay": 0.05, "step": 3, "seed": 5},
}
HSM = ("x", "l0", "v", "l1", "mask")
KEPT = torch.arange(0, IN, 2)
CALLS = [
    Call("hsm", hsm(*HSM), ops.hsm),
    Call("hsm_residual_rmsnorm", hsm(*HSM, "residual", "weight"), lambda **t: ops.hsm_residual_rmsnorm(**t, eps=1e-5)),
    Call("nm_linear", lambda: {"x": x(), **nm()}, lambda **t: ops.nm_linear(**t, n=2, m=4)),
    Call(
        "bitmap_linear",
        lambda: {"x": x(), **bitmap()},
        lambda **t: ops.bitmap_linear(**t, out_features=OUT, in_features=IN),
    ),
    Call("masked_linear", lambda: {"x": x(), "weight": weight(), "mask_bits": mask()}, ops.masked_linear),
    Call(
        "gathered_linear",
        lambda: {"x": x()[:, ::2], "weight": weight(), "in_index": KEPT.cuda(), "out_index": KEPT[: OUT // 2].cuda()},
        ops.gathered_linear,
    ),
    Call("masked_weight", lambda: {"weight": weight(), "mask": mask()}, ops.masked_weight),
    Call("nm_adamw_", moments, lambda **t: ops.nm_adamw_(**t, **ADAMW)),
    Call("nm_decompress", nm, lambda **t: ops.nm_decompress(**t, n=2, m=4)),
    Call("bitmap_unpack", bitmap, lambda **t: ops.bitmap_unpack(**t, out_features=OUT, in_features=IN)),
    Call(
        "rank_mask",
        lambda: {**ranked(), "threshold": torch.full((OUT,), IN // 2, device="cuda", dtype=torch.int32)},
        ops.rank_mask,
    ),
    Call("rank_bucket_grad", lambda: {"grad": weight(), **ranked()}, lambda **t: ops.rank_bucket_grad(**t, steps=100)),
    Call("lora_group_score", factors, lambda **t: ops.lora_group_score(**t, scale=2.0, dim=0)),
    Call("nm_compress", lambda: {"weight": weight()}, lambda **t: ops.nm_compress(**t, n=2, m=4), False),
    Call("nm_prune", scores, lambda **t: ops.nm_prune(**t, n=2, m=4), False),
    Call("bitmap_pack", lambda: {"weight": weight()}, ops.bitmap_pack, False),
    Call("transposable_prune", scores, ops.transposable_prune, False),
    Call("sparsegpt_solve", solvable, lambda **t: ops.sparsegpt_solve(**t, drop=OUT * IN // 2), False),
]


@pytest.fixture(params=CALLS, ids=str)
def call(request: pytest.FixtureRequest, device: torch.device) -> Iterator[Call]:
    chosen, why = ops.choose(request.param.op, device, DTYPE)
    assert chosen.name == "cuda", why
    yield request.param


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone(memory_format=torch.preserve_format) for name, tensor in tensors.items()}


def blanks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def assert_equal(found: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    assert len(found) == len(right)
    for ours, theirs in zip(found, right, strict=True):
        assert ours.is_cuda and torch.equal(ours, theirs)


def test_every_kernel_is_among_them() -> None:
    """But for the backward passes, which `test_gradients` runs."""
    from pyprune._cuda import CudaKernels

    missing = [op for op in ops.OPS if hasattr(CudaKernels, op) and not op.endswith("_backward")]
    assert sorted(missing) == sorted(call.op for call in CALLS)


def test_bitwise_the_same_from_run_to_run(call: Call) -> None:
    tensors = call.make()
    first = call.run(copies(tensors))
    for _ in range(10):
        assert_equal(call.run(copies(tensors)), first)


def test_runs_on_the_current_stream(call: Call) -> None:
    """The arguments are written there 20 ms late; a kernel on any other stream would read the zeros before them."""
    tensors = call.make()
    right = call.run(copies(tensors))
    late = blanks(tensors)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(30_000_000)
        for name, tensor in tensors.items():
            late[name].copy_(tensor)
        found = call.run(late)
    stream.synchronize()
    assert_equal(found, right)


def test_replays_in_a_cuda_graph(call: Call) -> None:
    if not call.capturable:
        pytest.skip("asks the host on its way, for an error to raise, a size, or a product's bounds")
    tensors = call.make()
    right = call.run(copies(tensors))
    place = copies(tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call.run(place)
    for name, tensor in tensors.items():
        place[name].copy_(tensor)
    for tensor in found:
        if not any(tensor is other for other in place.values()):
            tensor.zero_()
    graph.replay()
    assert_equal(found, right)


@pytest.mark.parametrize("name", ["hsm", "hsm_residual_rmsnorm", "nm_linear", "bitmap_linear", "masked_linear"])
def test_compiled_with_gradients(name: str, device: torch.device) -> None:
    """torch.compile in one piece; forward and backward are the kernels, so the bits are those of eager mode."""
    call = next(call for call in CALLS if call.op == name)
    tensors = call.make()

    def gradients(function: Callable[..., Any]) -> tuple[Tensor, ...]:
        leaves = copies(tensors)
        leaves["x"].requires_grad_()
        found = call._replace(call=function).run(leaves)
        total = sum((result.float() * result.float()).sum() for result in found)
        return *(result.detach() for result in found), *torch.autograd.grad(total, leaves["x"])

    torch.compiler.reset()
    assert_equal(gradients(torch.compile(call.call, fullgraph=True, backend="aot_eager")), gradients(call.call))


def test_compiled_by_inductor(device: torch.device) -> None:
    """What users get: the ops between torch's own, which Inductor fuses. fp32, as it leaves out roundings to bf16."""
    inputs = make_inputs(Shape(300, 512, 24, 448), torch.float32, device="cuda")
    tensors = {name: inputs[name] for name in (*HSM, "residual", "weight")}

    def layer(**t: Tensor) -> Tensor:
        total, normed = ops.hsm_residual_rmsnorm(**t, eps=1e-5)
        return torch.nn.functional.silu(normed) + total

    torch.compiler.reset()
    found, right = torch.compile(layer, fullgraph=True)(**tensors), layer(**tensors)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def test_views_at_odd_addresses(device: torch.device) -> None:
    """Rows of a larger buffer, from its second element on, and columns of one: aligned and contiguous neither."""
    dense = weight()
    packed = ops.nm_compress(dense, 2, 4)
    tokens = x()
    right = ops.nm_linear(tokens, *packed, 2, 4)
    wide = torch.randn(TOKENS, IN + 3, device=device, dtype=DTYPE)
    wide[:, 1 : IN + 1] = tokens
    shifted = torch.cat([dense.flatten()[:1], dense.flatten()])[1:].view(OUT, IN)
    assert shifted.data_ptr() % 16 != 0
    assert_equal((ops.nm_linear(wide[:, 1 : IN + 1], *packed, 2, 4),), (right,))
    assert_equal(ops.nm_compress(shifted, 2, 4), packed)
    assert_equal((ops.nm_decompress(*packed, 2, 4),), (shifted,))
