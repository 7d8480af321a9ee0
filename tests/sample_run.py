"""Folders as a run leaves them, made from real networks: what the tests of the report and of its page look at."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv import SeparableConv2d
from sepconv.models.mobilenet_v1 import MobileNetV1Normal
from sepconv.models.vgg import VGGSmall
from sepconv.runs import layer_data, png

PRECISIONS = [
    {"network": "normal", "precision": "float32", "ms": 4.0, "bytes": 38000, "accuracy": 0.9, "reason": ""},
    {
        "network": "separable",
        "precision": "bfloat16",
        "ms": 1.0,
        "bytes": 3000,
        "accuracy": 0.87,
        "reason": "a why",
    },
    {"network": "separable", "precision": "int8", "ms": None, "bytes": None, "reason": "moves too far"},
]


def separate(conv: nn.Conv2d, rank: int) -> SeparableConv2d:
    """The best separable layer of that rank: per input channel, the strongest directions of its (O, k*k) slice."""
    slices = conv.weight.detach().flatten(2).transpose(0, 1)
    filters = torch.linalg.eigh(slices.mT @ slices).eigenvectors[..., -rank:].mT
    layer = SeparableConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        bias=conv.bias is not None,
        depthwise_bias=False,
        depth_multiplier=rank,
    )
    with torch.no_grad():
        layer.depthwise.weight.copy_(filters.reshape(-1, 1, *conv.kernel_size))
        columns = torch.einsum("cok,cmk->ocm", slices, filters).flatten(1)
        layer.pointwise.weight.copy_(columns[:, :, None, None])
        if conv.bias is not None:
            layer.pointwise.bias.copy_(conv.bias)
    return layer.train(conv.training)


def separated(model: nn.Module, rank: int, keep: tuple[str, ...] = ()) -> nn.Module:
    """A copy of the model with its convolutions of more than one pixel made separable."""
    model = copy.deepcopy(model)
    for name, conv in list(model.named_modules()):
        if isinstance(conv, nn.Conv2d) and conv.kernel_size != (1, 1) and name not in keep:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, separate(conv, rank))
    return model.eval()


def normal_layers(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def layer_rows(normal: nn.Module, separable: nn.Module, pixels: dict[str, int], rank: int) -> list[dict[str, Any]]:
    rows = []
    for name, conv in normal_layers(normal).items():
        layer = separable.get_submodule(name)
        converted = isinstance(layer, SeparableConv2d)
        before = conv.weight.numel()
        moved = (conv.in_channels + conv.out_channels) * pixels[name]
        after = layer.depthwise.weight.numel() + layer.pointwise.weight.numel() if converted else before
        rows.append(
            {
                "name": name,
                "kind": "separable" if converted else "normal",
                "kernel": list(conv.kernel_size),
                "in_channels": conv.in_channels,
                "out_channels": conv.out_channels,
                "rank": rank if converted else None,
                "error_closed_form": relative_error(conv, layer) if converted else None,
                "error": 0.3 * relative_error(conv, layer) if converted else None,
                "params": [before, after],
                "macs": [before * pixels[name], after * pixels[name]],
                "bytes": [4 * before + 4 * moved, 4 * after + 4 * moved],
                "ms": [before * pixels[name] / 3e7 + 1e-3, after * pixels[name] / 2e7 + 1e-3],
                "reason": "" if converted else "the first layer has too few channels for conversion to pay",
            }
        )
    return rows


def relative_error(conv: nn.Conv2d, layer: SeparableConv2d) -> float:
    c, rank = conv.in_channels, layer.depthwise.depth_multiplier
    columns = layer.pointwise.weight.flatten(1).view(-1, c, rank)
    composed = torch.einsum("ocm,cmk->ock", columns, layer.depthwise.weight.view(c, rank, -1))
    return ((composed - conv.weight.flatten(2)).norm() / conv.weight.norm()).item()


def output_pixels(model: nn.Module, x: Tensor) -> dict[str, int]:
    found: dict[nn.Module, int] = {}

    def note(conv: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        found[conv] = y[0, 0].numel()

    convs = normal_layers(model)
    handles = [conv.register_forward_hook(note) for conv in convs.values()]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return {name: found[conv] for name, conv in convs.items()}


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> list[dict[str, Any]]:
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    rows = []
    for epoch in range(1, epochs + 1):
        model.train()
        losses, hits = [], 0
        for chosen in torch.randperm(len(x)).split(64):
            logits = model(x[chosen])
            loss = F.cross_entropy(logits, y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            hits += int((logits.argmax(1) == y[chosen]).sum())
        rows.append(
            {"epoch": epoch, "train_loss": sum(losses) / len(losses), "train_accuracy": hits / len(x), "lr": 3e-3}
        )
    return rows


def summary(rows: list[dict[str, Any]], side: int, model: nn.Module, accuracy: float, time_ms: float) -> dict[str, Any]:
    return {
        "conv_params": sum(row["params"][side] for row in rows),
        "params": sum(p.numel() for p in model.parameters()),
        "macs": sum(row["macs"][side] for row in rows),
        "accuracy": accuracy,
        "latency_ms": {"torch": time_ms, "sepconv": 0.7 * time_ms},
        "threads": 2,
        "kernels": {"separable_conv": "halide"},
    }


def confusion(labels: Tensor, answers: Tensor, classes: int) -> list[list[int]]:
    return torch.bincount(labels * classes + answers, minlength=classes**2).view(classes, classes).tolist()


def write_digits_run(folder: Path, epochs: int = 2) -> tuple[nn.Module, nn.Module, Tensor]:
    """A small network trained on the digits and its separable form; returns both and the explained image."""
    started = time.perf_counter()
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    x, y, test_x, test_y = x[:1400], y[:1400], x[1400:], y[1400:]
    model = VGGSmall(0.5, in_channels=1)
    rows = train(model, x, y, epochs)
    first = "stages.0.0.0"
    converted = separated(model.eval(), rank=2, keep=(first,))
    train(converted, x, y, 1)
    with torch.no_grad():
        before, after = (network.eval()(test_x).argmax(1) for network in (model, converted))
    accuracies = [float((answers == test_y).float().mean()) for answers in (before, after)]
    for row in rows:
        row["test_accuracy"] = accuracies[0] * row["train_accuracy"]
    layers = layer_rows(model, converted, output_pixels(model, test_x[:1]), 2)
    different = (before != after).nonzero().flatten().tolist()
    result = {
        "model": "vgg_small",
        "data": "digits",
        "command": "sepconv demo --out demo",
        "seconds": time.perf_counter() - started,
        "normal": summary(layers, 0, model, accuracies[0], 1.31),
        "separable": summary(layers, 1, converted, accuracies[1], 0.64),
        "stages": [
            {"name": "original", "accuracy": accuracies[0], "seconds": 5.2},
            {"name": "closed form", "accuracy": accuracies[1] * 0.81, "seconds": 0.1},
            {"name": "calibrated", "accuracy": accuracies[1] * 0.95, "seconds": 1.4},
            {"name": "distilled", "accuracy": accuracies[1], "seconds": 21.0},
        ],
        "layers": layers,
        "other_ms": [0.21, 0.19],
        "curves": [{**row, "phase": "training"} for row in rows]
        + [
            {"epoch": e, "train_loss": 0.3 / e, "test_accuracy": accuracies[1] * (1 - 0.1 / e), "phase": "distillation"}
            for e in range(1, 6)
        ],
        "classes": [str(i) for i in range(10)],
        "confusion": {"normal": confusion(test_y, before, 10), "separable": confusion(test_y, after, 10)},
        "test_images": len(test_x),
        "disagreement_count": len(different),
        "disagreements": [
            {
                "image": png.data_uri(test_x[i]),
                "name": f"test image {i}",
                "label": int(test_y[i]),
                "normal": int(before[i]),
                "separable": int(after[i]),
            }
            for i in different[:12]
        ],
        "machine": {"cpu": "a processor", "cores": 2, "fma_peak_gflops": {"2": 205.0}, "memory_gb_per_s": {"2": 20.0}},
        "versions": {"python": "3.12", "torch": torch.__version__},
    }
    image = test_x[3]
    write(folder, result, layer_data.collect(model, converted, image, label=str(int(test_y[3]))))
    return model, converted, image


def write_mobilenet_run(folder: Path) -> tuple[nn.Module, nn.Module, Tensor]:
    """MobileNet's normal twin at full size with untrained weights, its separable form, and 1,000 classes."""
    torch.manual_seed(0)
    model = MobileNetV1Normal().eval()
    converted = separated(model, rank=1, keep=("stem.0",))
    rows, columns = torch.meshgrid(torch.linspace(-2, 2, 224), torch.linspace(-2, 2, 224), indexing="ij")
    image = torch.stack([torch.sin(3 * rows * columns), torch.cos(2 * rows), torch.sin(rows + 4 * columns)])
    layers = layer_rows(model, converted, output_pixels(model, image[None]), 1)
    confused = (torch.eye(1000, dtype=torch.long) * 40).tolist()
    confused[281][282] = 7
    result = {
        "model": "mobilenet_v1_normal",
        "data": "photographs",
        "normal": summary(layers, 0, model, 0.717, 120.0),
        "separable": summary(layers, 1, converted, 0.706, 20.0),
        "layers": layers,
        "classes": [f"class {i}" for i in range(1000)],
        "confusion": {"normal": confused, "separable": confused},
        "versions": {"torch": torch.__version__},
    }
    write(folder, result, layer_data.collect(model, converted, image))
    return model, converted, image


def write(folder: Path, result: dict[str, Any], explained: dict[str, Any] | None = None) -> None:
    (folder / "result.json").write_text(json.dumps(result))
    if explained is not None:
        (folder / "explanation.json").write_text(json.dumps(explained))
