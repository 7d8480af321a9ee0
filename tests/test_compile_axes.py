"""What only moves numbers, and what is along some dimensions, are steps of our own, whatever the model calls them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import randomise
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.compile import compile
from sepconv.compile.moves import split_alike
from sepconv.kernels.halide.jit import runtime

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())


class Between(nn.Module):
    """A function between two convolutions, or of what the first makes."""

    def __init__(self, function: Callable[[Tensor], Tensor], last: int = 0) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.function = function
        self.last = nn.Conv2d(last, 5, 1) if last else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.function(self.first(x)))
        return found


Function = Callable[[Tensor], Tensor]
# The kinds of the steps behind the first convolution.
STEPS: dict[str, tuple[Function, list[str]]] = {
    "softmax_of_channels": (lambda x: x.softmax(1), ["softmax"]),
    "softmax_of_rows": (lambda x: x.softmax(-1), ["copy", "softmax"]),
    "softmax_of_pixels": (lambda x: x.flatten(2).softmax(-1), ["copy", "softmax"]),
    "log_softmax": (lambda x: F.log_softmax(x, 1), ["log_softmax"]),
    "sum_of_channels": (lambda x: x.sum(1), ["sum"]),
    "mean_of_channels": (lambda x: x.mean(1, keepdim=True), ["mean"]),
    "largest_of_channels": (lambda x: x.amax(1, keepdim=True), ["amax"]),
    "largest_and_where": (lambda x: x.max(1).values, ["amax"]),
    "largest_of_the_image": (lambda x: x.amax((2, 3)), ["amax"]),
    "smallest": (lambda x: x.amin((0, 2)), ["amin"]),
    "sum_of_all": (lambda x: x.sum(), ["sum"]),
    "mean_of_all": (lambda x: x.mean(), ["mean"]),
    "sum_of_parts": (lambda x: x.view(len(x), 3, 4, *x.shape[2:]).sum(1), ["sum"]),
    "padded": (lambda x: F.pad(x, (1, 2, 3, 0), value=0.5), ["pad"]),
    "padded_by_reflection": (lambda x: F.pad(x, (1, 2, 3, 1), mode="reflect"), ["pad"]),
    "padded_by_edges": (lambda x: F.pad(x, (1, 2, 3, 1), mode="replicate"), ["pad"]),
    "shifted": (lambda x: x.roll((1, -2), (2, 3)), ["roll"]),
    "turned": (lambda x: x.flip(2, 3), ["flip"]),
    "turned_channels": (lambda x: x.flip(1), ["flip"]),
    "chosen": (lambda x: x[:, [3, 0, 0, 11]], ["index"]),
    "chosen_rows": (lambda x: torch.index_select(x, 2, torch.tensor([4, 1])), ["index"]),
    "flat": (lambda x: x.flatten(1), ["copy"]),
    "reshaped_across": (lambda x: x.reshape(len(x), 20, 21), ["copy"]),
    "across_rows": (lambda x: torch.cat([x, x.flip(2)], 2), ["flip", "copy", "copy"]),
    "across_batches": (lambda x: torch.cat([x, x * 2]), ["elementwise", "copy", "copy"]),
    "stacked": (lambda x: torch.stack([x, x], 1), ["copy", "copy"]),
    "repeated": (lambda x: x.repeat(1, 1, 2, 1), ["copy"]),
    "similarities": (lambda x: x.flatten(2) @ x.flatten(2).mT, ["product"]),
    "lengths": (lambda x: torch.linalg.vector_norm(x, dim=1), ["elementwise", "sum", "elementwise"]),
    "padded_by_nothing": (lambda x: F.pad(x, (0, 0, 0, 0)), []),
    "beside_new_numbers": (lambda x: torch.cat([x, x.new_zeros(len(x), 12, 1, 5)], 2), ["copy", "copy"]),
    "tokens": (lambda x: x.flatten(2).transpose(1, 2).reshape(len(x), -1), []),
}


def steps(model: nn.Module, x: Tensor) -> list[tuple[str, str]]:
    fast = compile(model, x)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    return [(group.kind, group.kernel) for group in fast.explain().groups]


@pytest.mark.parametrize("name", STEPS)
def test_steps(name: str) -> None:
    torch.manual_seed(0)
    function, expected = STEPS[name]
    for batch in (1, 2):
        found = steps(Between(function).eval(), torch.randn(batch, 3, 7, 5))
        assert [kind for kind, _ in found] == ["normal", *expected]
        assert {kernel for _, kernel in found} <= {"halide", "copy"}


SHAPED: dict[str, tuple[Function, int, int]] = {
    # a function that gives an image, its channels, and how many copies it takes
    "to_pixels": (lambda x: F.pixel_shuffle(x, 2), 3, 1),
    "to_channels": (lambda x: F.pixel_unshuffle(x, 2), 48, 1),
    "quarters": (
        lambda x: x.reshape(len(x), 3, 4, x.shape[2], x.shape[3]).permute(0, 2, 1, 3, 4).flatten(0, 1),
        3,
        1,
    ),
    "windows": (
        lambda x: x.view(len(x), 12, 2, x.shape[2] // 2, x.shape[3]).permute(0, 2, 1, 3, 4).flatten(0, 1),
        12,
        0,
    ),
    "every_second": (lambda x: torch.cat([x[..., ::2, ::2], x[..., 1::2, 1::2]], 1), 24, 2),
}


@pytest.mark.parametrize("name", SHAPED)
def test_images_of_another_shape_are_copied_once(name: str) -> None:
    torch.manual_seed(0)
    function, channels, copies = SHAPED[name]
    found = steps(Between(function, channels).eval(), torch.randn(2, 3, 6, 10))
    assert [kind for kind, _ in found] == ["normal", *["copy"] * copies, "pointwise"]


def test_explain_says_what_a_copy_is_for() -> None:
    x = torch.randn(1, 3, 7, 5)
    groups = compile(Between(lambda x: x.flatten(1)).eval(), x).explain().groups
    assert [(group.kind, group.fused) for group in groups[1:]] == [("copy", ("reshape",))]


def test_numbers_of_other_types_stay_pytorchs() -> None:
    x = torch.randn(1, 3, 7, 5)
    for function in (lambda x: x.double().sum(1), lambda x: x.double().flip(1), lambda x: x.double().softmax(1)):
        groups = compile(Between(function).eval(), x).explain().groups
        assert any(group.kernel == "torch" and "float64" in group.reason for group in groups)


@pytest.mark.parametrize(
    ("before", "after", "sizes"),
    [
        ((2, 12, 5), (2, 3, 4, 5), (2, 3, 4, 5)),
        ((6, 4), (3, 8), (3, 2, 4)),
        ((6, 4), (8, 3), None),
        ((3, 1, 5), (15,), (3, 5)),
        ((1,), (1, 1), ()),
        ((0, 3), (3, 0), None),
    ],
)
def test_sizes_that_both_shapes_can_be_split_into(
    before: tuple[int, ...], after: tuple[int, ...], sizes: tuple[int, ...] | None
) -> None:
    assert split_alike(before, after) == sizes


class Upscaled(nn.Module):
    """A transposed convolution with all that a convolution may take in behind it."""

    def __init__(self, channels: int, **settings: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, 2 * channels, **settings)  # type: ignore[arg-type]
        self.norm = nn.BatchNorm2d(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.up(x)))


UPSCALED: list[dict[str, int]] = [
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 4, "stride": 2, "padding": 1},
    {"kernel_size": 4, "stride": 2, "padding": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": 5, "stride": 3, "padding": 1, "output_padding": 2},
    {"kernel_size": 9, "stride": 3, "padding": 4, "output_padding": 2},
    {"kernel_size": 2, "stride": 3},
    {"kernel_size": 4, "stride": 2, "padding": 1, "groups": 2},
    {"kernel_size": 4, "stride": 2, "padding": 1, "groups": 6},
]


@pytest.mark.parametrize("settings", UPSCALED, ids=str)
def test_transposed_convolutions_are_normal_ones(settings: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = randomise(Upscaled(6, **settings))
    found = compile(model, x := torch.randn(2, 6, 7, 5))
    torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-5)
    first, *rest = found.explain().groups
    assert first.kind in ("normal", "grouped", "pointwise", "depthwise")
    assert first.fused == ("norm", "relu")
    assert {group.kind for group in rest} <= {"copy"}


def test_transposed_convolutions_that_are_not() -> None:
    """With holes, or with padding beyond the filter, they stay PyTorch's; a norm of the batch sees no more than it."""
    x = torch.randn(2, 6, 7, 5)
    for settings in ({"kernel_size": 3, "dilation": 2}, {"kernel_size": 1, "padding": 1}):
        model = randomise(Upscaled(6, **settings))
        found = compile(model, x)
        torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-5)
        assert found.explain().groups[0].kernel == "torch"

    class OfTheBatch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(6, 4, 4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.up(x), None, None, training=True)

    model = OfTheBatch().eval()
    torch.testing.assert_close(compile(model, x)(x), model(x), rtol=1e-4, atol=1e-5)
