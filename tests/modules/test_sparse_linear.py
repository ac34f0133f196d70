"""SparseLinear: its product and gradients against fp64, LoRA on top of it, what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pyprune import SparseLinear
from pyprune.masked import SLoRB

PATTERNS = [(2, 4), (1, 4), (4, 8), None]
SHAPES = [(64, 64), (72, 136), (1, 8), (65, 200)]


def weight_with_zeros(rows: int, columns: int, pattern: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
    """Random, with zeros at random places; -0 and a denormal among them."""
    weight = torch.randn(rows, columns, dtype=torch.float64)
    if pattern is None:
        weight[torch.rand(rows, columns) < 0.6] = 0
    else:
        n, m = pattern
        order = torch.rand(rows, columns // m, m).argsort(-1)
        weight = torch.where((order < n).flatten(1), weight, 0.0)
    weight.view(-1)[(weight == 0).flatten().nonzero()[0]] = -0.0
    return weight.to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_product_is_the_dense_one(shape: tuple[int, int], pattern: tuple[int, int] | None) -> None:
    """fp32: as close to fp64 as torch's dense product, twice its error allowed for another order of the sum."""
    weight, bias = weight_with_zeros(*shape, pattern, torch.float32), torch.randn(shape[0])
    x = torch.randn(2, 3, shape[1])
    module = SparseLinear.pack(weight, nn.Parameter(bias), pattern)
    expected = linear(x.double(), weight.double(), bias.double())
    dense = (linear(x, weight, bias) - expected).abs().max()
    assert (module(x) - expected).abs().max() <= 2 * dense + 1e-6
    assert torch.equal(module.matrix(), weight)
    assert module.pattern == pattern and module.weight is None


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_bf16_is_as_close_as_dense(pattern: tuple[int, int] | None) -> None:
    weight, x = weight_with_zeros(96, 256, pattern, torch.bfloat16), torch.randn(5, 256).bfloat16()
    expected = linear(x.double(), weight.double())
    dense = (linear(x, weight).double() - expected).abs().max()
    assert (SparseLinear.pack(weight, pattern=pattern)(x).double() - expected).abs().max() <= 2 * dense + 1e-3


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gradients_reach_the_input_and_the_bias(pattern: tuple[int, int] | None) -> None:
    weight = weight_with_zeros(72, 136, pattern, torch.float64)
    module = SparseLinear.pack(weight, nn.Parameter(torch.randn(72, dtype=torch.float64)), pattern)
    x, grad = torch.randn(7, 136, dtype=torch.float64, requires_grad=True), torch.randn(7, 72, dtype=torch.float64)
    module(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ weight)
    torch.testing.assert_close(module.bias.grad, grad.sum(0))
    assert not any(tensor.requires_grad for tensor in module.packed().values())


def test_bytes_are_those_of_the_format() -> None:
    weight = weight_with_zeros(128, 256, (2, 4), torch.bfloat16)
    assert SparseLinear.pack(weight, pattern=(2, 4)).nbytes == weight.nbytes * 9 // 16
    kept, tiles = int((weight != 0).sum()), 2 * 4
    assert 0 <= SparseLinear.pack(weight).nbytes - (2 * kept + 128 * 256 // 8 + 8 * (tiles + 1)) <= tiles * 7 * 2


def test_what_is_not_of_the_pattern_is_refused() -> None:
    weight = weight_with_zeros(8, 16, (2, 4), torch.float32)
    weight[3, 4:8] = 1
    with pytest.raises(ValueError, match=r"row 3, group 1 \(columns 4 to 7\) has more than 2 nonzeros"):
        SparseLinear.pack(weight, pattern=(2, 4))


@pytest.mark.parametrize(
    ("part", "place", "value", "message"),
    [
        ("offsets", 1, 8, "offsets gives tile 0 8 values"),
        ("bitmap", 0, 0xFF, "its bits ask for 4096"),
        ("metadata", (3, 2), 0x40, "metadata of row 3, group 4"),
    ],
)
def test_check_finds_damage(part: str, place: int | tuple[int, int], value: int, message: str) -> None:
    pattern = (2, 4) if part == "metadata" else None
    module = SparseLinear.pack(weight_with_zeros(128, 64, pattern, torch.float32), pattern=pattern)
    module.check()
    with torch.no_grad():
        module.get_parameter(part)[place] = value
    with pytest.raises(ValueError, match=message):
        module.check()


def test_autocast_keeps_the_dtype_of_the_values() -> None:
    weight, x = weight_with_zeros(64, 64, None, torch.bfloat16), torch.randn(3, 64)
    module = SparseLinear.pack(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x), module(x.bfloat16()))


@pytest.mark.parametrize("trained", [False, True])
def test_slorb_is_added(trained: bool) -> None:
    """y = x W^T + (x X^T) S^T, with W + S X as the dense weight."""
    weight = weight_with_zeros(24, 64, (2, 4), torch.float64)
    slorb = SLoRB(torch.randn(24, 64, dtype=torch.float64), 16, trained)
    module = SparseLinear.pack(weight, pattern=(2, 4), slorb=slorb)
    x = torch.randn(5, 64, dtype=torch.float64)
    sums = torch.stack([x[:, begin : begin + 16].sum(1) for begin in range(0, 64, 16)], dim=1)
    torch.testing.assert_close(module(x), x @ weight.T + sums @ slorb.s.T)
    torch.testing.assert_close(module(x), x @ module.matrix().T)


def test_lora_trains_on_top() -> None:
    """PEFT takes it for a linear: adapters learn, the packed base stays as it is."""
    from peft import LoraConfig, get_peft_model

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = SparseLinear.pack(weight_with_zeros(32, 64, None, torch.float32))
            self.second = SparseLinear.pack(weight_with_zeros(8, 32, (2, 4), torch.float32), pattern=(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh())

    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    x, target = torch.randn(64, 64), torch.randn(64, 8)
    plain = net(x)
    model = get_peft_model(net, LoraConfig(r=4, lora_alpha=8, target_modules=["first", "second"]))
    assert torch.equal(model(x), plain)  # B starts at zero
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 4
    optimizer = torch.optim.Adam(trained, lr=0.02)
    losses = []
    for _ in range(60):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    after = model.get_base_model().state_dict()
    for name, tensor in before.items():
        layer, _, part = name.rpartition(".")
        assert torch.equal(after[f"{layer}.base_layer.{part}"], tensor), name


def test_adapters_go_where_the_values_are() -> None:
    from peft import LoraConfig
    from peft.tuners.lora import Linear as LoraLinear

    base = SparseLinear.pack(weight_with_zeros(32, 64, None, torch.bfloat16)).to("meta")
    layer = LoraLinear(base, "default", config=LoraConfig(r=4), r=4, lora_alpha=8)
    assert {parameter.device.type for parameter in layer.lora_A.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in layer.lora_A.parameters()} == {torch.bfloat16}
