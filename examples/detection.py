"""A small detector with two heads, as YOLO has them: a list of outputs of different shapes and sizes.

python examples/detection.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import sepconv
from sepconv.train import Distillation, Recipe, evaluate, train

ANCHORS, CLASSES = 3, 4


def block(channels: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.SiLU())


class Detector(nn.Module):
    """For every anchor of every cell of two grids: a box in pixels, whether something is there, and what."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.fine, self.coarse = block(3, width, 2), block(width, 2 * width, 2), block(2 * width, 16, 2)
        self.heads = nn.ModuleList(nn.Conv2d(c, ANCHORS * (5 + CLASSES), 1) for c in (2 * width, 16))

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        fine = self.fine(self.stem(x))
        found = [head(y) for head, y in zip(self.heads, (fine, self.coarse(fine)), strict=True)]
        maps = [y.unflatten(1, (ANCHORS, 5 + CLASSES)).movedim(2, -1) for y in found]
        return {"boxes": [x.shape[-1] * y[..., :4].sigmoid() for y in maps], "scores": [y[..., 4:] for y in maps]}


def photos(count: int, seed: int) -> Tensor:
    """Smooth random images: (N, 3, 16, 16)."""
    noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(noise, size=16, mode="bilinear")


def main() -> dict[str, float]:
    torch.manual_seed(0)
    model = Detector()
    for seed in range(20):
        model(photos(16, seed))  # batch norms see some images
    model.eval()

    # Boxes are in pixels and scores are not: each output counts by its own variance, and scores twice.
    weights = {"scores.0": 2.0, "scores.1": 2.0}
    separable, plan = sepconv.convert(model, photos(48, seed=101), budget=1 / 2, output_weights=weights)
    print(plan)
    converted = evaluate(separable, [photos(32, seed=102)], teacher=model, output_weights=weights)

    recipe = Recipe(epochs=4, lr=0.002, optimizer="adamw")
    settings = Distillation(output_weights=weights)
    train(separable, list(photos(192, seed=101).split(32)), recipe, teacher=model, distillation=settings)
    distilled = evaluate(separable, [photos(32, seed=102)], teacher=model, output_weights=weights)
    print(f"converted: {converted}\ndistilled: {distilled}")

    fast = sepconv.compile(separable, photos(1, seed=103))
    assert [tuple(box.shape) for box in fast(photos(1, seed=103))["boxes"]] == [(1, 3, 4, 4, 4), (1, 3, 2, 2, 4)]
    return {"converted": converted.relative_error, "distilled": distilled.relative_error}


if __name__ == "__main__":
    main()
