"""One size and channel count for all images of a data set; broken ones found, small sets kept in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sepconv.data.images import GREY_MODES, BrokenImage, EncodedImages, TensorImages, decode, fit, in_threads
from sepconv.data.parts import Part

MEMORY_LIMIT = 2**30  # bytes of decoded images; larger data sets are decoded batch by batch


@dataclass(frozen=True)
class Look:
    """What is known of an image after opening it; `pixels` (3, H, W) only where the set is kept in memory."""

    grey: bool
    size: tuple[int, int]
    pixels: Tensor | None = None


def uniform(
    parts: Sequence[Part], size: int | None, skip_broken: bool, name: str
) -> tuple[list[Part], tuple[str, ...]]:
    """The splits with square images of one size and one channel count, and the names of the images left out.

    Grey is kept where every image is grey; otherwise all become RGB.

    Raises:
        ValueError: no images, images of several sizes or not square without `size`.
        BrokenImage: an image cannot be decoded and `skip_broken` is off.
    """
    if not all(len(part.images) for part in parts):
        raise ValueError(f"load: no images in {name}")
    encoded = [part.images for part in parts if isinstance(part.images, EncodedImages)]
    if not encoded:
        return [_fit_tensor(part, size, name) for part in parts], ()
    small = _fits_memory(encoded, size)
    looks = [in_threads(partial(_look, images, size, small, skip_broken), range(len(images))) for images in encoded]
    readable = [look for split in looks for look in split if isinstance(look, Look)]
    broken = [look for split in looks for look in split if isinstance(look, BrokenImage)]
    if broken and not skip_broken:
        raise BrokenImage(broken[0].name, f"{broken[0].reason}; skip_broken leaves such images out")
    side = _common_side(Counter(look.size for look in readable), size, name)
    channels = 1 if all(look.grey for look in readable) else 3
    resize = size is not None
    done = [_keep(part, split, channels, side, resize) for part, split in zip(parts, looks, strict=True)]
    return done, tuple(error.name for error in broken)


def _fits_memory(encoded: list[EncodedImages], size: int | None) -> bool:
    """Judged by the first readable image unless a size is asked for: images of other sizes are refused anyway."""
    width, height = (size, size) if size else next(_opened_sizes(encoded), (1, 1))
    return 3 * height * width * sum(map(len, encoded)) <= MEMORY_LIMIT


def _opened_sizes(encoded: list[EncodedImages]) -> Iterator[tuple[int, int]]:
    for images in encoded:
        for index in range(len(images)):
            with suppress(BrokenImage):
                yield images.open(index).size


def _look(images: EncodedImages, size: int | None, small: bool, skip_broken: bool, index: int) -> Look | BrokenImage:
    name = images.names[index]
    try:
        image = images.open(index)
        grey, (width, height) = image.mode in GREY_MODES, image.size
        if not small and not skip_broken:
            return Look(grey, (height, width))
        pixels = decode(image, name, 3, size)
        return Look(grey, (pixels.shape[1], pixels.shape[2]), pixels if small else None)
    except BrokenImage as error:
        return error


def _common_side(sizes: Counter[tuple[int, int]], size: int | None, name: str) -> int:
    if size is not None:
        return size
    if not sizes:
        raise ValueError(f"load: no image in {name} can be decoded")
    (height, width), _ = sizes.most_common(1)[0]
    if len(sizes) > 1 or height != width:
        what = f"images of {len(sizes)} sizes, most" if len(sizes) > 1 else "images of"
        raise ValueError(f"load: {name} has {what} {width}x{height} pixels: image_size makes them squares of one size")
    return height


def _keep(part: Part, looks: Sequence[Look | BrokenImage], channels: int, side: int, resize: bool) -> Part:
    keep = [i for i, look in enumerate(looks) if isinstance(look, Look)]
    pixels = [look.pixels[:channels] for look in looks if isinstance(look, Look) and look.pixels is not None]
    indices = torch.tensor(keep, dtype=torch.int64)
    if pixels:
        return Part(TensorImages(torch.stack(pixels)), part.labels[indices])
    assert isinstance(part.images, EncodedImages)
    images = replace(part.images, channels=channels, side=side, resize=resize)
    return Part(images, part.labels).subset(indices)


def _fit_tensor(part: Part, size: int | None, name: str) -> Part:
    assert isinstance(part.images, TensorImages)
    tensor = part.images.tensor
    height, width = tensor.shape[-2:]
    side = _common_side(Counter({(height, width): len(tensor)}), size, name)
    return Part(TensorImages(torch.cat([fit(chunk, side) for chunk in tensor.split(1000)])), part.labels)
