"""The ideas behind depthwise separable convolution, one small experiment each, on Fashion-MNIST and CIFAR-10.

Every variant is the same small network with another kind of block, trained alike with several seeds.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence.runner import RUNS, Step
from benchmarks.evidence.teachers import NAMES, SOURCE
from sepconv.cost import count
from sepconv.data import Data, load
from sepconv.layers import PointwiseConv2d, SeparableConv2d
from sepconv.models.blocks import classifier_head, conv3x3, conv_norm, initialize, pool_and_classify
from sepconv.system.files import replacing
from sepconv.train import Recipe, evaluate, train

SEEDS = (0, 1, 2)
STEM = 16
BLOCKS = ((32, 1), (64, 2), (64, 1))
"""Output channels and stride of each block, behind a stem that halves the image."""

RECIPES = {
    "fashion": Recipe(epochs=2, batch_size=128, lr=0.2, label_smoothing=0.1, flip=True),
    "cifar10": Recipe(epochs=4, batch_size=128, lr=0.2, label_smoothing=0.1, flip=True, crop_padding=2),
}
Block = Callable[[int, int, int], nn.Module]


class SmallNet(nn.Module):
    """A stem of stride 2, three blocks of one kind, the mean over the pixels, a classifier.

    Shape:
        x: (N, in_channels, H, W)    ->    (N, num_classes)
    """

    def __init__(self, block: Block, width: float, in_channels: int, num_classes: int) -> None:
        super().__init__()
        widths = [max(4, round(outputs * width)) for outputs, _ in BLOCKS]
        stem = max(4, round(STEM * width))
        self.stem = conv_norm(conv3x3(in_channels, stem, 2), nn.ReLU)
        sizes = zip((stem, *widths), widths, BLOCKS, strict=False)
        self.blocks = nn.Sequential(*(block(before, after, stride) for before, after, (_, stride) in sizes))
        self.classifier = classifier_head(widths[-1], num_classes, 0.0)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return pool_and_classify(self.blocks(self.stem(x)), self.classifier)


def normal(before: int, after: int, stride: int, kernel: int = 3) -> nn.Module:
    return conv_norm(nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False), nn.ReLU)


def separable(before: int, after: int, stride: int, layers: int = 1) -> nn.Module:
    return SeparableConv2d(
        before, after, 3, stride, 1, bias=False, norm="batch", activation="relu", pointwise_layers=layers
    )


def reduced(before: int, after: int, stride: int, kernel: int = 5) -> nn.Module:
    """A pointwise layer to a quarter of the channels, then the costly convolution."""
    few = max(4, before // 4)
    first = conv_norm(PointwiseConv2d(before, few, bias=False), nn.ReLU)
    return nn.Sequential(first, normal(few, after, stride, kernel))


@dataclass(frozen=True)
class Variant:
    """One network of an experiment.

    Args:
        weights_of: a variant whose number of convolution weights this one is to have; its width is chosen so.
        image_size: side of the images; None for the data's own.
    """

    name: str
    block: Block
    width: float = 1.0
    weights_of: str = ""
    image_size: int | None = None

    @property
    def key(self) -> str:
        """The same for equal networks, whatever they are called in an experiment."""
        whole = self.block if isinstance(self.block, partial) else partial(self.block)
        arguments = "".join(f"-{name}{value}" for name, value in whole.keywords.items())
        width = f"-as-{self.weights_of}" if self.weights_of else f"-{self.width}"
        return f"{whole.func.__name__}{arguments}{width}-{self.image_size or 'full'}".replace(" ", "-")


@dataclass(frozen=True)
class Claim:
    """What is said, and the variants that show whether it holds."""

    key: str
    text: str
    variants: list[Variant] = field(default_factory=list)


WIDTHS = (0.25, 0.5, 0.75, 1.0, 1.5)
SIZES = {"fashion": (12, 16, 20, 24), "cifar10": (12, 16, 20, 26)}


def claims(data: str) -> list[Claim]:
    width = [Variant(f"width {w}", separable, w) for w in WIDTHS]
    resolution = [Variant(f"{s}x{s} pixels", separable, image_size=s) for s in SIZES[data]]
    return [
        Claim(
            "shape",
            "At equal shape a separable network has a fraction of the weights and multiply-adds of a normal one.",
            [Variant("normal", normal), Variant("separable", separable)],
        ),
        Claim(
            "weights",
            "At equal weights a separable network is more accurate: space and channels are better learnt apart.",
            [Variant("normal", normal), Variant("separable, wider", separable, weights_of="normal")],
        ),
        Claim(
            "reduction",
            "A pointwise layer that reduces the channels before a costly layer saves most of its cost.",
            [Variant("5x5", partial(normal, kernel=5)), Variant("pointwise, then 5x5", reduced)],
        ),
        Claim(
            "stack",
            "Several pointwise layers in a row are better than one at equal weights.",
            [
                Variant("1 pointwise layer", separable),
                Variant("2 pointwise layers", partial(separable, layers=2), weights_of="1 pointwise layer"),
                Variant("3 pointwise layers", partial(separable, layers=3), weights_of="1 pointwise layer"),
            ],
        ),
        Claim("width", "Width trades accuracy for multiply-adds smoothly.", width),
        Claim("resolution", "Resolution trades accuracy for multiply-adds smoothly.", resolution),
    ]


@cache
def images(data: str, image_size: int | None) -> Data:
    return load(SOURCE[data], image_size=image_size)


def build(variant: Variant, others: dict[str, Variant], found: Data) -> nn.Module:
    """The network of a variant; where it is to have another's weights, of the width that comes nearest."""

    def of(width: float, block: Block) -> nn.Module:
        return SmallNet(block, width, found.channels, found.num_classes)

    if not variant.weights_of:
        return of(variant.width, variant.block)
    other = others[variant.weights_of]
    with torch.device("meta"), torch.random.fork_rng():
        wanted = conv_weights(of(other.width, other.block))
        widths = [w / 32 for w in range(8, 129)]
        above = bisect_left(widths, wanted, 1, len(widths) - 1, key=lambda w: conv_weights(of(w, variant.block)))
        nearest = min(widths[above - 1 : above + 1], key=lambda w: abs(conv_weights(of(w, variant.block)) - wanted))
    return of(nearest, variant.block)


def conv_weights(model: nn.Module) -> int:
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Conv2d))


def run_variant(data: str, claim: Claim, variant: Variant, seed: int) -> dict[str, Any]:
    """Train one network; its cost, accuracy and times."""
    found = images(data, variant.image_size)
    torch.manual_seed(seed)
    model = build(variant, {v.name: v for v in claim.variants}, found)
    history = train(model, found, replace(RECIPES[data], seed=seed))
    cost = count(model, found.input_shape)
    begin = time.process_time()
    accuracy = evaluate(model, found.test).accuracy
    return {
        "variant": variant.name,
        "seed": seed,
        "accuracy": accuracy,
        "conv_params": cost.conv_params,
        "macs": cost.macs,
        "training_cpu_seconds": round(sum(r["cpu_seconds"] for r in history.records), 2),
        "test_cpu_seconds": round(time.process_time() - begin, 3),
    }


def experiment(data: str, claim: Claim, folder: Path) -> dict[str, Any]:
    """All variants with all seeds; what an interrupted call or another claim has trained is not trained again."""
    rows = [_once(data, claim, variant, seed) for seed in SEEDS for variant in claim.variants]
    return {
        "claim": claim.key,
        "text": claim.text,
        "data": NAMES[data],
        "recipe": asdict(RECIPES[data]),
        "rows": rows,
    }


def _once(data: str, claim: Claim, variant: Variant, seed: int) -> dict[str, Any]:
    path = RUNS / "claims" / f"{data}-{variant.key}-{seed}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        row = run_variant(data, claim, variant, seed)
        with replacing(path) as file:
            file.write(json.dumps(row).encode())
    found: dict[str, Any] = json.loads(path.read_text())
    return {**found, "variant": variant.name}


def steps() -> Iterator[Step]:
    for data in RECIPES:
        for claim in claims(data):
            yield Step(f"claim-{data}-{claim.key}", partial(experiment, data, claim))
