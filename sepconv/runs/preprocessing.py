"""How the images of a network that was trained elsewhere are prepared: what its card or its library says of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sepconv.data import Crop, Preprocessing
from sepconv.models.registry import library_of
from sepconv.runs.model_file import card_of
from sepconv.runs.timm_folder import timm_folder

BESIDE_WEIGHTS = ("preprocessor_config.json", "config.json")
"""Files of Hugging Face: transformers' image processor, and timm's description."""
_PILLOW_FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic"}
_LARGEST_FILE = 1 << 20


def preprocessing_of(name: str, weights: Path | None = None) -> Preprocessing | None:
    """What the network of this name wants of images, where anybody says it.

    Asked in this order: the card in our own file; ``preprocessor_config.json`` of transformers, then timm's
    ``config.json``, in the folder of the weights; timm's and torchvision's descriptions of the model.

    Args:
        name, weights: as for ``model_file.open_model``.

    Raises:
        ValueError: a description holds what no image can be prepared by; the message names its file or model.
    """
    if (folder := timm_folder(name)) is not None:
        name, weights = folder.model, folder.weights
    card = card_of(name, weights)
    if card is not None and card.preprocessing is not None:
        return card.preprocessing
    if weights is not None and (found := _beside(weights)) is not None:
        return found
    if name.startswith("timm/"):
        return _of_timm(name)
    return _of_torchvision(name) if name.startswith("torchvision/") else None


def _beside(weights: Path) -> Preprocessing | None:
    for file in (weights.parent / name for name in BESIDE_WEIGHTS):
        if not file.is_file() or file.stat().st_size > _LARGEST_FILE:
            continue
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            entries = found if isinstance(found, dict) else {}
            if "image_mean" in entries:
                return _of_transformers(entries, str(file))
            if isinstance(entries.get("pretrained_cfg"), dict):
                return _from_timm(entries["pretrained_cfg"], str(file))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"preprocessing_of: {file} does not say how images are prepared: {error}") from error
    return None


def _of_timm(name: str) -> Preprocessing | None:
    config = library_of(name).models.get_pretrained_cfg(name.removeprefix("timm/"), allow_unregistered=True)
    return None if config is None else _from_timm(config.to_dict(), name)


def _from_timm(config: Mapping[str, Any], source: str) -> Preprocessing:
    size = int(config["input_size"][-1])
    resize = math.floor(size / float(config.get("crop_pct") or 0.875))
    squash = config.get("crop_mode") == "squash"
    fit = Crop(size, resize, config.get("interpolation", "bilinear"), squash)
    return Preprocessing(fit, _numbers(config["mean"]), _numbers(config["std"]), source=source)


def _of_torchvision(name: str) -> Preprocessing | None:
    try:
        weights = library_of(name).models.get_model_weights(name.removeprefix("torchvision/"))
    except ValueError:
        return None
    preset = next(iter(weights)).transforms() if not hasattr(weights, "DEFAULT") else weights.DEFAULT.transforms()
    if not hasattr(preset, "crop_size"):
        return None  # detection and segmentation take images of any size
    fit = Crop(preset.crop_size[0], preset.resize_size[0], preset.interpolation.value)
    return Preprocessing(fit, _numbers(preset.mean), _numbers(preset.std), source=name)


def _of_transformers(config: Mapping[str, Any], source: str) -> Preprocessing:
    """Of an image processor: resize, centre crop, factor, mean and deviation, as far as each is switched on."""
    factor = 255 * float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 255.0
    mean, std = _numbers(config["image_mean"]), _numbers(config["image_std"])
    if not config.get("do_normalize", True):
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    mean, std = (tuple(number / factor for number in numbers) for numbers in (mean, std))
    filter_ = config.get("resample", 2)
    if filter_ not in _PILLOW_FILTERS:
        raise ValueError(f"resample is {filter_!r}, known are {_PILLOW_FILTERS}")
    if not config.get("do_resize", True):
        return Preprocessing(None, mean, std, source=source)
    resize, squash = _side(config["size"])
    if "crop_pct" in config:  # ConvNeXt's: cropped below 384 pixels, both sides brought to it from there on
        return Preprocessing(_cropped_below(resize, float(config["crop_pct"]), filter_), mean, std, source=source)
    crop = _side(config["crop_size"])[0] if config.get("do_center_crop") else resize
    return Preprocessing(Crop(crop, resize, _PILLOW_FILTERS[filter_], squash), mean, std, source=source)


def _cropped_below(side: int, share: float, filter_: int) -> Crop:
    squash = side >= 384
    return Crop(side, side if squash else int(side / share), _PILLOW_FILTERS[filter_], squash)


def _side(size: Any) -> tuple[int, bool]:
    """Pixels, and whether both sides are brought to them."""
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return int(size["shortest_edge"]), False
    if isinstance(size, Mapping):
        if size["height"] != size["width"]:
            raise ValueError(f"images of {size['width']}x{size['height']} pixels are not square")
        return int(size["height"]), True
    return int(size), False


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
