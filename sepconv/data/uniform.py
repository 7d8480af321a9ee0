"""One size and channel count for all images of a data set; broken ones found, small sets kept in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sepconv.data.images import GREY_MODES, BrokenImage, EncodedImages, TensorImages, decode, in_threads
from sepconv.data.parts import Part
from sepconv.data.preprocessing import Crop, Preprocessing

MEMORY_LIMIT = 2**30  # bytes of decoded images; larger data sets are decoded batch by batch


@dataclass(frozen=True)
class Look:
    """What is known of an image after opening it; `pixels` (3, H, W) only where the set is kept in memory."""

    grey: bool
    size: tuple[int, int]
    pixels: Tensor | None = None


def uniform(
    parts: Sequence[Part], wanted: Preprocessing, skip_broken: bool, name: str
) -> tuple[list[Part], tuple[str, ...]]:
    """The splits with square images of one size and one channel count, and the names of the images left out.

    Where it is not `wanted` otherwise, grey is kept if every image is grey; else all become RGB.

    Raises:
        ValueError: no images, images of several sizes or not square without `wanted.fit`.
        BrokenImage: an image cannot be decoded and `skip_broken` is off.
    """
    if not all(len(part.images) for part in parts):
        raise ValueError(f"load: no images in {name}")
    encoded = [part.images for part in parts if isinstance(part.images, EncodedImages)]
    if not encoded:
        return [_fit_tensor(part, wanted, name) for part in parts], ()
    fit = wanted.fit
    small = _fits_memory(encoded, fit)
    looks = [in_threads(partial(_look, images, fit, small, skip_broken), range(len(images))) for images in encoded]
    readable = [look for split in looks for look in split if isinstance(look, Look)]
    broken = [look for split in looks for look in split if isinstance(look, BrokenImage)]
    if broken and not skip_broken:
        raise BrokenImage(broken[0].name, f"{broken[0].reason}; skip_broken leaves such images out")
    side = _common_side(Counter(look.size for look in readable), fit, name)
    channels = wanted.channels or (1 if all(look.grey for look in readable) else 3)
    done = [_keep(part, split, channels, side, fit) for part, split in zip(parts, looks, strict=True)]
    return done, tuple(error.name for error in broken)


def _fits_memory(encoded: list[EncodedImages], fit: Crop | None) -> bool:
    """Judged by the first readable image unless a size is asked for: images of other sizes are refused anyway."""
    width, height = (fit.size, fit.size) if fit else next(_opened_sizes(encoded), (1, 1))
    return 3 * height * width * sum(map(len, encoded)) <= MEMORY_LIMIT


def _opened_sizes(encoded: list[EncodedImages]) -> Iterator[tuple[int, int]]:
    for images in encoded:
        for index in range(len(images)):
            with suppress(BrokenImage):
                yield images.open(index).size


def _look(images: EncodedImages, fit: Crop | None, small: bool, skip_broken: bool, index: int) -> Look | BrokenImage:
    name = images.names[index]
    try:
        image = images.open(index)
        grey, (width, height) = image.mode in GREY_MODES, image.size
        if not small and not skip_broken:
            return Look(grey, (height, width))
        pixels = decode(image, name, 3, fit)
        return Look(grey, (pixels.shape[1], pixels.shape[2]), pixels if small else None)
    except BrokenImage as error:
        return error


def _common_side(sizes: Counter[tuple[int, int]], fit: Crop | None, name: str) -> int:
    if fit is not None:
        return fit.size
    if not sizes:
        raise ValueError(f"load: no image in {name} can be decoded")
    (height, width), _ = sizes.most_common(1)[0]
    if len(sizes) > 1 or height != width:
        what = f"images of {len(sizes)} sizes, most" if len(sizes) > 1 else "images of"
        raise ValueError(f"load: {name} has {what} {width}x{height} pixels: image_size makes them squares of one size")
    return height


def _keep(part: Part, looks: Sequence[Look | BrokenImage], channels: int, side: int, fit: Crop | None) -> Part:
    keep = [i for i, look in enumerate(looks) if isinstance(look, Look)]
    pixels = [
        _of_channels(look.pixels, channels) for look in looks if isinstance(look, Look) and look.pixels is not None
    ]
    indices = torch.tensor(keep, dtype=torch.int64)
    if pixels:
        return Part(TensorImages(torch.stack(pixels)), part.labels[indices])
    assert isinstance(part.images, EncodedImages)
    images = replace(part.images, channels=channels, side=side, fit=fit)
    return Part(images, part.labels).subset(indices)


def _fit_tensor(part: Part, wanted: Preprocessing, name: str) -> Part:
    assert isinstance(part.images, TensorImages)
    tensor, fit = part.images.tensor, wanted.fit
    height, width = tensor.shape[-2:]
    _common_side(Counter({(height, width): len(tensor)}), fit, name)
    chunks = [_of_channels(chunk, wanted.channels or chunk.shape[1]) for chunk in tensor.split(1000)]
    return Part(TensorImages(torch.cat(chunks if fit is None else [fit(chunk) for chunk in chunks])), part.labels)


def _of_channels(pixels: Tensor, channels: int) -> Tensor:
    """Grey pixels three times, or the brightness of coloured ones as Pillow has it (ITU-R 601); (..., C, H, W)."""
    if pixels.shape[-3] == channels:
        return pixels
    if channels == 3:
        return pixels.expand(*pixels.shape[:-3], 3, *pixels.shape[-2:])
    red, green, blue = pixels.int().unbind(-3)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8).unsqueeze(-3)
