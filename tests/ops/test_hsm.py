"""The `hsm` ops on the CPU: numbers, gradients, dispatch, compile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hsm_oracle import DTYPES, EPS, RUNS, SHAPES, Case, assert_as_exact_as_torch, make_case

from pyprune import _native, ops
from pyprune._cpu import hsm as on_cpu
from pyprune._cpu.common import DTYPE_CODES

ISAS = _native.cpu.isas() if _native.cpu else ()
needs_kernels = pytest.mark.skipif(_native.cpu is None, reason=f"no compiled module: {_native.why_missing}")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set this machine runs."""
    before = _native.cpu.isa()
    _native.cpu.set_isa(request.param)
    yield request.param
    _native.cpu.set_isa(before)


@pytest.fixture
def poison() -> Iterator[None]:
    """Uninitialised memory is NaN: what a kernel forgets to write, or reads before writing, shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def op_arguments(case: Case) -> dict[str, tuple]:
    """Direct arguments of the four dispatcher ops."""
    mixing = (case.l0, case.v, case.l1, case.mask)
    _, h = torch.ops.pyprune.hsm(case.x, *mixing)
    residual_out, _, h, rstd = torch.ops.pyprune.hsm_residual_rmsnorm(case.x, *mixing, case.residual, case.weight, EPS)
    saved = (case.x, h, residual_out, rstd, *mixing, case.weight)
    return {
        "hsm": (case.x, *mixing),
        "hsm_backward": (case.grad_y, case.x, h, *mixing, [True] * 5),
        "hsm_residual_rmsnorm": (case.x, *mixing, case.residual, case.weight, EPS),
        "hsm_residual_rmsnorm_backward": (case.grad_y, case.grad_normed, *saved, [True] * 7),
    }


# ------------------------------------------------------------------------------------------------------------- numbers


@needs_kernels
@pytest.mark.parametrize("op", RUNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_kernels_are_as_exact_as_torch(op: str, dtype: torch.dtype, shape: tuple[int, ...], isa: str) -> None:
    assert_as_exact_as_torch(op, make_case(*shape, dtype))


@pytest.fixture
def own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' bf16 products at any size, also where torch has tiles for them."""
    if "avx512_bf16" not in ISAS:
        pytest.skip("this processor has no bf16 dot product")
    implementation, _ = ops.choose("hsm", torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(implementation, "own_products", True)
    monkeypatch.setattr(on_cpu, "FEWEST_TOKENS", 0)
    monkeypatch.setattr(on_cpu, "_product", lambda *operands: pytest.fail("torch's product was called"))


# Beside those of all ops: a tile of 8 + 4 ranks, whole panels of 48, several strips of 96 columns and depths of 128.
OWN_SHAPES = [*SHAPES, (50, 32, 12, 32), (96, 96, 16, 96), (300, 230, 9, 201)]


@pytest.mark.parametrize("op", RUNS)
@pytest.mark.parametrize("shape", OWN_SHAPES, ids=str)
@pytest.mark.usefixtures("poison", "own_products")
def test_bf16_products_are_as_exact_as_torch(op: str, shape: tuple[int, ...]) -> None:
    assert_as_exact_as_torch(op, make_case(*shape, torch.bfloat16))


@pytest.mark.usefixtures("own_products")
def test_bf16_products_norm_by_what_they_stored() -> None:
    """rstd is that of the rounded sum and of eps, here as large as the mean square, to fp32 rounding."""
    case = make_case(50, 130, 9, 101, torch.bfloat16)
    arguments = (case.x, case.l0, case.v, case.l1, case.mask, case.residual, case.weight, 8.0)
    residual_out, _, _, rstd = torch.ops.pyprune.hsm_residual_rmsnorm(*arguments)
    exact = torch.rsqrt(residual_out.double().square().mean(1) + 8.0)
    torch.testing.assert_close(rstd.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("own_products")
def test_bf16_products_write_no_row_too_many() -> None:
    case = make_case(50, 64, 9, 64, torch.bfloat16)
    implementation, _ = ops.choose("hsm", torch.device("cpu"), torch.bfloat16)
    y = torch.full((58, 64), 7.0, dtype=torch.bfloat16)
    implementation._low_rank(case.x, case.l0, case.l1, case.mask, y=y[:50])
    assert (y[50:] == 7).all() and not (y[:50] == 7).all(1).any()


@pytest.mark.parametrize("op", RUNS)
@pytest.mark.usefixtures("own_products")
def test_bf16_products_do_not_depend_on_the_number_of_threads(op: str) -> None:
    case, results = make_case(150, 230, 9, 200, torch.bfloat16), []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(RUNS[op](case))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@needs_kernels
@pytest.mark.parametrize("op", RUNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_rows_are_computed_in_tiles(op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 32 rows, the last one ragged; a real tile holds hundreds."""
    monkeypatch.setattr(on_cpu, "TILE_BYTES", 1)
    assert_as_exact_as_torch(op, make_case(75, 40, 6, 33, dtype))


@needs_kernels
@pytest.mark.parametrize("op", RUNS)
def test_sums_over_more_rows_than_partial_sums(op: str) -> None:
    assert_as_exact_as_torch(op, make_case(3 * on_cpu.PARTIAL_SUMS + 1, 24, 3, 24, torch.float32))


def test_reference_is_the_definition() -> None:
    """The reference against the equations, written out with nothing shared."""
    case = make_case(9, 12, 3, 7, torch.float64)
    transform = (case.l1 * case.v) @ case.l0 + torch.eye(7, 12, dtype=torch.float64)
    y = torch.einsum("td,nd->tn", case.x, transform) * case.mask
    torch.testing.assert_close(ops.hsm(case.x, case.l0, case.v, case.l1, case.mask), y)

    residual_out, normed = ops.hsm_residual_rmsnorm(
        case.x, case.l0, case.v, case.l1, case.mask, case.residual, case.weight, EPS
    )
    expected = y + case.residual
    torch.testing.assert_close(residual_out, expected)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(expected, (7,), case.weight, EPS))


@pytest.mark.parametrize("shape", [(3, 5, 2, 5), (4, 6, 3, 2)], ids=str)
def test_gradients_in_fp64(shape: tuple[int, ...]) -> None:
    case = make_case(*shape, torch.float64)
    inputs = [t.requires_grad_() for t in (case.x, case.l0, case.v, case.l1, case.mask)]
    assert torch.autograd.gradcheck(ops.hsm, inputs)
    rest = [t.requires_grad_() for t in (case.residual, case.weight)]
    assert torch.autograd.gradcheck(lambda *tensors: ops.hsm_residual_rmsnorm(*tensors, EPS), inputs + rest)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_conversions(dtype: torch.dtype, isa: str) -> None:
    """Loading and storing every 16-bit pattern keeps it; storing fp32 rounds as torch does, NaN and infinities too."""
    kernels, code = _native.cpu, DTYPE_CODES[dtype]
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    stored = torch.empty_like(patterns)
    kernels.scale(code, 1, len(patterns), patterns.data_ptr(), 0, 0, stored.data_ptr(), 1)
    torch.testing.assert_close(stored, patterns, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(stored.signbit(), patterns.signbit())

    exact = patterns.float()
    edges = torch.tensor([65519.99, 65520.0, 3.4e38, float("inf"), float("-inf"), float("nan"), -0.0, 1e-40])
    between = [exact * (1 + offset) for offset in (2**-9, 2**-12, -(2**-9), 3 * 2**-12)]
    values = torch.cat([edges, *between])
    rounded, ones = torch.empty(len(values), dtype=dtype), torch.ones(len(values), dtype=dtype)
    kernels.scale(code, 1, len(values), ones.data_ptr(), 0, values.data_ptr(), rounded.data_ptr(), 1)
    torch.testing.assert_close(rounded, values.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pruned_channels_are_exactly_zero(dtype: torch.dtype) -> None:
    """A zero in the mask zeroes the output and every gradient that passes through the channel."""
    case = make_case(60, 24, 5, 24, dtype)
    case.mask[::3] = 0
    results = RUNS["hsm"](case)
    assert (results["y"][:, ::3] == 0).all()
    assert (results["grad_l1"][::3] == 0).all()
    assert (results["y"][:, 1::3] != 0).any()


@pytest.mark.parametrize("op", RUNS)
def test_nan_stays_in_its_row(op: str) -> None:
    case = make_case(70, 40, 4, 33, torch.bfloat16)
    clean = RUNS[op](case)
    case.x[5, 39] = float("nan")
    spoiled = RUNS[op](case)
    for name in {"y", "residual_out", "normed"} & clean.keys():
        assert spoiled[name][5].isnan().all()
        keep = torch.arange(70) != 5
        assert torch.equal(spoiled[name][keep], clean[name][keep])


@pytest.mark.parametrize("op", RUNS)
def test_fewer_outputs_are_the_first_of_all(op: str) -> None:
    """With n < d the result is that of the first n rows of l1; x beyond n matters only through l0."""
    case = make_case(11, 32, 4, 32, torch.float64)
    cut = make_case(11, 32, 4, 20, torch.float64)
    for name in ("l0", "v", "x"):
        setattr(cut, name, getattr(case, name))
    for name in ("l1", "mask"):
        setattr(cut, name, getattr(case, name)[:20])
    full = ops.hsm(case.x, case.l0, case.v, case.l1, case.mask)
    torch.testing.assert_close(ops.hsm(cut.x, cut.l0, cut.v, cut.l1, cut.mask), full[:, :20])


# --------------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("op", RUNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_the_same_from_run_to_run(op: str, dtype: torch.dtype) -> None:
    case = make_case(130, 96, 7, 96, dtype)
    first = RUNS[op](case)
    for _ in range(5):
        again = RUNS[op](case)
        assert all(torch.equal(first[name], again[name]) for name in first)


@needs_kernels
def test_kernels_do_not_depend_on_the_number_of_threads(isa: str) -> None:
    case = make_case(150, 65, 4, 65, torch.bfloat16)
    rstd = torch.rand(150)
    results = []
    for threads in (1, 2, 3):
        grad, weight, dot = torch.empty_like(case.x), torch.empty(64, 65), torch.empty(64, 65)
        tensors = (case.grad_y, case.grad_normed, case.residual, rstd, case.weight, case.x)
        addresses = [tensor.data_ptr() for tensor in tensors]
        outputs = (grad.data_ptr(), 64, weight.data_ptr(), dot.data_ptr())
        _native.cpu.rmsnorm_backward(DTYPE_CODES[grad.dtype], 150, 65, *addresses, 65, *outputs, threads)
        results.append((grad, weight, dot))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ------------------------------------------------------------------------------------------------------- torch's side


@pytest.mark.parametrize("op", RUNS)
def test_leading_dimensions_and_strides(op: str) -> None:
    """[2, 5, d] views with gaps give what their flat copies give."""
    flat = make_case(10, 12, 3, 12, torch.float32)
    wide = {k: torch.stack([t, -t], dim=-1) for k, t in vars(flat).items()}
    strided = Case(**{k: t[..., 0] for k, t in wide.items()})
    assert not strided.x.is_contiguous()
    for name in ("x", "residual", "grad_y", "grad_normed"):
        setattr(strided, name, getattr(strided, name).unflatten(0, (2, 5)))
    expected, results = RUNS[op](flat), RUNS[op](strided)
    for name, result in results.items():
        assert torch.equal(result.reshape(expected[name].shape), expected[name]), name


@pytest.mark.parametrize("frozen", ["x", "l0", "v", "l1", "mask", "residual", "weight"])
def test_only_wanted_gradients_are_computed(frozen: str) -> None:
    """A frozen input gets no gradient and leaves the others as they are."""
    case = make_case(40, 24, 4, 20, torch.float32)
    expected = RUNS["hsm_residual_rmsnorm"](case)
    names = ("x", "l0", "v", "l1", "mask", "residual", "weight")
    leaves = {name: getattr(case, name).clone().requires_grad_(name != frozen) for name in names}
    outputs = ops.hsm_residual_rmsnorm(**leaves, eps=EPS)
    torch.autograd.backward(outputs, [case.grad_y, case.grad_normed])
    assert leaves[frozen].grad is None
    for name in set(names) - {frozen}:
        assert torch.equal(leaves[name].grad, expected[f"grad_{name}"]), name


@needs_kernels
def test_frozen_mask_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass over x and grad_y for the mask's gradient is left out; only grad_v's [T, r] sum remains."""
    case = make_case(40, 24, 4, 24, torch.float32)
    shapes = []
    original = on_cpu.Hsm._column_dot
    monkeypatch.setattr(
        on_cpu.Hsm, "_column_dot", lambda self, a, b: shapes.append(tuple(a.shape)) or original(self, a, b)
    )
    for trainable, expected in ((True, [(40, 24), (40, 4), (4, 24)]), (False, [(40, 4)])):
        shapes.clear()
        x = case.x.clone().requires_grad_()
        v = case.v.clone().requires_grad_()
        mask = case.mask.clone().requires_grad_(trainable)
        ops.hsm(x, case.l0, v, case.l1, mask).backward(case.grad_y)
        assert shapes == expected


@pytest.mark.parametrize("implementation", ["chosen", "reference"])
@pytest.mark.parametrize("op", ["hsm", "hsm_backward", "hsm_residual_rmsnorm", "hsm_residual_rmsnorm_backward"])
def test_opcheck(op: str, implementation: str) -> None:
    case = make_case(6, 8, 3, 5, torch.float32)
    arguments = op_arguments(case)[op]
    if implementation == "reference":
        with ops.using("reference"):
            torch.library.opcheck(getattr(torch.ops.pyprune, op).default, arguments)
    else:
        torch.library.opcheck(getattr(torch.ops.pyprune, op).default, arguments)


@pytest.mark.parametrize("op", RUNS)
def test_compile_in_one_graph(op: str) -> None:
    """fullgraph compile of forward and backward gives the eager bits, for changing T without a recompile."""
    leaves = ("x", "l0", "v", "l1", "mask")

    def step(case: Case) -> tuple[torch.Tensor, ...]:
        if op == "hsm":
            y = ops.hsm(case.x, case.l0, case.v, case.l1, case.mask)
            return y, (y * case.grad_y).sum()
        residual_out, normed = ops.hsm_residual_rmsnorm(
            case.x, case.l0, case.v, case.l1, case.mask, case.residual, case.weight, EPS
        )
        return residual_out, (residual_out * case.grad_y).sum() + (normed * case.grad_normed).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (8, 13, 21):
        results = []
        for run in (step, compiled):
            torch.manual_seed(tokens)
            case = make_case(tokens, 12, 3, 10, torch.float32)
            for name in leaves:
                getattr(case, name).requires_grad_()
            with torch._dynamo.config.patch(error_on_recompile=tokens != 8):
                output, loss = run(case)
            loss.backward()
            results.append([output, *(getattr(case, name).grad for name in leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_differentiating_twice_is_an_error() -> None:
    case = make_case(3, 4, 2, 4, torch.float64)
    x = case.x.requires_grad_()
    y = ops.hsm(x, case.l0, case.v, case.l1, case.mask)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_does_not_change_the_dtypes() -> None:
    case = make_case(5, 8, 2, 8, torch.float32)
    expected = RUNS["hsm_residual_rmsnorm"](case)
    with torch.autocast("cpu", torch.bfloat16):
        results = RUNS["hsm_residual_rmsnorm"](case)
        with ops.using("reference"):
            assert RUNS["hsm"](case)["y"].dtype == torch.float32
    assert all(torch.equal(results[name], expected[name]) for name in expected)


# ------------------------------------------------------------------------------------------------------------ dispatch


def test_using_forces_and_restores() -> None:
    cpu = torch.device("cpu")
    before = ops.choose("hsm", cpu, torch.float32)
    with ops.using("reference"):
        assert ops.choose("hsm", cpu, torch.float32)[0].name == "reference"
        with ops.using(before[0]):
            assert ops.choose("hsm", cpu, torch.float32)[0] is before[0]
        assert ops.choose("hsm", cpu, torch.float32)[0].name == "reference"
    assert ops.choose("hsm", cpu, torch.float32) == before
    with pytest.raises(ValueError, match="implementation is 'fast'"), ops.using("fast"):
        pass


def test_choice_names_its_reason() -> None:
    implementation, why = ops.choose("hsm", torch.device("cpu"), torch.float64)
    assert (implementation.name, why) == ("reference", "fp64 is the reference's")
    implementation, why = ops.choose("hsm", torch.device("meta"), torch.float32)
    assert (implementation.name, why) == ("reference", "no kernels for meta devices")
    if not torch.cuda.is_available():
        assert ops.choose("hsm", torch.device("cuda"), torch.float32)[1] == "torch sees no CUDA device"
    with pytest.raises(ValueError, match=r"op is 'hsmm'; expected one of .*, hsm, "):
        ops.choose("hsmm", torch.device("cpu"), torch.float32)


@needs_kernels
def test_unknown_instruction_set_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"isa 'mmx' does not run on this machine; choose one of: .*generic"):
        _native.cpu.set_isa("mmx")


# -------------------------------------------------------------------------------------------------------------- errors

GOOD = dict(x=(6, 8), l0=(3, 8), v=(3,), l1=(5, 3), mask=(5,), residual=(6, 5), weight=(5,))
WRONG_SHAPES = [
    ("l0", (3, 7), r"l0 has shape \[3, 7\], expected \[3, 8\]"),
    ("l0", (0, 8), r"l0 has shape \[0, 8\], expected two dimensions, none of them 0"),
    ("l0", (3, 8, 1), r"l0 has shape \[3, 8, 1\], expected two dimensions"),
    ("v", (4,), r"v has shape \[4\], expected \[3\]"),
    ("l1", (5, 2), r"l1 has shape \[5, 2\], expected \[5, 3\]"),
    ("mask", (6,), r"mask has shape \[6\], expected \[5\]"),
    ("residual", (6, 4), r"residual has shape \[6, 4\], expected \[6, 5\]"),
    ("weight", (1,), r"weight has shape \[1\], expected \[5\]"),
]


@pytest.mark.parametrize(("name", "shape", "message"), WRONG_SHAPES)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...], message: str) -> None:
    arguments = {k: torch.zeros(s) for k, s in GOOD.items()} | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=f"hsm_residual_rmsnorm: {message}"):
        ops.hsm_residual_rmsnorm(**arguments, eps=EPS)


def test_more_outputs_than_channels_is_an_error() -> None:
    with pytest.raises(ValueError, match="hsm: l1 has 9 rows, more than the 8 columns of x"):
        ops.hsm(torch.zeros(6, 8), torch.zeros(3, 8), torch.zeros(3), torch.zeros(9, 3), torch.zeros(9))


@pytest.mark.parametrize("name", ["l0", "v", "l1", "mask", "residual", "weight"])
def test_wrong_dtypes_are_named(name: str) -> None:
    arguments = {k: torch.zeros(s) for k, s in GOOD.items()} | {name: torch.zeros(GOOD[name], dtype=torch.float16)}
    with pytest.raises(TypeError, match=f"{name} is torch.float16, expected torch.float32 for x in torch.float32"):
        ops.hsm_residual_rmsnorm(**arguments, eps=EPS)


def test_integers_are_refused() -> None:
    arguments = [torch.zeros(GOOD[k], dtype=torch.int64) for k in ("x", "l0", "v", "l1", "mask")]
    with pytest.raises(TypeError, match=r"hsm: x is torch.int64, expected one of torch.float32, torch.bfloat16"):
        ops.hsm(*arguments)


def test_mixed_devices_are_named() -> None:
    arguments = {k: torch.zeros(GOOD[k]) for k in ("x", "l0", "v", "l1", "mask")}
    arguments["l1"] = arguments["l1"].to("meta")
    with pytest.raises(ValueError, match="hsm: l1 is on meta, x is on cpu; move one to the other's device"):
        ops.hsm(**arguments)


@pytest.mark.parametrize("op", ["hsm_backward", "hsm_residual_rmsnorm_backward"])
def test_backward_ops_check_their_own_arguments(op: str) -> None:
    """The dispatcher ops are public too: a short row of h or rstd must not reach a kernel."""
    arguments = list(op_arguments(make_case(6, 8, 3, 5, torch.float32))[op])
    position = 2 if op == "hsm_backward" else 3
    arguments[position] = arguments[position][:, :1]
    with pytest.raises(ValueError, match=rf"{op}: h has shape \[6, 1\], expected \[6, 3\]"):
        getattr(torch.ops.pyprune, op)(*arguments)
