"""Folders of images: one subfolder a class, or splits of that form."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

import torch

from sepconv.data.images import EncodedImages, readable_suffixes
from sepconv.data.listing import Ignored, entries, files_below, ignore_file, no_images
from sepconv.data.parts import Part, Source, readable
from sepconv.data.splits import roles, splits_among

UNSORTED = "images outside the class folders"


def holds_classes(folder: Path) -> bool:
    """Whether at least two subfolders hold images."""
    suffixes, ignored = readable_suffixes(), Ignored()
    filled = (path for path in _subfolders(folder) if any(files_below(path, suffixes, ignored)))
    return next(filled, None) is not None and next(filled, None) is not None


def read_image_folder(folder: Path, labelled: bool | None = None) -> Source:
    """One subfolder a class, or no classes; or a training and a test or validation split, or all three, of that form.

    Args:
        labelled: see :func:`sepconv.data.load`.

    Raises:
        ValueError: no images, no classes, or what looks like a split cannot serve as one.
    """
    ignored = Ignored()
    splits = _splits(folder)
    train = splits.get("train", folder)
    with_classes = labelled or (labelled is None and not _is_flat(train))
    classes = _class_folders(train) if with_classes else []
    if splits:
        _check_classes_in_splits(classes, splits)
        _count_beside(folder, [path.name for path in splits.values()], ignored)
    read = partial(_labelled, classes=classes) if with_classes else _unlabelled
    parts = {kind: read(path, ignored=ignored) for kind, path in {"train": train, **splits}.items()}
    # Without images for testing, those for validation are.
    test, val = (parts.get("test"), parts.get("val")) if "test" in parts else (parts.get("val"), None)
    notes = (*_alike(classes), *_notes(folder, splits, parts, ignored))
    return Source(readable(folder.resolve().name), [readable(c) for c in classes], parts["train"], test, val, notes)


def _splits(folder: Path) -> dict[str, Path]:
    """The folder of each split; none where there are only classes."""
    found = splits_among(path.name for path in _subfolders(folder))
    if not found:
        return {}
    a_class = "; if it is a class, give it another name"
    for kind, names in found.items():
        if len(names) > 1:
            raise ValueError(f"load: {folder} has {len(names)} {kind} splits, {' and '.join(names)}: one is the most")
    paths = {kind: folder / names[0] for kind, names in found.items()}
    if "train" not in paths:
        first = next(iter(paths.values()))
        raise ValueError(f"load: {first} looks like a split but there is no training split beside it{a_class}")
    if len(paths) == 1:
        raise ValueError(
            f"load: {paths['train']} looks like a training split but there is no test or validation split beside it: "
            f"give {paths['train']} itself to have one taken from it{a_class}"
        )
    return paths


def _class_folders(root: Path) -> list[str]:
    """The names of the classes."""
    classes = [path.name for path in _subfolders(root)]
    if not classes:
        unsorted = Ignored()
        if any(files_below(root, readable_suffixes(), unsorted)):
            raise ValueError(f"load: no labels: {root} holds images but no subfolders, one a class")
        raise ValueError(f"load: {no_images(root, unsorted)}: expected one subfolder a class")
    for name in classes:
        inside = splits_among(path.name for path in _subfolders(root / name))
        if "train" in inside and len(inside) > 1:
            raise ValueError(
                f"load: {root / name} holds splits and is no class: splits stand above the classes; a single data set "
                f"is given as {root / name}"
            )
    if len(classes) == 1 and len(_subfolders(root / classes[0])) > 1:
        below = root / classes[0]
        raise ValueError(
            f"load: {root} has only one class ({classes[0]}): if its subfolders are the classes, give {below}"
        )
    return classes


def _check_classes_in_splits(classes: Sequence[str], splits: dict[str, Path]) -> None:
    """A class may be called train, if every split has it."""
    for name in itertools.chain(*splits_among(classes).values()):
        lacking = [path for path in splits.values() if not (path / name).is_dir()]
        if lacking:
            raise ValueError(f"load: {splits['train'] / name} looks like a split, and {lacking[0]} has no such class")


def _is_flat(root: Path) -> bool:
    """Whether images lie in a folder itself and none in its subfolders."""
    suffixes, ignored = readable_suffixes(), Ignored()
    loose = any(path.is_file() and path.suffix.lower() in suffixes for path in entries(root, ignored))
    return loose and not any(next(files_below(path, suffixes, ignored), None) for path in _subfolders(root))


def _unlabelled(root: Path, ignored: Ignored) -> Part:
    """All images in and below a folder."""
    files = list(files_below(root, readable_suffixes(), ignored))
    if not files:
        raise ValueError(f"load: {no_images(root, ignored)}")
    return Part(EncodedImages(lambda i: files[i].read_bytes(), list(map(str, files))), torch.zeros(len(files)).long())


def _labelled(root: Path, classes: Sequence[str], ignored: Ignored) -> Part:
    """All images below the class folders of one split."""
    unknown = [path for path in _subfolders(root) if path.name not in classes]
    if unknown:
        raise ValueError(f"load: {unknown[0]} is a class without training images")
    files: list[Path] = []
    labels: list[int] = []
    passed_over = Ignored()
    _count_beside(root, classes, passed_over)
    for label, name in enumerate(classes):
        found = list(files_below(root / name, readable_suffixes(), passed_over)) if (root / name).is_dir() else []
        files += found
        labels += [label] * len(found)
    ignored.update(passed_over)
    if not files:
        raise ValueError(f"load: {no_images(root, passed_over)}: expected one subfolder a class")
    images = EncodedImages(lambda i: files[i].read_bytes(), [str(file) for file in files])
    return Part(images, torch.tensor(labels, dtype=torch.int64))


def _alike(classes: Sequence[str]) -> list[str]:
    """A note on classes that some systems cannot tell apart."""
    count = Counter(name.casefold() for name in classes)
    alike = [name for name in classes if count[name.casefold()] > 1]
    return [f"{len(alike)} classes differ from another in case alone: {', '.join(alike[:6])}"] if alike else []


def _notes(folder: Path, splits: dict[str, Path], parts: dict[str, Part], ignored: Ignored) -> tuple[str, ...]:
    total = sum(len(part.labels) for part in parts.values())
    notes = (f"{folder}: {total} images, {ignored}",) if ignored else ()
    if not splits:
        return notes
    counted = {kind: (f"{path.name}/", len(parts[kind].labels)) for kind, path in splits.items()}
    if "test" in counted:
        return (*notes, roles(counted["train"], counted["test"], counted.get("val")))
    return (*notes, roles(counted["train"], counted["val"], None))


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in entries(folder, Ignored()) if path.is_dir()]


def _count_beside(folder: Path, kept: Collection[str], ignored: Ignored) -> None:
    """Count what is in a folder beside the subfolders that are read."""
    images = readable_suffixes()
    for path in entries(folder, ignored):
        if path.is_dir() and path.name in kept:
            continue
        if path.is_dir():
            ignored[f"{path.name}/"] += 1
        elif path.suffix.lower() in images and path.is_file():
            ignored[UNSORTED] += 1
        else:
            ignore_file(path, ignored)
