"""Normal and grouped convolutions, and norms that no convolution stands before, have kernels too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import randomise
from torch import Tensor, nn

from sepconv.compile import compile
from sepconv.kernels.halide.jit import runtime

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())
RELATIVE = 1e-5


class Residual(nn.Module):
    """The block of ResNet: what is added comes from before both convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(17, 24, 3, 1, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(24, 17, 3, 1, 1, bias=False), nn.BatchNorm2d(17))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(x)) + x)


def before(*rest: nn.Module) -> nn.Module:
    """Norm and activation before what follows, as in DenseNet."""
    return nn.Sequential(nn.BatchNorm2d(17), nn.ReLU(), *rest)


Groups = list[tuple[str, str, tuple[str, ...]]]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Groups]] = {
    "strided": (
        lambda: nn.Sequential(nn.Conv2d(17, 40, 3, 2, 1), nn.Hardswish(), nn.Conv2d(40, 8, 1, 2)),
        [("normal", "halide", ("hardswish",)), ("normal", "halide", ())],
    ),
    "dilated": (lambda: nn.Conv2d(17, 9, 3, padding=2, dilation=2), [("normal", "halide", ())]),
    "in_groups": (
        lambda: nn.Sequential(nn.Conv2d(17, 64, 3), nn.Conv2d(64, 96, 3, 1, 1, groups=2), nn.ReLU6()),
        [("normal", "halide", ()), ("grouped", "halide", ("relu6",))],
    ),
    "residual": (
        Residual,
        [("normal", "halide", ("norm", "relu")), ("normal", "halide", ("norm", "add", "relu"))],
    ),
    "norm_before_pointwise": (
        lambda: before(nn.Conv2d(17, 20, 1)),
        [("separable", "halide", ("norm", "relu", "pointwise"))],
    ),
    "norm_before_normal": (
        lambda: before(nn.Conv2d(17, 20, 3, padding=1)),
        [("depthwise", "halide", ("norm", "relu")), ("normal", "halide", ())],
    ),
    "norm_behind_activation": (
        lambda: nn.Sequential(nn.Conv2d(17, 12, 3), nn.GELU(), nn.BatchNorm2d(12)),
        [("normal", "halide", ("gelu",)), ("depthwise", "halide", ("norm",))],
    ),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", NETWORKS)
def test_each_is_one_group_with_a_kernel(name: str, channels_last: bool) -> None:
    torch.manual_seed(0)
    make, groups = NETWORKS[name]
    model = randomise(make()).eval()
    x = torch.randn(2, 17, 13, 11)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    fast = compile(model, x)
    found = [(group.kind, group.kernel, group.fused) for group in fast.explain().groups if group.kind != "copy"]
    assert found == groups
    for given in (x, torch.randn(1, 17, 9, 15)):
        expected = model.double()(given.double())
        model.float()
        assert (fast(given) - expected).abs().max() <= RELATIVE * expected.abs().max()


def test_a_norm_of_one_channel_or_of_signals_is_a_product_and_a_sum() -> None:
    for model, x in (
        (nn.BatchNorm2d(1), torch.randn(1, 1, 5, 5)),
        (nn.BatchNorm1d(3), torch.randn(2, 3, 7)),
        (nn.BatchNorm1d(5), torch.randn(2, 5)),
        (nn.BatchNorm3d(4), torch.randn(2, 4, 3, 5, 2)),
    ):
        fast = compile(randomise(model).eval(), x)
        torch.testing.assert_close(fast(x), model(x))
        found = [(group.kernel, group.fused) for group in fast.explain().groups if group.kind != "copy"]
        assert found == [("halide", ("mul", "add"))]


class NormOfRows(nn.Module):
    """LeViT's linear layer: the norm of what it gives, with all rows in one dimension."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.linear, self.turned = nn.Linear(12, 20, bias=False), turned
        self.norm = nn.BatchNorm1d(7 if turned else 20)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.norm(y) if self.turned else self.norm(y.flatten(0, 1)).reshape_as(y)


@pytest.mark.parametrize("turned", [False, True])
def test_a_norm_goes_through_reshapes_where_it_is_of_outputs(turned: bool) -> None:
    torch.manual_seed(0)
    model, x = randomise(NormOfRows(turned)), torch.randn(2, 7, 12)
    fast = compile(model, x)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    found = [group.fused for group in fast.explain().groups if group.kind != "copy"]
    assert found == ([(), ("mul", "add")] if turned else [("norm",)])


def test_statistics_of_the_batch_are_pytorchs() -> None:
    model = nn.BatchNorm2d(5, track_running_stats=False).eval()
    x = torch.randn(2, 5, 4, 4)
    fast = compile(model, x)
    torch.testing.assert_close(fast(x), model(x))
    assert "halide" not in {group.kernel for group in fast.explain().groups}
