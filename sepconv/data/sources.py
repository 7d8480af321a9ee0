"""Where data sets come from: each source becomes images and labels of a training and perhaps other splits."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from sepconv.data.idx import is_idx_folder, read_idx_folder
from sepconv.data.image_folder import holds_classes, read_image_folder
from sepconv.data.images import TensorImages
from sepconv.data.listing import Ignored, files_below
from sepconv.data.parts import Part, Source, readable
from sepconv.data.tables import quiet_datasets, read_parquet, read_table

POSSIBILITIES = (
    "'digits', an image folder (one subfolder a class), *.parquet files, an IDX folder, or a Hugging Face data set name"
)


def read_source(source: str | Path, labelled: bool | None = None) -> Source:
    """Find out what `source` is and read it; image files are not decoded yet.

    Args:
        labelled: see :func:`sepconv.data.load`.
    """
    found = _read(source, labelled)
    if labelled is True and not found.classes:
        raise ValueError(f"load: no labels: {source} holds images but no subfolders, one a class")
    return found.without_labels() if labelled is False else found


def _read(source: str | Path, labelled: bool | None) -> Source:
    text, path = str(source), Path(source)
    if text == "digits":
        return read_digits()
    if path.is_dir():
        return read_folder(path, labelled)
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"load: {path} is a file but not *.parquet; known are {POSSIBILITIES}")
        return read_parquet(path.stem, [path], text)
    if any(sign in path.name for sign in "*?["):
        return read_pattern(path)
    if path.suffix or path.is_absolute() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text):
        raise FileNotFoundError(f"load: no such file or folder: {text}; known are {POSSIBILITIES}")
    return read_hub(text)


def read_digits() -> Source:
    """The 1797 handwritten digits of 8x8 pixels that scikit-learn carries (UCI, Alpaydin and Kaynak 1998)."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.from_numpy(found.images).mul(255 / 16).round().to(torch.uint8)
    part = Part(TensorImages(pixels.unsqueeze(1)), torch.from_numpy(found.target).long())
    return Source("digits", [str(digit) for digit in range(10)], part, None)


def read_folder(folder: Path, labelled: bool | None = None) -> Source:
    """A folder of IDX files, of images or of parquet files, whichever is in it; a stray file of another kind is not."""
    name = folder.resolve().name
    if is_idx_folder(folder):
        splits = {name: Part(TensorImages(x), y) for name, (x, y) in read_idx_folder(folder).items()}
        classes = [str(i) for i in range(int(splits["train"].labels.max()) + 1)]
        return Source(readable(name), classes, splits["train"], splits.get("test"))
    ignored = Ignored()
    if holds_classes(folder) or not (parquet := list(files_below(folder, {".parquet"}, ignored))):
        return read_image_folder(folder, labelled)
    found = read_parquet(name, parquet, str(folder))
    notes = (f"{folder}: {len(parquet)} parquet files, {ignored}", *found.notes) if ignored else found.notes
    return replace(found, notes=notes)


def read_pattern(path: Path) -> Source:
    """Files of one folder, such as train*.parquet."""
    files = sorted(path.parent.glob(path.name))
    if not files:
        raise FileNotFoundError(f"load: no such file or folder: {path}")
    return read_parquet(path.parent.name or "parquet", files, str(path))


def read_hub(name: str) -> Source:
    """A data set of the Hugging Face hub, by name."""
    try:
        with quiet_datasets() as datasets, _without_waiting(datasets):
            splits = datasets.load_dataset(name)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(
            f"load: '{name}' is no file or folder here, and not to be had as a Hugging Face data set "
            f"({reason}); known are {POSSIBILITIES}"
        ) from error
    return read_table(name, dict(splits), name)


@contextmanager
def _without_waiting(datasets: Any) -> Iterator[None]:
    """Where the hub's name is not known, as on a machine without a network, only what is on disk is asked for.

    The library would try for most of a minute, whatever folder was mistyped.
    """
    if getproxies() or _is_known(urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname):
        yield
        return
    from huggingface_hub import constants

    places: tuple[Any, ...] = (datasets.config, constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _is_known(host: str | None) -> bool:
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
