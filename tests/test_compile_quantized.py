"""Networks that round their values to 8 bits: kept so, multiplied as whole numbers where there are kernels."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.compile import CompiledModel, compile
from sepconv.compile.groups import Convolution, Epilogue
from sepconv.compile.network import PreparedNetwork
from sepconv.compile.numbers import FLOAT32, NumberType
from sepconv.compile.precision import missing
from sepconv.compile.quantized import quantized_constants
from sepconv.compile.store import Constant, QuantizedConstant
from sepconv.kernels import backends
from sepconv.kernels.case import Geometry
from sepconv.kernels.halide.jit import runtime
from sepconv.ops.quantized import fake_quantize

slices: Any = importlib.import_module("sepconv.compile.slices")
needs_halide = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())


class Rounded(nn.Module):
    """Values on 256 steps."""

    def __init__(self, scale: float = 0.03, zero: int = 128) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("zero", torch.tensor(zero, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.scale, self.zero, -1, 0, 255)


class Whole(nn.Module):
    """A layer with weights on 255 steps for each output channel."""

    def __init__(self, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        weight = layer.weight.detach()
        self.register_buffer("scale", weight.flatten(1).abs().amax(1) / 127)
        self.register_buffer("zero", torch.zeros(len(weight), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        weight = fake_quantize(self.layer.weight, self.scale, self.zero, 0, -127, 127)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        return self.layer._conv_forward(x, weight, self.layer.bias)


def conv(inputs: int, outputs: int, size: int = 1, **options: int) -> Whole:
    return Whole(nn.Conv2d(inputs, outputs, size, padding=size // 2, **options))


def depthwise(channels: int, size: int = 3, **options: int) -> Whole:
    return conv(channels, channels, size, groups=channels, **options)


class Block(nn.Module):
    """A stem, a separable convolution with a shortcut, a pointwise one, a pool and a linear layer."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.image, self.stem, self.after = Rounded(0.03, 120), conv(3, channels, 3, stride=2), Rounded(0.02, 0)
        self.dw, self.between, self.pw = depthwise(channels), Rounded(0.02, 0), conv(channels, channels)
        self.sum, self.last, self.end = Rounded(0.02, 100), conv(channels, 2 * channels), Rounded(0.01, 3)
        self.pooled, self.classes = Rounded(0.01, 0), Whole(nn.Linear(2 * channels, 10))

    def forward(self, x: Tensor) -> Tensor:
        y = self.after(F.relu(self.stem(self.image(x))))
        z = self.between(F.relu6(self.dw(y)))
        y = self.sum(self.pw(z) + y)
        y = self.end(F.relu(self.last(y)))
        return self.classes(self.pooled(y.mean((2, 3))))


class Gated(nn.Module):
    """Squeeze and excite, hard swish, and what it is multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.expand, self.wide = Rounded(), conv(8, 24), Rounded(0.02, 20)
        self.mean, self.reduce, self.few = Rounded(0.01, 20), conv(24, 8), Rounded(0.01, 0)
        self.gate, self.open, self.gated = conv(8, 24), Rounded(1 / 255, 0), Rounded(0.02, 20)
        self.project, self.out = conv(24, 8), Rounded(0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.image(x)
        y = self.wide(F.hardswish(self.expand(x)))
        z = self.few(F.relu(self.reduce(self.mean(y.mean((2, 3), keepdim=True)))))
        y = self.gated(y * self.open(F.hardsigmoid(self.gate(z))))
        return self.out(self.project(y) + x)


class Joined(nn.Module):
    """Values of two scales put together, pooled, resized and shuffled."""

    def __init__(self, same: bool) -> None:
        super().__init__()
        self.image, self.first, self.second = Rounded(), conv(8, 8), conv(8, 16, 3)
        self.one, self.other = Rounded(0.02), Rounded(0.02 if same else 0.03, 128 if same else 100)
        self.both, self.pool, self.last, self.out = Rounded(0.02), Rounded(0.02), conv(24, 8), Rounded(0.04)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.image(x)
        y = self.both(torch.cat([self.one(self.first(x)), self.other(self.second(x))], 1))
        y = self.pool(F.max_pool2d(self.shuffle(y), 3, 2, 1))
        y = self.pool(F.interpolate(y, scale_factor=2.0, mode="nearest"))
        return self.out(self.last(y))


class Mixed(nn.Module):
    """A layer in float32, an operation of PyTorch's, and an output that another layer reads as 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.first, self.one = Rounded(), conv(8, 8), Rounded(0.02)
        self.plain, self.two, self.last = nn.Conv2d(8, 8, 1), Rounded(0.02), conv(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.plain(self.one(self.first(self.image(x))))
        return y, self.last(self.two(y.flip(3)).view(y.shape))


def network_of(fast: CompiledModel) -> PreparedNetwork:
    network = next(iter(fast._networks.values()))
    assert isinstance(network, PreparedNetwork)
    return network


def steps_apart(fast: CompiledModel, model: nn.Module, x: Tensor, scale: float) -> float:
    """How many steps of the last rounding results are away from the model's."""
    with torch.no_grad():
        pairs = zip(*((y,) if isinstance(y, Tensor) else y for y in (fast(x), model(x))), strict=True)
        return max(float((ours - models).abs().max()) / scale for ours, models in pairs)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(
    ("make", "channels", "scale"),
    [
        (Block, 3, 0.02),
        (Gated, 8, 0.02),
        (partial(Joined, True), 8, 0.04),
        (partial(Joined, False), 8, 0.04),
        (Mixed, 8, 0.02),
    ],
)
def test_networks_of_8_bits_equal_the_model(
    make: Callable[[], nn.Module], channels: int, scale: float, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums are exact: a value differs where the model's own rounding in float32 falls on the other side."""
    if not ours:
        for op, known in backends.BACKENDS.items():
            monkeypatch.setitem(backends.BACKENDS, op, known[-1:])
        backends.forget()
    model, x = make().eval(), torch.randn(2, channels, 23, 29)
    fast = compile(model, x)
    explanation = fast.explain()
    assert (explanation.reason, explanation.precision) == ("", "int8")
    assert str(explanation).splitlines()[-1] == "in int8"
    for given in (x, x.contiguous(memory_format=torch.channels_last), torch.randn(1, channels, 17, 31)):
        assert steps_apart(fast, model, given, scale) <= 1.01
    backends.forget()


@pytest.mark.parametrize(("make", "channels"), [(Block, 3), (Gated, 8)])
def test_what_is_not_a_number_is_the_least_step(make: Callable[[], nn.Module], channels: int) -> None:
    """Whether the first layer reads the image or a conversion stands in front of it."""
    model, x = make().eval(), torch.randn(2, channels, 23, 29)
    fast = compile(model, x)
    broken, least = x.clone(), x.clone()
    broken[0, 1, 5, 7], least[0, 1, 5, 7] = torch.nan, -1e6
    answer = fast(broken)
    assert torch.equal(answer, fast(least))
    assert not torch.equal(answer, fast(x))
    assert torch.equal(answer[1], fast(x)[1])


@needs_halide
def test_groups_of_8_bits_are_single_steps() -> None:
    fast = compile(Block().eval(), torch.randn(2, 3, 23, 29))
    numbers = {group.kind: group.number for group in fast.explain().groups}
    kernels = {group.kind: group.kernel for group in fast.explain().groups}
    assert numbers["separable"] == "uint8 x 0.02 from 100"
    assert numbers["pointwise"] == numbers["pool"].replace("from 0", "from 3") == "uint8 x 0.01 from 3"
    assert numbers["linear"] == "float32"
    assert kernels["separable"] == kernels["pointwise"] == kernels["pool"] == kernels["linear"] == "halide"


@pytest.fixture
def without_separable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(backends.BACKENDS, "separable", backends.BACKENDS["separable"][-1:])
    backends.forget()
    yield
    backends.forget()


@pytest.mark.usefixtures("without_separable")
def test_what_rounds_in_the_middle_is_two_steps_where_it_has_no_kernel() -> None:
    model, x = Block().eval(), torch.randn(2, 3, 23, 29)
    fast = compile(model, x)
    kinds = [group.kind for group in fast.explain().groups]
    assert "depthwise" in kinds
    assert "separable" not in kinds
    assert steps_apart(fast, model, x, 0.02) <= 1.01


def test_layers_in_float32_stand_between_conversions() -> None:
    groups = compile(Mixed().eval(), torch.randn(2, 8, 11, 13)).explain().groups
    [plain] = [group for group in groups if group.name == "plain"]
    assert plain.number == "float32"
    assert plain.reason == "in float32: its weights are not quantised"


class Left(nn.Module):
    """Two layers that were left in float32, between others of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.first, self.one = Rounded(), conv(8, 64), Rounded(0.02)
        self.plain, self.wide = nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 1)
        self.two, self.last, self.out = Rounded(0.02), conv(64, 8), Rounded(0.02)

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(self.plain(self.one(self.first(self.image(x)))).relu()).relu()
        return self.out(self.last(self.two(y)))


@pytest.mark.skipif(bool(missing("bfloat16")), reason=missing("bfloat16"))
def test_only_what_is_left_is_kept_in_16_bits() -> None:
    """Where somebody asks for bfloat16, bytes stay bytes."""
    model, x = Left().eval(), torch.randn(1, 8, 31, 37)
    usual, asked = (compile(model, x, precision=precision).explain() for precision in (None, "bfloat16"))
    assert (asked.reason, asked.precision) == ("", "int8")
    numbers = [{group.name: group.number for group in known.groups if group.name} for known in (usual, asked)]
    assert numbers[1] == {**numbers[0], "plain": "bfloat16"}
    assert steps_apart(compile(model, x, precision="bfloat16"), model, x, 0.02) <= 4


@needs_halide
def test_values_of_one_scale_are_joined_without_copies() -> None:
    x = torch.randn(2, 8, 11, 13)
    same, apart = (compile(Joined(same).eval(), x).explain().groups for same in (True, False))
    assert sum(group.kind == "convert" for group in apart) == sum(group.kind == "convert" for group in same) + 1


class Signal(nn.Module):
    """A signal's stem, a separable layer with a shortcut, a normal layer, a pool and what is left of it."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.image, self.stem, self.after = Rounded(0.03, 120), signal(channels, 16, 9, stride=2), Rounded(0.02, 0)
        self.dw, self.between = signal(16, 16, 5, dilation=2, padding=4, groups=16), Rounded(0.02, 0)
        self.pw = signal(16, 16)
        self.sum, self.last, self.end = Rounded(0.02, 100), signal(16, 8, 3, groups=2), Rounded(0.02)

    def forward(self, x: Tensor) -> Tensor:
        y = self.after(F.relu(self.stem(self.image(x))))
        y = self.sum(self.pw(self.between(F.relu6(self.dw(y)))) + y)
        return self.end(self.last(self.sum(F.max_pool1d(y, 3))))


def signal(inputs: int, outputs: int, size: int = 1, **options: int) -> Whole:
    return Whole(nn.Conv1d(inputs, outputs, size, **{"padding": size // 2, **options}))


@needs_halide
@pytest.mark.parametrize("channels", [1, 2])
def test_signals_are_images_of_one_row(channels: int) -> None:
    model, x = Signal(channels).eval(), torch.randn(2, channels, 101)
    fast = compile(model, x)
    layers = {group.kind: (group.kernel, group.reason) for group in fast.explain().groups if group.name}
    assert layers == {"normal": ("halide", ""), "separable": ("halide", ""), "grouped": ("halide", "")}
    assert fast.explain().precision == "int8"
    for given in (x, torch.randn(3, 101, channels).transpose(1, 2), torch.randn(1, channels, 47)):
        assert steps_apart(fast, model, given, 0.02) <= 1.01


@needs_halide
def test_volumes_are_computed_in_float32_and_say_so() -> None:
    model = nn.Sequential(Rounded(), Whole(nn.Conv3d(3, 8, 3, padding=1)), Rounded(), Whole(nn.Conv3d(8, 4, 1)))
    x = torch.randn(1, 3, 5, 7, 6)
    fast = compile(model.eval(), x)
    reasons = {group.kind: group.reason for group in fast.explain().groups if group.name}
    assert reasons["normal"].startswith("in float32: the kernel is for images (N, C, H, W), got 3 spatial dimensions")
    assert set(reasons) == {"normal", "pointwise"}
    assert steps_apart(fast, model, x, 0.03) <= 1.01


def test_constants_are_whole_numbers_in_the_agreed_order() -> None:
    weight = torch.tensor([[[[0.5]], [[-1.0]]], [[[0.25]], [[0.125]]]])
    scale = Constant(torch.tensor([1 / 127, 0.25 / 127]), "scale")
    whole = Constant((weight / scale.tensor.view(-1, 1, 1, 1)).round().to(torch.int8), "whole")
    quantized = QuantizedConstant(whole, scale, "both")
    torch.testing.assert_close(quantized.tensor, weight, rtol=0, atol=0.5 / 127)
    bias = Constant(torch.tensor([1.0, -1e9]), "bias")
    group = Convolution(quantized, Epilogue(bias, residual=True), Geometry.of_pixels(2))
    x, residual, y = NumberType(torch.uint8, 0.5, 7), NumberType(torch.uint8, 0.25, 9), NumberType(torch.uint8, 0.1, 3)
    found = quantized_constants(group, (x, residual, y))
    tensors = [None if constant is None else constant.tensor for constant in found]
    assert [tensor.dtype for tensor in tensors if tensor is not None] == [
        torch.int8, torch.int32, torch.float32, torch.float32
    ]  # fmt: skip
    assert tensors[1].tolist() == [254, -(2**31 - 1)]
    torch.testing.assert_close(tensors[2], 0.5 * scale.tensor)
    assert tensors[3].tolist() == [7.0, 9.0, 0.25, y.inverse, 3.0, x.inverse]
    assert quantized_constants(group, (x, FLOAT32, FLOAT32))[3].tensor.tolist() == [7.0, 0.0, 0.0, 0.0, 0.0, 2.0]


def test_weights_of_8_bits_are_not_kept_in_float32() -> None:
    model, x = nn.Sequential(Rounded(), conv(8, 8), Rounded()).eval(), torch.randn(1, 8, 5, 5)
    fast = compile(model, x)
    [group] = [step.group for step in network_of(fast).program.steps if isinstance(step.group, Convolution)]
    assert isinstance(group.weight, QuantizedConstant)
    assert group.weight._tensor is None
    assert group.weight._seen() is None
    if not runtime.missing():
        assert group.weight.whole._seen() is None


@needs_halide
def test_a_first_layer_of_several_calls_reads_the_callers_image() -> None:
    """Rows are cut into tiles, and the last ones are a call of their own."""
    model = nn.Sequential(Rounded(0.03, 120), conv(3, 16, 3, stride=2), Rounded(0.03)).eval()
    x = torch.randn(1, 3, 149, 151)
    fast = compile(model, x)
    network = network_of(fast)
    assert network.program.direct == 0
    assert [group.kind for group in fast.explain().groups] == ["normal", "convert"]
    for given in (x, torch.randn_like(x), torch.randn_like(x).contiguous(memory_format=torch.channels_last)):
        assert steps_apart(fast, model, given, 0.03) <= 1.01


class Cut(nn.Module):
    """A filter that meets nothing but padding with most of its taps, and a factor for each channel behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.dw, self.out = Rounded(), depthwise(8, 5), Rounded(0.02)
        self.register_buffer("factor", torch.linspace(-2, 2, 8).view(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dw(self.image(x)) * self.factor)


def test_weights_stay_whole_where_they_are_cut_or_scaled() -> None:
    model, x = Cut().eval(), torch.randn(3, 8, 1, 2)
    fast = compile(model, x)
    [group] = [step.group for step in network_of(fast).program.steps if isinstance(step.group, Convolution)]
    assert group.kernel_size == (1, 3)
    assert group.fused == ("scale",)
    assert isinstance(group.weight, QuantizedConstant)
    assert steps_apart(fast, model, x, 0.02) <= 1.01


@needs_halide
@pytest.mark.parametrize("threads", [1, 8])
def test_batches_go_image_by_image_in_8_bits(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "_MANY_CACHES", 0)
    model, x = Block().eval(), torch.randn(3, 3, 23, 29)
    fast = compile(model, x, threads=threads)
    assert network_of(fast).arena.slices == slices.Slices(3, 3)
    assert steps_apart(fast, model, x, 0.02) <= 1.01
