"""Tables of images: parquet files as Hugging Face writes them, and data sets of its hub."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sepconv.data.images import EncodedImages
from sepconv.data.parts import Part, Source, readable
from sepconv.data.splits import roles, split_at_beginning, splits_among

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")


def read_parquet(name: str, files: Sequence[Path], source: str) -> Source:
    """Parquet files; those that are named after splits, or stand in folders of such names, are those splits."""
    groups: dict[str, list[str]] = {}
    for file in files:
        split = split_at_beginning(file.stem) or split_at_beginning(file.parent.name) or "train"
        # What is given here is a pattern to the package, also where a name holds such signs.
        groups.setdefault(split, []).append(glob.escape(str(file)))
    if "train" not in groups:
        groups = {"train": [file for split in groups.values() for file in split]}
    try:
        with quiet_datasets() as datasets:
            splits = {split: datasets.Dataset.from_parquet(paths) for split, paths in groups.items()}
    except ModuleNotFoundError:
        raise
    except Exception as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"load: {source} cannot be read as parquet ({reason})") from error
    return read_table(name, splits, source)


def read_table(name: str, splits: dict[str, Dataset], source: str) -> Source:
    """Tables with an image column and a label column."""
    kinds = splits_among(splits)
    if "train" not in kinds:
        raise ValueError(f"load: {source} has no split called train but {', '.join(splits)}")
    train = splits[kinds["train"][0]]
    columns = _columns(train, source)
    classes, numbers = _classes(train, columns[1], source)
    # Some hub data sets publish their test split without labels (-1): then the one for validation serves.
    labelled = {kind: [s for s in kinds.get(kind, ()) if _labelled(splits[s], columns)] for kind in ("test", "val")}
    used = [kinds["train"][0], *labelled["test"][:1], *labelled["val"][:1]]
    parts = [_part(splits[split], columns, numbers, f"{source} {split}") for split in used]
    test, val = (*parts[1:], None, None)[:2]
    return Source(readable(name), classes, parts[0], test, val, _notes(used, parts, splits, source))


@contextmanager
def quiet_datasets() -> Iterator[Any]:
    """The package `datasets` without its progress bars, which would mix with the caller's."""
    datasets = require_datasets()
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        if shown:
            datasets.enable_progress_bars()


def require_datasets() -> Any:
    """The package `datasets`, or one line that says how to get it."""
    try:
        import datasets
    except ImportError:
        raise ModuleNotFoundError(
            "load: parquet files and Hugging Face data sets need the package datasets: pip install 'sepconv[data]'"
        ) from None
    return datasets


def _notes(used: list[str], parts: list[Part], splits: dict[str, Dataset], source: str) -> tuple[str, ...]:
    """What each split serves for, and which serve for nothing."""
    counted = [(split, len(part.labels)) for split, part in zip(used, parts, strict=True)]
    notes = [roles(counted[0], counted[1], counted[2] if len(counted) > 2 else None)] if len(counted) > 1 else []
    unused = [f"{split} {len(table)}" for split, table in splits.items() if split not in used]
    if unused:
        notes.append(f"{source}: images of splits without labels or without a purpose are ignored: {', '.join(unused)}")
    return tuple(notes)


def _columns(table: Dataset, source: str) -> tuple[str, str]:
    found = []
    for kind, names in (("image", IMAGE_COLUMNS), ("label", LABEL_COLUMNS)):
        column = next((name for name in names if name in table.column_names), None)
        if column is None:
            raise ValueError(
                f"load: no {kind}s: {source} has the columns {', '.join(table.column_names)} "
                f"but none called {' or '.join(names)}"
            )
        found.append(column)
    return found[0], found[1]


def _labelled(table: Dataset, columns: tuple[str, str]) -> bool:
    return columns[1] in table.column_names and -1 not in table[columns[1]][:1]


def _classes(table: Dataset, column: str, source: str) -> tuple[list[str], dict[Any, int]]:
    """The names of the classes, and the class number of each value in the label column."""
    names = getattr(table.features[column], "names", None)
    try:
        values = range(len(names)) if names else sorted(set(table[column]) - {None})
        return list(names or map(str, values)), {value: number for number, value in enumerate(values)}
    except TypeError:
        raise ValueError(f"load: the column {column} of {source} is not one class an image") from None


def _part(table: Dataset, columns: tuple[str, str], numbers: dict[Any, int], name: str) -> Part:
    image, label = columns
    bare = table.select_columns([image]).cast_column(image, require_datasets().Image(decode=False))
    cells = bare.with_format("arrow")[:][image]

    def read(index: int) -> bytes:
        cell = cells[index].as_py()
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    labels = []
    for row, value in enumerate(table[label]):
        if value not in numbers:
            raise ValueError(f"load: {name} row {row}: label {value} is none of the {len(numbers)} classes")
        labels.append(numbers[value])
    names = [f"{name} row {row}" for row in range(len(table))]
    return Part(EncodedImages(read, names), torch.tensor(labels, dtype=torch.int64))
