"""Options that several commands share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from sepconv.compile.precision import checked_precision
from sepconv.models.registry import BUILT_IN
from sepconv.system.threads import MOST as MOST_THREADS
from sepconv.train.recipe import MOST_EPOCHS

LARGEST_SEED = 2**63 - 1
LARGEST_SIDE = 8192
LARGEST_BATCH = 4096


def filled(text: str) -> str:
    """An empty word is a mistake, such as a variable that a script did not set; nobody means the current folder."""
    if not text:
        raise typer.BadParameter("it must not be empty")
    return text


def path(text: str | Path) -> Path:
    return Path(filled(str(text) if isinstance(text, Path) else text))


def finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"it must be a finite number, but is {value}")
    return value


def precision(text: str) -> str:
    try:
        return checked_precision(text, "--precision")
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("--precision: ")) from error


def _models(begun: str) -> list[str]:
    """What the shell offers for MODEL; folders it knows itself."""
    return [name for name in BUILT_IN if name.startswith(begun)]


Model = Annotated[
    str,
    typer.Argument(
        parser=filled,
        metavar="MODEL",
        help="A built-in name, timm/NAME, torchvision/NAME, package.module:function, a folder of train, convert, timm.",
        show_default=False,
        autocompletion=_models,
    ),
]
ComputedIn = Annotated[
    str | None,
    typer.Option(
        "--precision",
        parser=precision,
        metavar="P",
        help="float32 or bfloat16: what a compiled network computes in.",
        show_default=False,
    ),
]
Target = Annotated[
    str,
    typer.Option(
        "--target",
        metavar="T",
        help="Of a C library: x86-64-linux, x86-64-linux-avx2, -avx512, arm-64-linux, -android, -osx, wasm-32.",
    ),
]
DevicePrecision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="P",
        help="Of a C library: float32, or int8 of a network that was quantized.",
        show_default=False,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the model; may be repeated.", show_default=False),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        parser=path,
        metavar="FILE",
        help="A safetensors file, or a state_dict in .pt or .pth.",
        show_default=False,
    ),
]
InputShape = Annotated[
    str | None,
    typer.Option(
        "--input",
        metavar="CxHxW",
        help="One input without the batch, where the weights do not say it.",
        show_default=False,
    ),
]
DataSource = Annotated[
    str,
    typer.Option(
        "--data",
        parser=filled,
        metavar="D",
        help="digits, a folder (of classes, loose images, .npy or .safetensors), *.parquet, IDX, a Hugging Face name.",
        show_default=False,
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        "--image-size", min=1, max=LARGEST_SIDE, help="Resize and crop images to this side.", show_default=False
    ),
]
CropShare = Annotated[
    float | None,
    typer.Option(
        "--crop",
        metavar="SHARE",
        callback=finite,
        help="Share of the resized short side that is cropped, such as 0.875.",
        show_default=False,
    ),
]
Interpolation = Annotated[
    str | None,
    typer.Option("--interpolation", help="Of resized images: nearest, bilinear or bicubic.", show_default=False),
]
Mean = Annotated[
    str | None,
    typer.Option(
        "--mean",
        metavar="R,G,B",
        help="Brightness from 0 to 1 that is subtracted, such as 0.485,0.456,0.406.",
        show_default=False,
    ),
]
Std = Annotated[
    str | None,
    typer.Option(
        "--std", metavar="R,G,B", help="What is then divided by, such as 0.229,0.224,0.225.", show_default=False
    ),
]
Bgr = Annotated[bool, typer.Option("--bgr", help="The network's channels are blue, green, red; so are --mean, --std.")]
Classes = Annotated[
    Path | None,
    typer.Option(
        "--classes",
        parser=path,
        metavar="FILE",
        help="Names of the network's outputs, one a line: the data's classes are found by name.",
        show_default=False,
    ),
]
SkipBroken = Annotated[bool, typer.Option("--skip-broken", help="Leave broken images out and count them.")]
Out = Annotated[Path, typer.Option("--out", parser=path, metavar="DIR", help="Folder for the results.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on after the last checkpoint of an interrupted run.")]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, max=MOST_THREADS, help="Threads to use; PyTorch's choice if left out.", show_default=False
    ),
]
Batch = Annotated[
    int, typer.Option("--batch", min=1, max=LARGEST_BATCH, help="Images in a call when time is measured.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Of everything random.")]
Epochs = Annotated[int, typer.Option("--epochs", min=0, max=MOST_EPOCHS, help="Passes over the training images.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images in a training step.")]
LearningRate = Annotated[float, typer.Option("--lr", callback=finite, help="Highest learning rate.")]
Optimizer = Annotated[str, typer.Option("--optimizer", help="sgd, adamw or rmsprop.")]
Schedule = Annotated[str, typer.Option("--schedule", help="one_cycle, cosine or constant.")]
WeightDecay = Annotated[
    float, typer.Option("--weight-decay", callback=finite, help="Not applied to depthwise filters, biases, norms.")
]
LabelSmoothing = Annotated[
    float, typer.Option("--label-smoothing", callback=finite, help="Share of a target spread over all classes.")
]
Flip = Annotated[bool, typer.Option("--flip", help="Mirror images at random; wrong for digits and letters.")]
Crop = Annotated[int, typer.Option("--crop-padding", min=0, help="Shift images at random by up to so many pixels.")]
Cutout = Annotated[int, typer.Option("--cutout", min=0, help="Black out a random square of so many pixels a side.")]
Mixup = Annotated[
    float,
    typer.Option(
        "--mixup", callback=finite, metavar="ALPHA", help="Mix images in pairs, in shares of Beta(ALPHA, ALPHA)."
    ),
]
Cutmix = Annotated[
    float,
    typer.Option(
        "--cutmix", callback=finite, metavar="ALPHA", help="Put part of another image in, shares of Beta(ALPHA, ALPHA)."
    ),
]
Precision = Annotated[str, typer.Option("--mixed-precision", help="no, bf16 or fp16.")]
Kernels = Annotated[
    str, typer.Option("--kernels", help="sepconv, or torch: train without our layers in the place of PyTorch's.")
]
Average = Annotated[
    float,
    typer.Option(
        "--average", callback=finite, metavar="DECAY", help="Keep a running average of the weights; 0.99 is usual."
    ),
]
Whiten = Annotated[bool, typer.Option("--whiten", help="Start the first layer from the images' principal patterns.")]
Live = Annotated[
    bool, typer.Option("--live/--no-live", help="A page that runs the networks in the browser, as WebAssembly.")
]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json", parser=path, metavar="FILE", help="Write the result as JSON; - is the output.", show_default=False
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
