"""Training steps a second of separable networks with the library's kernels and with PyTorch's, in turn in one run."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.evidence import summary
from benchmarks.evidence.runner import Step
from sepconv.layers import SeparableConv2d
from sepconv.models import MobileNetV1, create
from sepconv.train import Recipe

BATCH = 128
ROUNDS = 7
WARM = 2
RECIPE = Recipe(lr=0.01, label_smoothing=0.1)


def student() -> nn.Module:
    """`vgg_quick` with a separable layer of M = 1 for every 3x3 convolution, as a conversion leaves it."""
    model = create("vgg_quick")
    for name, conv in list(model.named_modules()):
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
            parent, _, leaf = name.rpartition(".")
            layer = SeparableConv2d(conv.in_channels, conv.out_channels, 3, 1, 1, depthwise_bias=False)
            setattr(model.get_submodule(parent), leaf, layer)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg_quick, separable": student,
    "mobilenet_v1 0.5, 32x32": lambda: MobileNetV1(0.5, 10, small_images=True),
}


def plain(model: nn.Module) -> nn.Module:
    """The same network with the same weights, its separable layers made of `nn.Conv2d` alone."""
    new = copy.deepcopy(model)
    for name, module in list(new.named_modules()):
        if isinstance(module, SeparableConv2d):
            parent, _, leaf = name.rpartition(".")
            setattr(new.get_submodule(parent), leaf, _plain_separable(module))
    return new


def _plain_conv(layer: Any) -> nn.Conv2d:
    sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    conv = nn.Conv2d(*sizes, groups=layer.groups, bias=layer.bias is not None)
    conv.load_state_dict(layer.state_dict())
    return conv


def _plain_separable(layer: SeparableConv2d) -> nn.Sequential:
    parts: list[nn.Module | None] = []
    for conv, norm, activation in layer.stages:
        parts += [_plain_conv(conv), norm, copy.deepcopy(activation)]
    return nn.Sequential(*(part for part in parts if part is not None))


class Training:
    """One network with its optimizer; calling it takes one step."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        self.model = model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.optimizer = RECIPE.make_optimizer(model)
        self.half = precision == "bf16"

    def __call__(self, images: Tensor, labels: Tensor) -> float:
        """Seconds of the step."""
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=RECIPE.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return time.perf_counter() - begin


def speed(folder: Path) -> dict[str, Any]:
    """Images a second for each network, precision and number of threads."""
    before = torch.get_num_threads()
    rows = []
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for network, make in NETWORKS.items():
            torch.manual_seed(0)
            model = make()
            check_equal(model, plain(model), images[:4])
            trainings = {
                (kernels, precision): Training(build(model), precision)
                for precision in ("no", "bf16")
                for kernels, build in (("sepconv", copy.deepcopy), ("PyTorch", plain))
            }
            times: dict[tuple[str, str], list[float]] = {key: [] for key in trainings}
            for turn in range(WARM + ROUNDS):
                for key, training in trainings.items():
                    seconds = training(images, labels)
                    if turn >= WARM:
                        times[key].append(seconds)
            rows += [
                {
                    "network": network,
                    "kernels": kernels,
                    "mixed_precision": precision,
                    "threads": threads,
                    "images_per_second": round(BATCH / statistics.median(values), 1),
                    "step_ms": [round(1000 * value, 2) for value in sorted(values)],
                }
                for (kernels, precision), values in times.items()
            ]
    torch.set_num_threads(before)
    return {"batch": BATCH, "layout": "channels_last", "rows": rows}


@torch.no_grad()
def check_equal(model: nn.Module, other: nn.Module, images: Tensor) -> None:
    """Both compute the same, or no time is worth anything."""
    wanted, found = (m.eval()(images) for m in (model, other))
    if not torch.allclose(wanted, found, rtol=1e-3, atol=1e-5):
        raise RuntimeError(f"speed: the networks differ by {float((wanted - found).abs().max()):.3g}")


def table(record: dict[str, Any]) -> str:
    """Images a second with both kinds of kernels, a line for each network, precision and number of threads."""
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in record["rows"]:
        key = row["network"], row["mixed_precision"], row["threads"]
        found.setdefault(key, {})[row["kernels"]] = row["images_per_second"]
    rows = [
        [network, precision, str(threads), f"{ours:.0f}", f"{theirs:.0f}", f"**{ours / theirs:.2f}**"]
        for (network, precision, threads), speeds in found.items()
        for ours, theirs in [(speeds["sepconv"], speeds["PyTorch"])]
    ]
    header = ["network", "mixed precision", "threads", "sepconv, images/s", "PyTorch, images/s", "sepconv / PyTorch"]
    machine = record["machine"]
    return summary.table(header, rows) + f"\nOn {machine['cpu']} with {machine['features']}.\n"


def steps() -> list[Step]:
    return [Step("training-speed", speed)]
