"""Pointwise stages in blocks between passes over rows, against float64 autograd: one block and several, all numbers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from stage_checks import Truth, relative, single, truth
from torch import Tensor

from sepconv.activations import ACTIVATIONS
from sepconv.kernels import stages
from sepconv.kernels.case import Geometry
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.training import blocks, passes, pointwise, pointwise_gradients, slopes
from sepconv.kernels.prologue import Deviation, Prologue, StageGradients, StageOutput
from sepconv.kernels.stages import StageChoice

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())

WAY = Geometry.of_pixels(2)
ALL = (True, True, True)
# A product's rounding in float32 over a few hundred terms; bfloat16 has 8 bits, and dz, h and dh are each rounded once.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-6}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever is read before it is written is NaN; small stages are ours, too."""
    monkeypatch.setattr(blocks, "_LEAST_NUMBERS", 0)
    torch.use_deterministic_algorithms(True)
    passes.arena(1 << 22).fill_(0xFF)
    stages.forget()
    yield
    torch.use_deterministic_algorithms(False)
    stages.forget()


@pytest.fixture
def ran() -> Iterator[list[str]]:
    """The backends of all stages that ran."""
    names: list[str] = []

    def note(choice: StageChoice) -> None:
        names.append(choice.backend.name)

    token = stages.watcher.set(note)
    yield names
    stages.watcher.reset(token)


def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((pointwise, "forward_block"), (pointwise_gradients, "gradient_block")):
        monkeypatch.setattr(module, name, lambda dtype, threads: 1)


def _without_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where PyTorch has another library of linear algebra."""
    for module in (pointwise, pointwise_gradients):
        monkeypatch.setattr(module, "multiplied", lambda dtype: False)


def _image(shape: tuple[int, ...], dtype: torch.dtype, sliced: bool) -> Tensor:
    n, c, h, w = shape
    whole = torch.randn(n, h, w, c + 6).to(dtype).permute(0, 3, 1, 2)
    return whole[:, 2 : 2 + c] if sliced else whole[:, :c].contiguous(memory_format=torch.channels_last)


class _Called:
    """What ran, forward and back."""

    def __init__(self, t: Truth, dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> None:
        seen: list[StageChoice] = []
        token = stages.watcher.set(seen.append)
        try:
            prologue = single(t.prologue)
            self.output: StageOutput = stages.pointwise_stage(t.x, prologue, weight, bias, True)
            deviation = Deviation(t.deviation.y.to(dtype), *[v.float() for v in t.deviation[1:]])
            deviation = deviation._replace(y=deviation.y.contiguous(memory_format=torch.channels_last))
            need = (True, True, bias is not None)
            self.gradients: StageGradients = stages.pointwise_stage_gradients(
                t.grad, deviation, t.x, prologue, weight, need
            )
        finally:
            stages.watcher.reset(token)
        self.ran = [choice.backend.name for choice in seen]


def _check(called: _Called, t: Truth, dtype: torch.dtype) -> None:
    tolerance, output, found = TOLERANCE[dtype], called.output, called.gradients
    assert called.ran == ["halide", "halide"]
    assert output.y.dtype is dtype
    assert relative(output.y, t.y) < tolerance
    assert output.mean is not None
    assert output.var is not None
    stored = torch.var_mean(output.y.double(), (0, 2, 3), correction=0)
    assert relative(output.var, stored[0]) < 1e-5
    assert float((output.mean - stored[1]).abs().max()) < 1e-5 * float(stored[0].sqrt().max())
    names = {"x": found.x, "weight": found.weight, "bias": found.bias, "shift": found.sum, "scale": found.deviation}
    for name, value in names.items():
        assert (value is None) == (name not in t.gradients), name
        if value is not None:
            assert relative(value, t.gradients[name]) < tolerance, name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("blocks", ["one", "several", "several by torch.mm"])
@pytest.mark.parametrize(
    ("channels", "out_channels", "size", "activation"),
    [
        (16, 32, (2, 11, 13), "relu6"),
        (7, 5, (1, 17, 19), "silu"),
        (24, 1, (3, 7, 5), None),
        (2, 33, (1, 1, 131), "hardswish"),
        (40, 17, (4, 1, 1), "relu"),
        (3, 48, (5, 8, 8), ""),
    ],
)
def test_a_stage_and_its_gradients(
    channels: int,
    out_channels: int,
    size: tuple[int, int, int],
    activation: str | None,
    blocks: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if blocks != "one":
        _small_blocks(monkeypatch)
    if blocks == "several by torch.mm":
        _without_products(monkeypatch)
    x = _image((size[0], channels, *size[1:]), dtype, sliced=blocks == "several")
    weight = (torch.randn(out_channels, channels, 1, 1) / channels**0.5).to(dtype)
    bias = torch.randn(out_channels).to(dtype) if activation == "silu" else None
    t = truth(x, activation, weight, bias, WAY, dtype)
    _check(_Called(t, dtype, weight, bias), t, dtype)


def test_the_way_back_in_parts_that_stay_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of bfloat16, several parts of it behind the product."""
    usual = pointwise_gradients.gradient_block
    monkeypatch.setattr(
        pointwise_gradients,
        "gradient_block",
        lambda dtype, threads: 1 if dtype is torch.float32 else usual(dtype, threads),
    )
    x, weight = _image((2, 16, 17, 19), torch.bfloat16, sliced=True), torch.randn(24, 16, 1, 1).bfloat16()
    t = truth(x, "relu6", weight, None, WAY, torch.bfloat16)
    _check(_Called(t, torch.bfloat16, weight, None), t, torch.bfloat16)


@pytest.mark.parametrize("channels", [16, 9])
def test_bfloat16_is_rounded_to_the_nearest(channels: int) -> None:
    """Whether in pairs or not; a product with ones and zeros keeps what the pass before it has written."""
    x, weight = _image((2, channels, 23, 29), torch.bfloat16, False), torch.eye(channels).bfloat16()
    prologue = Prologue(torch.randn(channels), torch.rand(channels) + 0.5, torch.randn(channels), "")
    y = stages.pointwise_stage(x, prologue, weight.view(channels, channels, 1, 1), None, False).y
    mean, scale, bias = (vector.double()[:, None, None] for vector in prologue[:3])
    exact = (x.double() - mean) * scale + bias
    apart = (y.double() - exact).abs() - exact.abs() * 2**-8
    assert float(apart.max()) < 1e-6


def test_pairs_may_begin_between_words() -> None:
    """Channels from an odd one on."""
    x = torch.randn(2, 11, 9, 14).bfloat16().permute(0, 3, 1, 2)[:, 1:9]
    assert x.data_ptr() % 4 == 2
    weight = torch.randn(6, 8, 1, 1).bfloat16()
    t = truth(x, "relu", weight, None, WAY, torch.bfloat16)
    _check(_Called(t, torch.bfloat16, weight, None), t, torch.bfloat16)


def test_several_blocks_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    _small_blocks(monkeypatch)
    seen: list[StageChoice] = []
    token = stages.watcher.set(seen.append)
    x = _image((3, 8, 11, 13), torch.float32, sliced=False)
    try:
        stages.pointwise_stage(x, None, torch.randn(4, 8, 1, 1), None, True)
    finally:
        stages.watcher.reset(token)
    assert seen[0].backend.describe(seen[0].case) == {"product": "torch.mm", "blocks": 4, "pixels": 128}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_statistics_far_from_zero(dtype: torch.dtype) -> None:
    x = _image((5, 16, 23, 29), dtype, sliced=False)
    weight, bias = torch.eye(16).view(16, 16, 1, 1).to(dtype), torch.full((16,), 1e4 if dtype is torch.float32 else 64)
    output = stages.pointwise_stage(x, None, weight, bias, True)
    assert output.mean is not None
    assert output.var is not None
    var, mean = torch.var_mean(output.y.double(), (0, 2, 3), correction=0)
    assert relative(output.mean, mean) < 1e-6
    assert relative(output.var, var) < 1e-4  # what lies between means of parts is known to a part in 2000


def test_an_outlier_first_of_all_spoils_no_variance() -> None:
    x = _image((1, 16, 16, 16), torch.float32, sliced=False)
    x[:, :, 0, 0] = 1e4
    weight = torch.eye(16).view(16, 16, 1, 1)
    output = stages.pointwise_stage(x, None, weight, None, True)
    assert output.var is not None
    # Around one of a part's own numbers no more is lost than the part has pixels, 128 times 2**-24 for each rounding.
    assert relative(output.var, output.y.double().var((0, 2, 3), correction=0)) < 1e-4


@pytest.mark.parametrize("blocks", ["one", "several"])
def test_results_are_the_same_bits_every_time(blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if blocks == "several":
        _small_blocks(monkeypatch)
    x, weight = _image((2, 19, 13, 11), torch.float32, False), torch.randn(23, 19, 1, 1)
    t = truth(x, "relu6", weight, None, WAY, torch.float32)
    first, second = _Called(t, torch.float32, weight, None), _Called(t, torch.float32, weight, None)
    for one, other in ((first.output, second.output), (first.gradients, second.gradients)):
        for a, b in zip(one, other, strict=True):
            assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("need", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_what_is_not_needed_is_not_there(need: tuple[bool, bool, bool], activation: str | None) -> None:
    x, weight = _image((2, 6, 7, 9), torch.float32, False), torch.randn(10, 6, 1, 1)
    t = truth(x, activation, weight, torch.zeros(10), WAY, torch.float32)
    deviation = Deviation(*[v.float() for v in t.deviation])
    found = stages.pointwise_stage_gradients(t.grad, deviation, x, single(t.prologue), weight, need)
    sums = need[0] and activation is not None
    assert [value is not None for value in found] == [need[0], sums, sums, need[1], need[2]]
    for value, name in zip(found, ("x", "shift", "scale", "weight", "bias"), strict=True):
        assert value is None or relative(value, t.gradients[name]) < 2e-5


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("need", [(True, True, False), (True, False, False), (False, True, False)])
def test_an_activation_without_a_norm(need: tuple[bool, bool, bool], dtype: torch.dtype, ran: list[str]) -> None:
    """Nobody asks for the sums of a norm that is not there."""
    x, grad = _image((2, 24, 13, 11), dtype, False), _image((2, 16, 13, 11), dtype, False)
    weight, prologue = (torch.randn(16, 24, 1, 1) / 5).to(dtype), Prologue.alone("gelu", 24)
    y = stages.pointwise_stage(x, prologue, weight, None, False).y
    found = stages.pointwise_stage_gradients(grad, None, x, prologue, weight, need)
    given = [t.double().requires_grad_() for t in (x, weight)]
    true = torch.nn.functional.conv2d(torch.nn.functional.gelu(given[0]), given[1])
    true.backward(grad.double())
    assert ran == ["halide", "halide"]
    assert relative(y, true.detach()) < TOLERANCE[dtype]
    assert found.sum is found.deviation is None
    for value, t, needed in zip((found.x, found.weight), given, need[:2], strict=True):
        assert (value is not None) == needed
        assert value is None or t.grad is None or relative(value, t.grad) < TOLERANCE[dtype]


def test_a_gradient_in_another_layout_is_brought_into_ours() -> None:
    x, weight = _image((2, 6, 7, 9), torch.float32, False), torch.randn(10, 6, 1, 1)
    grad = torch.randn(2, 10, 1, 1).expand(2, 10, 7, 9)
    found = stages.pointwise_stage_gradients(grad, None, x, None, weight, (True, True, False))
    again = stages.pointwise_stage_gradients(grad.contiguous(), None, x, None, weight, (True, True, False))
    true = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    for mine, other, theirs in ((found.x, again.x, true[0]), (found.weight, again.weight, true[1])):
        assert mine is not None
        assert other is not None
        assert torch.equal(mine, other)
        assert relative(mine, theirs.double()) < 1e-5


def test_float32_weights_of_bfloat16_images_keep_their_kind() -> None:
    x, weight = _image((2, 6, 7, 9), torch.bfloat16, False), torch.randn(10, 6, 1, 1)
    grad = _image((2, 10, 7, 9), torch.bfloat16, False)
    assert stages.pointwise_stage(x, None, weight, None, False).y.dtype is torch.bfloat16
    found = stages.pointwise_stage_gradients(grad, None, x, None, weight, (True, True, False))
    assert found.weight is not None
    assert found.weight.dtype is torch.float32
    assert found.x is not None
    assert found.x.dtype is torch.bfloat16


def test_rows_and_volumes_are_torchs(ran: list[str]) -> None:
    for size in ((2, 6, 9), (2, 6, 3, 4, 5)):
        weight = torch.randn(4, 6, *(1,) * (len(size) - 2))
        stages.pointwise_stage(torch.randn(size), None, weight, None, False)
    assert ran == ["torch", "torch"]


@pytest.mark.parametrize(
    ("x", "activation", "reason"),
    [
        (torch.randn(2, 6, 7, 9), None, "do not lie evenly spaced"),
        (torch.randn(2, 7, 9, 6).permute(0, 3, 1, 2).double(), None, "float32 but got torch.float64"),
        (torch.randn(2, 7, 9, 6).permute(0, 3, 1, 2), "mish", "no derivative of mish"),
        (torch.randn(1, 1, 3, 6).permute(0, 3, 1, 2), None, "3 pixels are fewer"),
        (torch.randn(0, 7, 9, 6).permute(0, 3, 1, 2), None, "0 pixels"),
        (torch.randn(2, 7, 9, 1).permute(0, 3, 1, 2), None, "in different orders"),
    ],
)
def test_what_the_kernel_is_not_for(x: Tensor, activation: str | None, reason: str) -> None:
    seen: list[StageChoice] = []
    token = stages.watcher.set(seen.append)
    vectors = [torch.ones(x.shape[1], dtype=x.dtype)] * 3
    prologue = None if activation is None else Prologue(vectors[0], vectors[1], vectors[2], activation)
    try:
        stages.pointwise_stage(x, prologue, torch.randn(4, x.shape[1], 1, 1).to(x.dtype), None, False)
    finally:
        stages.watcher.reset(token)
    assert seen[0].backend.name == "torch"
    assert reason in seen[0].reasons["halide"]


def test_small_stages_of_float32_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    seen: list[StageChoice] = []
    token = stages.watcher.set(seen.append)
    try:
        for dtype in TOLERANCE:
            x, weight = _image((2, 16, 7, 9), dtype, False), torch.randn(16, 16, 1, 1).to(dtype)
            stages.pointwise_stage(x, None, weight, None, True)
            stages.pointwise_stage_gradients(x, None, x, None, weight, ALL)
    finally:
        stages.watcher.reset(token)
    assert [choice.backend.name for choice in seen] == ["torch", "torch", "halide", "halide"]
    assert "4,032 numbers" in seen[0].reasons["halide"]


def test_autocast_does_not_reach_into_a_stage() -> None:
    x, weight = _image((2, 24, 13, 11), torch.float32, False), torch.randn(16, 24, 1, 1)
    t = truth(x, "relu6", weight, None, WAY, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        called = _Called(t, torch.float32, weight, None)
    _check(called, t, torch.float32)


def test_several_threads_call_at_once() -> None:
    x, weight = _image((2, 24, 23, 29), torch.float32, False), torch.randn(16, 24, 1, 1)
    t = truth(x, "relu6", weight, None, WAY, torch.float32)
    with ThreadPoolExecutor(4) as pool:
        called = list(pool.map(lambda _: [_Called(t, torch.float32, weight, None) for _ in range(5)], range(4)))
    for own in called:
        for each in own:
            _check(each, t, torch.float32)


@pytest.mark.parametrize(
    "activation",
    [
        "relu",
        "relu6",
        "hardswish",
        "clamp(-3.0, 3.0)",
        "silu",
        "sigmoid",
        "hardsigmoid",
        "tanh",
        "gelu",
        "gelu_tanh",
        "leaky_relu",
    ],
)
def test_gradients_of_activations(activation: str, ran: list[str]) -> None:
    """At their kinks as well, where PyTorch's are a choice; and far from 0."""
    values = torch.tensor([-3.0, 0.0, 3.0, 6.0, -6.0, 100.0, -100.0, 1e4, -1e4, 20.0, -20.0])
    x = torch.cat([values, torch.linspace(-9, 9, 200)]).view(1, 1, 1, -1)
    assert not slopes.missing(activation)
    prologue = Prologue(torch.zeros(1), torch.ones(1), torch.zeros(1), activation)
    grad, weight = torch.full(x.shape, 2.0), torch.ones(1, 1, 1, 1)
    found = stages.pointwise_stage_gradients(grad, None, x, prologue, weight, (True, False, False))
    assert found.x is not None
    argument = x.double().requires_grad_()
    ACTIVATIONS[activation].function(argument).backward(grad.double())
    assert argument.grad is not None
    assert float((found.x - argument.grad).abs().max()) < 2e-6
    assert ran == ["halide"]


def test_parameters_of_leaky_relu() -> None:
    x = torch.linspace(-2, 2, 8).view(1, 1, 1, 8)
    prologue = Prologue(torch.zeros(1), torch.ones(1), torch.zeros(1), "leaky_relu(0.25)")
    weight = torch.ones(1, 1, 1, 1)
    found = stages.pointwise_stage_gradients(torch.ones_like(x), None, x, prologue, weight, (True, False, False))
    assert found.x is not None
    assert found.x.flatten().tolist() == [0.25] * 4 + [1.0] * 4


def test_infinity_that_does_not_come_through_is_0() -> None:
    x, grad = torch.full((1, 1, 1, 4), -1.0), torch.full((1, 1, 1, 4), torch.inf)
    prologue = Prologue(torch.zeros(1), torch.ones(1), torch.zeros(1), "relu6")
    found = stages.pointwise_stage_gradients(grad, None, x, prologue, torch.ones(1, 1, 1, 1), (True, False, False))
    assert found.x is not None
    assert found.x.flatten().tolist() == [0.0] * 4
