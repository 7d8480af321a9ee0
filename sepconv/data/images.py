"""Image files and bytes to uint8 tensors: decoding, channel count, resizing."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from sepconv.data.preprocessing import Crop

GREY_MODES = frozenset({"1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N", "F"})
# EPS is a program, which Pillow has Ghostscript run; of MPEG it knows no more than the size.
NOT_READ = frozenset({"EPS", "MPEG"})
# Formats whose grey images of 16 bits Pillow may give as numbers of 32.
SIXTEEN_BITS = frozenset({"PNG", "PPM"})

T = TypeVar("T")
R = TypeVar("R")


class Images(Protocol):
    """Square images of one size that can be taken by index: in memory, or decoded when asked for."""

    @property
    def shape(self) -> tuple[int, int, int, int]: ...

    def take(self, indices: Tensor) -> Tensor:
        """Shape: indices (n,) -> uint8 (n, C, H, W)."""
        ...

    def subset(self, indices: Tensor) -> Images: ...


@dataclass(frozen=True)
class TensorImages:
    """Images in memory, uint8 (N, C, H, W)."""

    tensor: Tensor

    def __len__(self) -> int:
        return len(self.tensor)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        n, c, h, w = self.tensor.shape
        return n, c, h, w

    def take(self, indices: Tensor) -> Tensor:
        return self.tensor[indices]

    def subset(self, indices: Tensor) -> TensorImages:
        return TensorImages(self.tensor[indices])


@dataclass(frozen=True)
class EncodedImages:
    """Images as files or as encoded bytes, decoded when taken.

    Args:
        read: the encoded bytes of image i.
        names: one name an image, for messages.
        channels: 1 or 3; every image is converted to it.
        side: of the square that all images are; 0 while it is not known.
        fit: how they become squares; None where they are.
    """

    read: Callable[[int], bytes]
    names: Sequence[str]
    channels: int = 3
    side: int = 0
    fit: Crop | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), self.channels, self.side, self.side

    def take(self, indices: Tensor) -> Tensor:
        return torch.stack(in_threads(self.decode, indices.tolist()))

    def decode(self, index: int) -> Tensor:
        """Image `index` as uint8 (C, H, W); a BrokenImage names the image that cannot be decoded."""
        return decode(self.open(index), self.names[index], self.channels, self.fit)

    def open(self, index: int) -> Image.Image:
        """Image `index` behind its header."""
        name = self.names[index]
        try:
            return open_image(self.read(index), name)
        except OSError as error:
            raise BrokenImage(name, error.strerror or _reason(error)) from error

    def subset(self, indices: Tensor) -> EncodedImages:
        keep, read = indices.tolist(), self.read
        return replace(self, read=lambda i: read(keep[i]), names=[self.names[i] for i in keep])


class BrokenImage(ValueError):
    """An image that cannot be decoded; `name` says which."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"load: broken image {name} ({reason})")
        self.name, self.reason = name, reason


def readable_suffixes() -> frozenset[str]:
    """The ends of names, in lower case, of the files that Pillow and its plugins read here."""
    # Files of several JPEG pictures, which the reader of JPEG opens.
    formats = {*_formats(), "MPO"}
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def open_image(content: bytes, name: str) -> Image.Image:
    """The image behind its header, its pixels not yet decoded."""
    if not content:
        raise BrokenImage(name, "the file is empty")
    # Each decoder raises errors of its own kinds (OSError, SyntaxError, struct.error, zlib.error, ...).
    try:
        return Image.open(io.BytesIO(content), formats=_formats())
    except Exception as error:
        raise BrokenImage(name, _reason(error)) from error


def _formats() -> list[str]:
    """The formats that Pillow decodes by itself."""
    Image.init()
    stub = ImageFile.StubImageFile
    readers = {name: Image.OPEN[name][0] for name in Image.ID if name not in NOT_READ}
    return [name for name, reader in readers.items() if not (isinstance(reader, type) and issubclass(reader, stub))]


def decode(image: Image.Image, name: str, channels: int, fit: Crop | None) -> Tensor:
    """The pixels of an opened image as uint8 (channels, H, W), upright as the camera's orientation tag says.

    Of several frames the first counts, of transparent pixels the colour beneath. Grey values of 16 bits keep their
    upper byte; numbers of 32 bits, whole or not, have no brightness of their own: each image's range becomes 0 to 255.

    Raises:
        BrokenImage: the image is truncated or damaged; the message holds `name`.
    """
    try:
        pixels = np.array(_usual(image).convert("L" if channels == 1 else "RGB"))
    except Exception as error:
        raise BrokenImage(name, _reason(error)) from error
    tensor = torch.from_numpy(pixels).view(*pixels.shape[:2], channels).permute(2, 0, 1)
    return tensor if fit is None else fit(tensor)


def read_images(paths: Iterable[str | Path], channels: int, fit: Crop) -> Tensor:
    """Image files for prediction: uint8 (N, channels, size, size)."""
    found = [Path(path) for path in paths]
    for path in found:
        if not path.is_file():
            raise FileNotFoundError(f"read_images: no such file: {path}")
    opened = [(open_image(path.read_bytes(), str(path)), str(path)) for path in found]
    return torch.stack([decode(image, name, channels, fit) for image, name in opened])


def in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`function` of each item, in order, on PyTorch's number of threads: decoders release the interpreter lock."""
    threads = min(torch.get_num_threads(), os.cpu_count() or 1)
    if threads == 1 or len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each made in a second thread while the one before is in use."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, iterator, end)
        while (item := following.result()) is not end:
            following = pool.submit(next, iterator, end)
            yield item  # type: ignore[misc]


def _usual(image: Image.Image) -> Image.Image:
    """The image upright, grey in 8 bits or else as RGB."""
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BITS)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image, sixteen)
    if image.mode in GREY_MODES:
        return image
    # By way of RGBA, or Pillow warns of palettes with transparency.
    return image.convert("RGBA" if image.mode == "P" else "RGB").convert("RGB")


def _eight_bits(image: Image.Image, sixteen: bool) -> Image.Image:
    """Grey images of 16 and 32 bits; Pillow's own conversion would cut them off at 255."""
    values = np.asarray(image).astype(np.float64)
    scaled = values / 257 if sixteen else _stretched(values)
    return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))


def _stretched(values: np.ndarray) -> np.ndarray:
    """The range of the finite values as 0 to 255; one single value is black up to 0 and white above."""
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    if low == high:
        low, high = min(low, 0.0), max(high, 0.0)
    return np.where(finite, values - low, 0.0) * (255 / (high - low or 1.0))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can read"
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
