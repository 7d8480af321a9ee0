"""A U-Net that finds discs: converted without labels, compared by its masks and by a number of our own.

python examples/segmentation.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sepconv
from sepconv.train import Distillation, Recipe, evaluate, train

SIZE = 16


def block(channels: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = block(1, width), block(width, 2 * width), block(2 * width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.last, self.head = block(2 * width, width), nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down1(x)
        low = self.middle(self.down2(F.max_pool2d(high, 2)))
        return self.head(self.last(torch.cat([high, self.up(low)], 1))).sigmoid()


def discs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images of bright discs, and their masks: (N, 1, 16, 16) each."""
    random = torch.Generator().manual_seed(seed)
    centre = SIZE * torch.rand(count, 2, 1, 1, generator=random)
    radius = 3 + 4 * torch.rand(count, 1, 1, generator=random)
    grid = torch.stack(torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij"))
    masks = ((grid - centre).square().sum(1).sqrt() < radius).float()[:, None]
    return masks + 0.5 * torch.randn(masks.shape, generator=random), masks


def trained(images: Tensor, masks: Tensor, steps: int = 40) -> nn.Module:
    """In a loop of our own, as anybody's network is."""
    model = UNet()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(steps):
        part = slice(step * 16 % len(images), step * 16 % len(images) + 16)
        loss = F.binary_cross_entropy(model(images[part]), masks[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def iou(model: nn.Module, images: Tensor, masks: Tensor) -> float:
    """Intersection over union of the masks."""
    found, wanted = model(images) > 0.5, masks > 0.5
    return float((found & wanted).sum() / (found | wanted).sum())


def main() -> dict[str, float]:
    torch.manual_seed(0)
    images, masks = discs(192, seed=1)
    test_images, test_masks = discs(64, seed=2)
    model = trained(images, masks)

    separable, plan = sepconv.convert(model, images[:48], budget=1 / 6)
    print(plan)
    converted = evaluate(separable, [test_images], teacher=model)

    batches = list(images.split(32))  # any iterable of batches, such as a DataLoader
    recipe = Recipe(epochs=2, lr=0.002, optimizer="adamw")
    train(separable, batches, recipe, teacher=model, distillation=Distillation(features="auto"))
    distilled = evaluate(separable, [test_images], teacher=model)

    print(f"converted: {converted}\ndistilled: {distilled}")
    scores = {name: iou(net, test_images, test_masks) for name, net in (("original", model), ("separable", separable))}
    print(f"intersection over union: {scores}")
    return {"converted": converted.relative_error, "distilled": distilled.relative_error, **scores}


if __name__ == "__main__":
    main()
