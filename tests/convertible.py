"""Small networks and single layers to convert, and images for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sepconv
from sepconv.convert.images import CalibrationImages
from sepconv.convert.moments import Moments

convert = partial(sepconv.convert, form="separable")


def conv(channels: int, outputs: int, size: int = 3, **arguments: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, outputs, size, **{"padding": size // 2, **arguments})


class Residual(nn.Module):
    def __init__(self, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(channels, outputs, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(channels, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu_(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Shared(nn.Module):
    """One convolution registered under two names and called twice, on images of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.first = conv(6, 6)
        self.again = nn.ModuleDict({"same": self.first})
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(torch.relu(self.stem(x))))
        x = torch.relu(self.again["same"](x[:, :, ::2, ::2]))
        return self.head(x.mean((2, 3)))


def plain() -> nn.Module:
    return nn.Sequential(
        conv(3, 8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        conv(8, 12),
        nn.ReLU(),
        nn.BatchNorm2d(12),
        conv(12, 12, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


def resnet() -> nn.Module:
    blocks = nn.Sequential(Residual(8, 8, 1), Residual(8, 12, 2))
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


def unusual() -> nn.Module:
    return nn.Sequential(
        conv(3, 6, 5, padding_mode="reflect"),
        nn.SiLU(),
        conv(6, 7, dilation=2, padding="same"),
        nn.Tanh(),
        nn.Sequential(nn.Sequential(conv(7, 5, padding=0, stride=(2, 1), padding_mode="circular"))),
        nn.Flatten(2),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "resnet": resnet,
    "shared": Shared,
    "unusual": unusual,
}


def images(count: int = 40, size: int = 13, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(count, 3, size, size, dtype=torch.float64, generator=generator)
    return (nn.functional.avg_pool2d(noise, 3, 1, 1) * 2).to(dtype)


def trained(make: Callable[[], nn.Module]) -> nn.Module:
    """A network whose batch norms have seen images, in evaluation mode."""
    model = make().double()
    for _ in range(20):
        model(images())
    return model.eval()


def smooth_images(channels: int, seed: int = 0, count: int = 12, size: int = 11) -> Tensor:
    """Images whose pixels and channels are correlated, as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, size, size, dtype=torch.float64, generator=generator)
    x = nn.functional.avg_pool2d(x, 3, 1, 1)
    mix = torch.randn(channels, channels, dtype=torch.float64, generator=generator)
    return torch.einsum("dc,nchw->ndhw", mix, x) + 0.5


def make_conv(seed: int = 0, **arguments: Any) -> nn.Conv2d:
    torch.manual_seed(seed)
    return nn.Conv2d(5, 7, 3, padding=1, **arguments).double().requires_grad_(False)


def gather(conv: nn.Module, x: Tensor, target: Tensor | None = None, pixels: int = 10**6) -> Moments:
    moments = Moments(conv)
    moments.add(x, conv(x), target, pixels, torch.Generator().manual_seed(0))
    return moments


def before_and_after() -> tuple[nn.Module, nn.Module, CalibrationImages]:
    """Two networks that are the same, and images that they have seen."""

    def make() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))

    old, new = make().double(), make().double()
    images = CalibrationImages(torch.randn(300, 3, 9, 9) * 2 + 1, torch.device("cpu"), torch.float64)
    for x in images.batches():
        x[:64].run(old)
    new.load_state_dict(old.state_dict())
    return old.eval(), new.eval(), images
