"""IDX files, the format of MNIST and Fashion-MNIST: a magic number, the sizes, then bytes.

Read here because it is thirty lines, and the libraries that read it bring an image library of their own along.
Format: http://yann.lecun.com/exdb/mnist/ (0x00000803 for images, 0x00000801 for labels, big-endian sizes).
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DIMENSIONS = {"images": 3, "labels": 1}


def is_idx_folder(folder: Path) -> bool:
    """Whether the folder holds the training images of an IDX data set."""
    return _find(folder, "train", "images") is not None


def read_idx_folder(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Splits "train" and, where there are its files, "test": uint8 images (N, 1, H, W), int64 labels (N,)."""
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k"), ("test", "test")):
        images, labels = (_find(folder, prefix, kind) for kind in DIMENSIONS)
        if images is None and labels is None:
            continue
        if images is None or labels is None:
            missing = "images" if images is None else "labels"
            name = f"{prefix}-{missing}-idx{DIMENSIONS[missing]}-ubyte[.gz]"
            raise FileNotFoundError(f"load: {folder} has no {name}")
        pixels, classes = read_idx(images, 3), read_idx(labels, 1)
        if len(pixels) != len(classes):
            raise ValueError(f"load: {images} has {len(pixels)} images but {labels} has {len(classes)} labels")
        splits[split] = (pixels.unsqueeze(1), classes.long())
    return splits


def read_idx(path: Path, dimensions: int) -> Tensor:
    """One IDX file of unsigned bytes as a uint8 tensor with `dimensions` dimensions.

    Raises:
        ValueError: another magic number, or fewer or more bytes than its sizes promise.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"load: {path} is truncated or no gzip file ({error})") from error
    magic, expected = int.from_bytes(content[:4], "big"), 0x0800 + dimensions
    if len(content) < 4 or magic != expected:
        raise ValueError(f"load: {path} starts with {magic:#010x} but should start with {expected:#010x}")
    header = 4 + 4 * dimensions
    sizes = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    total = header + math.prod(sizes)
    if len(content) != total:
        raise ValueError(f"load: {path} has {len(content)} bytes but its header promises {total}")
    values = np.frombuffer(content, dtype=np.uint8, offset=header).reshape(sizes)
    return torch.from_numpy(values.copy())


def _find(folder: Path, prefix: str, kind: str) -> Path | None:
    stem = f"{prefix}-{kind}"
    names = [f"{stem}{dot}idx{DIMENSIONS[kind]}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)
