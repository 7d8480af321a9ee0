"""Normal stages, PyTorch's convolutions between passes over rows, against float64 autograd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from stage_checks import geometry, relative, single, truth
from torch import Tensor

from sepconv.kernels import stages
from sepconv.kernels.case import Geometry
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.training import passes
from sepconv.kernels.prologue import Deviation, Prologue
from sepconv.kernels.stages import StageChoice
from sepconv.kernels.torch import stages as by_torch

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())

# The rounding of a product in float32 over a few hundred terms; to the 8 bits of bfloat16 dz, h and dh are rounded.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-6}


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Whatever is read before it is written is NaN."""
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


def _image(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("channels", "filters", "way", "activation"),
    [
        (3, (16, 3, 3, 3), geometry(2), None),
        (8, (12, 8, 3, 3), geometry(1), "relu6"),
        (12, (6, 4, 5, 5), geometry(1, 3, 2), "hardswish"),
        (5, (7, 5, 3, 3), Geometry((2, 2), ((0, 1), (0, 1)), (1, 1)), "silu"),
    ],
)
def test_a_stage_and_its_gradients(
    channels: int,
    filters: tuple[int, ...],
    way: Geometry,
    activation: str | None,
    dtype: torch.dtype,
    ran: list[str],
) -> None:
    x = _image(2, channels, 13, 17).to(dtype)[:, :, :, 1:]
    weight, bias = (torch.randn(filters) / 5).to(dtype), torch.randn(filters[0]).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    symmetric = way.padding[0][0] == way.padding[0][1]
    if not symmetric:
        _check_against_torch(x, weight, way, activation)
        return
    t = truth(x, activation, weight, bias, way, dtype)
    prologue = single(t.prologue)
    output = stages.normal_stage(x, prologue, weight, bias, way, True)
    deviation = Deviation(_image(1, 1, 1, 1), *[v.float() for v in t.deviation[1:]])
    deviation = deviation._replace(y=t.deviation.y.to(dtype).contiguous(memory_format=torch.channels_last))
    found = stages.normal_stage_gradients(t.grad, deviation, x, prologue, weight, way, (True, True, True))
    assert ran == ["halide", "halide"]
    assert relative(output.y, t.y) < TOLERANCE[dtype]
    var, mean = torch.var_mean(output.y.double(), (0, 2, 3), correction=0)
    assert output.mean is not None
    assert output.var is not None
    assert relative(output.mean, mean) < 1e-5
    assert relative(output.var, var) < 1e-5
    names = {"x": found.x, "weight": found.weight, "bias": found.bias, "shift": found.sum, "scale": found.deviation}
    for name, value in names.items():
        assert (value is None) == (name not in t.gradients), name
        if value is not None:
            assert relative(value, t.gradients[name]) < TOLERANCE[dtype], name


def _check_against_torch(x: Tensor, weight: Tensor, way: Geometry, activation: str | None) -> None:
    """Padding that differs from end to end."""
    channels = x.shape[1]
    vectors = torch.randn(channels), torch.rand(channels) + 0.5, torch.randn(channels)
    prologue = None if activation is None else Prologue(*vectors, activation)
    mine = stages.normal_stage(x, prologue, weight, None, way, True)
    true = by_torch.convolution(x, prologue, weight, None, way, True)
    grad = torch.randn_like(mine.y)
    found = stages.normal_stage_gradients(grad, None, x, prologue, weight, way, (True, True, False))
    given = by_torch.convolution_gradients(grad, None, x, prologue, weight, way, (True, True, False))
    for value, other in zip((*mine, *found[:4]), (*true, *given[:4]), strict=True):
        assert value is not None
        assert other is not None
        assert relative(value, other.double()) < TOLERANCE[x.dtype]


def test_a_gradient_in_another_layout_is_brought_into_ours(ran: list[str]) -> None:
    x, weight = _image(2, 6, 7, 9), torch.randn(10, 6, 3, 3)
    grad = torch.randn(2, 10, 1, 1).expand(2, 10, 7, 9)
    found = stages.normal_stage_gradients(grad, None, x, None, weight, geometry(), (True, True, False))
    again = stages.normal_stage_gradients(grad.contiguous(), None, x, None, weight, geometry(), (True, True, False))
    assert ran == ["halide", "halide"]
    for mine, other in zip(found, again, strict=True):
        assert mine is other is None or torch.equal(mine, other)


def test_an_image_that_is_not_channels_last_is_torchs(ran: list[str]) -> None:
    stages.normal_stage(torch.randn(2, 3, 8, 8), None, torch.randn(4, 3, 3, 3), None, geometry(), True)
    assert ran == ["torch"]


def test_autocast_does_not_change_the_numbers_of_a_result(ran: list[str]) -> None:
    x, weight = _image(2, 6, 7, 9), torch.randn(10, 6, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        output = stages.normal_stage(x, None, weight, None, geometry(), True)
    assert ran == ["halide"]
    assert output.y.dtype is torch.float32
    assert output.mean is not None
    assert relative(output.mean, output.y.double().mean((0, 2, 3))) < 1e-5
