"""Which output of a network each class of a data set is, by name: a folder of three kinds of ImageNet's, say."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sepconv.data import Data, Split
from sepconv.models.registry import library_of


def read_classes(path: Path) -> list[str]:
    """The names of a network's outputs from a file with one name a line, in the outputs' order.

    Raises:
        ValueError: the file cannot be read, is empty, or has a name twice.
    """
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"read_classes: cannot read {path}: {error}") from error
    while names and not names[-1]:
        names.pop()
    if not all(names) or not names:
        raise ValueError(f"read_classes: {path} must have the name of one class in every line")
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"read_classes: {path} has the class {twice!r} twice")
    return names


def names_of(name: str, classes: Sequence[str]) -> list[str]:
    """The names that timm or torchvision give the outputs of their trained model, if they know all ``classes``."""
    found = _of_timm(name) if name.startswith("timm/") else _of_torchvision(name)
    return next((names for names in found if set(classes) <= set(names)), [])


def names_of_outputs(name: str) -> list[str]:
    """What timm or torchvision call the outputs of their trained model, in words; nothing where they do not say."""
    found = [*(_of_timm(name) if name.startswith("timm/") else _of_torchvision(name))]
    return found[-1] if found else []


def _of_timm(name: str) -> Iterator[list[str]]:
    library_of(name)
    data: Any = importlib.import_module("timm.data")
    config = library_of(name).models.get_pretrained_cfg(name.removeprefix("timm/"), allow_unregistered=True)
    subset = config and data.infer_imagenet_subset(config)
    if subset:
        info = data.ImageNetInfo(subset)
        yield from (list(info.label_names()), list(info.label_descriptions()))


def _of_torchvision(name: str) -> Iterator[list[str]]:
    if not name.startswith("torchvision/"):
        return
    try:
        weights = library_of(name).models.get_model_weights(name.removeprefix("torchvision/"))
    except ValueError:  # nobody trained it
        return
    yield list(next(iter(weights)).meta.get("categories", ()))


def matched(data: Data, names: Sequence[str], outputs: int) -> Data:
    """The data with the label of each class set to the output of that name.

    Unchanged where the names are not known or are those of the data set already.

    Args:
        names: of the outputs, in their order; any other number of names than of outputs says nothing.

    Raises:
        ValueError: the network has no output of a class's name.
    """
    if len(names) != outputs or list(names) == data.classes:
        return data
    if twice := [name for name in data.classes if names.count(name) > 1]:
        raise ValueError(
            f"{data.name} has the class {twice[0]!r}, but several outputs of the network are called so: name the "
            "outputs with --classes FILE"
        )
    place = {name: i for i, name in enumerate(names)}
    if unknown := [name for name in data.classes if name not in place]:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ValueError(
            f"{data.name} has the class {unknown[0]!r}, but the {outputs} outputs of the network are {shown}: "
            "rename the data's classes, or name the outputs with --classes FILE"
        )
    label = torch.tensor([place[name] for name in data.classes])

    def moved(split: Split) -> Split:
        return replace(split, labels=label[split.labels])

    val = None if data.val is None else moved(data.val)
    return replace(data, classes=list(names), train=moved(data.train), test=moved(data.test), val=val)
