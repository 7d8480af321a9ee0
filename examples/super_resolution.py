"""A network like EDSR, which doubles the sides of an image: compared by PSNR.

python examples/super_resolution.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sepconv
from sepconv.train import Recipe, evaluate, train


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.body(x)


class SmallEDSR(nn.Module):
    """Images (N, 3, H, W) from 0 to 1 in, (N, 3, 2H, 2W) out."""

    def __init__(self, width: int = 8, blocks: int = 2) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(*(Residual(width) for _ in range(blocks)))
        self.tail = nn.Sequential(nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="nearest") + self.tail(self.body(self.head(x)))


def pictures(count: int, seed: int) -> Tensor:
    """Smooth images with edges, from 0 to 1: (N, 3, 16, 16)."""
    noise = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return (3 * F.interpolate(noise, size=16, mode="bicubic")).sigmoid()


def trained(steps: int = 40) -> nn.Module:
    model = SmallEDSR()
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    for step in range(steps):
        high = pictures(16, seed=step)
        loss = F.mse_loss(model(F.avg_pool2d(high, 2)), high)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def psnr(model: nn.Module, high: Tensor) -> float:
    """Of what the network makes of the small images, in decibels."""
    return float(-10 * F.mse_loss(model(F.avg_pool2d(high, 2)), high).log10())


def main() -> dict[str, float]:
    torch.manual_seed(0)
    model = trained()
    small, test = F.avg_pool2d(pictures(48, seed=1000), 2), pictures(32, seed=1001)

    separable, plan = sepconv.convert(model, small, budget=1 / 2, metric="macs")
    print(plan)
    train(separable, list(small.split(16)), Recipe(epochs=3, lr=0.001, optimizer="adamw"), teacher=model)

    found = evaluate(separable, [F.avg_pool2d(test, 2)], teacher=model, data_range=1.0)
    print(found)
    scores = {"original": psnr(model, test), "separable": psnr(separable, test)}
    print(f"PSNR to the large images: {scores}")
    to_original = found.leaves[0].psnr
    assert to_original is not None
    return {"to_original": to_original, **scores}


if __name__ == "__main__":
    main()
