"""`python -m benchmarks.quantization NAME=FOLDER ... --data DATA`: what 8-bit integers cost, and what each step is for.

FOLDER is what `sepconv train` or `sepconv convert` wrote. Each network is quantized as it is, without single steps,
without all of them, and with every output of its depthwise filters times a random power of two from 1/64 to 64, which
the norm behind divides by; then it is fine-tuned. Calibration sees training images without labels, test images give the
numbers. Every number is in the record as soon as it is measured: what was cut off goes on where it was, and rows of
networks that are not asked for stay.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from benchmarks.record import path, read, save, stamped
from sepconv.data import Data, load
from sepconv.quantize import quantize
from sepconv.quantize.saving import packed
from sepconv.runs.model_file import open_model
from sepconv.runs.preprocessing import preprocessing_of
from sepconv.train import Recipe, evaluate, train

NAME = "quantization"
VARIANTS: dict[str, dict[str, Any]] = {
    "int8": {},
    "without equalisation": {"equalize": False},
    "without bias correction": {"bias_correction": False},
    "ranges from least to largest": {"ranges": "minmax"},
    "rounding to nearest": {"rounding": "nearest"},
    "none of these": {"equalize": False, "bias_correction": False, "ranges": "minmax", "rounding": "nearest"},
}
RESCALED, TUNED = "channels rescaled", "fine-tuned"


def _norms_of_depthwise(model: nn.Module) -> Iterator[tuple[_ConvNd, _BatchNorm]]:
    """Depthwise convolutions with the norms behind them, in separable layers and in sequences."""
    for module in model.modules():
        if isinstance(norm := getattr(module, "depthwise_norm", None), _BatchNorm):
            yield module.depthwise, norm  # type: ignore[misc]
        elif isinstance(module, nn.Sequential):
            for conv, norm in zip(module, list(module)[1:], strict=False):
                if isinstance(conv, _ConvNd) and conv.groups == conv.in_channels > 1 and isinstance(norm, _BatchNorm):
                    yield conv, norm


@torch.no_grad()
def rescaled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same function in float32, to the bit; channels of depthwise filters differ by up to 4096."""
    model, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for conv, norm in _norms_of_depthwise(model):
        factor = torch.exp2(torch.randint(-6, 7, (conv.out_channels,), generator=draw).float())
        conv.weight *= factor.view(-1, *[1] * (conv.weight.dim() - 1))
        if conv.bias is not None:
            conv.bias *= factor
        assert norm.running_mean is not None
        norm.running_mean *= factor
        norm.weight /= factor
    return model


def _bytes(state: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def measure(folder: str, data: Data, options: argparse.Namespace, row: dict[str, Any]) -> Iterator[str]:
    """One network's numbers into its row, those that it lacks; the name of each as it comes."""
    model = open_model(folder)[0]
    images = data.calibration(min(options.images, len(data.train)))
    accuracy = row["accuracy"]
    if "float32" not in accuracy:
        accuracy["float32"] = evaluate(model, data.test).accuracy
        yield "float32"
    for variant, arguments in [*VARIANTS.items(), (RESCALED, {})]:
        if variant in accuracy or (options.only and variant not in options.only):
            continue
        started = time.process_time()
        quantized, plan = quantize(rescaled(model) if variant == RESCALED else model, images, force=True, **arguments)
        seconds = time.process_time() - started
        row["plans"][variant] = {
            "error": plan.error,
            "agreement": plan.agreement,
            "left": plan.left,
            "cpu_seconds": round(seconds, 1),
        }
        row["bytes_share"] = round(_bytes(packed(quantized)) / _bytes(model.state_dict()), 4)
        accuracy[variant] = evaluate(quantized, data.test).accuracy
        yield variant
    if options.epochs and TUNED not in accuracy:
        accuracy[TUNED] = _tuned(model, quantize(model, images, force=True)[0], data, options)
        row["epochs"] = options.epochs
        yield TUNED


def _tuned(model: nn.Module, quantized: nn.Module, data: Data, options: argparse.Namespace) -> float:
    recipe = Recipe(epochs=options.epochs, batch_size=128, lr=options.lr, flip=True, crop_padding=options.crop_padding)
    train(quantized, data, recipe, teacher=model)
    return evaluate(quantized, data.test).accuracy


def _begun(name: str, folder: str, data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a network: what a run that was cut off has measured of the same weights, or nothing yet."""
    card = open_model(folder)[1]
    asked = {
        "network": name,
        "model": card.model,
        "settings": card.settings,
        "converted": bool(card.changes),
        "weights": hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()[:16],
        "data": data.name,
        "images": min(options.images, len(data.train)),
        "test_images": len(data.test),
    }
    for row in [] if options.again else _rows():
        if all(row.get(key) == value for key, value in asked.items()):
            return row
    return {**asked, "bytes_share": None, "accuracy": {}, "plans": {}}


def _rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read(NAME)["rows"] if path(NAME).exists() else []
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Points below float32, a column a network; one that was cut off before its first integers has none."""
    rows = [row for row in rows if "int8" in row["accuracy"]]
    lines = [
        "| | " + " | ".join(row["network"] for row in rows) + " |",
        "| --- |" + " ---: |" * len(rows),
        "| float32, accuracy | " + " | ".join(f"{row['accuracy']['float32']:.2%}" for row in rows) + " |",
    ]
    for variant in (*VARIANTS, RESCALED, TUNED):
        cells = [
            f"{100 * (row['accuracy'][variant] - row['accuracy']['float32']):+.2f}"
            if variant in row["accuracy"]
            else ""
            for row in rows
        ]
        lines.append(f"| {variant}, points | " + " | ".join(cells) + " |")
    lines.append("| bytes of weights, share of float32 | " + " | ".join(f"{r['bytes_share']:.3f}" for r in rows) + " |")
    left = " | ".join(str(len(row["plans"]["int8"]["left"])) for row in rows)
    return "\n".join([*lines, f"| layers left in float32 | {left} |"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--crop-padding", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", action="append", choices=[*VARIANTS, RESCALED], help="the rest is for another run")
    parser.add_argument("--again", action="store_true", help="measure anew what the record has")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for word in options.networks:
        name, _, folder = word.partition("=")
        data = load(options.data, preprocessing=preprocessing_of(folder))
        row = _begun(name, folder, data, options)
        for variant in measure(folder, data, options, row):
            others = [one for one in _rows() if one["network"] != name]
            save(NAME, stamped(rows=[*others, row]))
            print(f"{name}, {variant}: {row['accuracy'][variant]:.2%}", flush=True)


if __name__ == "__main__":
    main()
