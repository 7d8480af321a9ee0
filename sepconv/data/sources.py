"""Where data sets come from: each source becomes images and labels of a training and perhaps a test split."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sepconv.data.idx import is_idx_folder, read_idx_folder
from sepconv.data.images import SUFFIXES, EncodedImages, TensorImages, require_pillow

if TYPE_CHECKING:
    from datasets import Dataset

TEST_NAMES = ("test", "validation", "valid", "val", "dev")
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
POSSIBILITIES = (
    "'digits', an image folder (one subfolder a class), *.parquet files, an IDX folder, or a Hugging Face data set name"
)


@dataclass(frozen=True)
class Part:
    """Images and int64 labels (N,) of one split."""

    images: TensorImages | EncodedImages
    labels: Tensor

    def subset(self, indices: Tensor) -> Part:
        return Part(self.images.subset(indices), self.labels[indices])


@dataclass(frozen=True)
class Source:
    """A data set as it was found; `test` is None where the source has no test split."""

    name: str
    classes: list[str]
    train: Part
    test: Part | None


def read_source(source: str | Path) -> Source:
    """Find out what `source` is and read it; image files are not decoded yet."""
    text, path = str(source), Path(source)
    if text == "digits":
        return read_digits()
    if any(sign in path.name for sign in "*?["):
        return read_parquet(path.parent.name or "parquet", sorted(path.parent.glob(path.name)), text)
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"load: {path} is a file but not *.parquet; known are {POSSIBILITIES}")
        return read_parquet(path.stem, [path], text)
    if path.is_dir():
        return read_folder(path)
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


def read_folder(folder: Path) -> Source:
    """A folder of parquet files, of IDX files or of images, whichever is in it."""
    parquet = sorted(folder.rglob("*.parquet"))
    if parquet:
        return read_parquet(folder.resolve().name, parquet, str(folder))
    if is_idx_folder(folder):
        splits = {name: Part(TensorImages(x), y) for name, (x, y) in read_idx_folder(folder).items()}
        classes = [str(i) for i in range(int(splits["train"].labels.max()) + 1)]
        return Source(folder.resolve().name, classes, splits["train"], splits.get("test"))
    return read_image_folder(folder)


def read_image_folder(folder: Path) -> Source:
    """One subfolder a class; or `train/` and `test/` (`val/`, `validation/`) of that form."""
    require_pillow()
    root = folder / "train" if (folder / "train").is_dir() else folder
    tests = [folder / name for name in TEST_NAMES if root != folder and (folder / name).is_dir()]
    classes = [path.name for path in _subfolders(root)]
    if not classes:
        if any(_image_files(root)):
            raise ValueError(f"load: no labels: {root} holds images but no subfolders, one a class")
        raise ValueError(f"load: no images in {root}: expected one subfolder a class")
    unknown = [path for path in (_subfolders(tests[0]) if tests else []) if path.name not in classes]
    if unknown:
        raise ValueError(f"load: {unknown[0]} is a class without training images in {root}")
    test = _labelled_files(tests[0], classes) if tests else None
    return Source(folder.resolve().name, classes, _labelled_files(root, classes), test)


def read_parquet(name: str, files: list[Path], source: str) -> Source:
    """Parquet files as Hugging Face writes them; files called train* and test* or val* are the two splits."""
    if not files:
        raise FileNotFoundError(f"load: no such file or folder: {source}")
    groups: dict[str, list[str]] = {}
    for file in files:
        match = re.match(rf"(train|{'|'.join(TEST_NAMES)})", file.stem.lower())
        groups.setdefault(match[1] if match else "train", []).append(str(file))
    if "train" not in groups:
        groups = {"train": [str(file) for file in files]}
    try:
        with _quiet_datasets() as datasets:
            splits = {split: datasets.Dataset.from_parquet(paths) for split, paths in groups.items()}
    except ModuleNotFoundError:
        raise
    except Exception as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"load: {source} cannot be read as parquet ({reason})") from error
    return read_table(name, splits, source)


def read_hub(name: str) -> Source:
    """A data set of the Hugging Face hub, by name."""
    try:
        with _quiet_datasets() as datasets:
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


def read_table(name: str, splits: dict[str, Dataset], source: str) -> Source:
    """Tables with an image column and a label column."""
    require_pillow()
    if "train" not in splits:
        raise ValueError(f"load: {source} has no split called train but {', '.join(splits)}")
    columns = _columns(splits["train"], source)
    classes, numbers = _classes(splits["train"], columns[1], source)
    train = _table_part(splits["train"], columns, numbers, f"{source} train")
    tests = [splits[split] for split in TEST_NAMES if split in splits]
    # Some hub data sets publish their test split without labels (-1): then the next one serves.
    labelled = [test for test in tests if columns[1] in test.column_names and -1 not in test[columns[1]][:1]]
    test = _table_part(labelled[0], columns, numbers, f"{source} test") if labelled else None
    return Source(name, classes, train, test)


def require_datasets() -> Any:
    """The package `datasets`, or one line that says how to get it."""
    try:
        import datasets
    except ImportError:
        raise ModuleNotFoundError(
            "load: parquet files and Hugging Face data sets need the package datasets: pip install 'sepconv[data]'"
        ) from None
    return datasets


@contextmanager
def _quiet_datasets() -> Iterator[Any]:
    """The package `datasets` without its progress bars, which would mix with the caller's."""
    datasets = require_datasets()
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        if shown:
            datasets.enable_progress_bars()


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


def _classes(table: Dataset, column: str, source: str) -> tuple[list[str], dict[Any, int]]:
    """The names of the classes, and the class number of each value in the label column."""
    names = getattr(table.features[column], "names", None)
    try:
        values = range(len(names)) if names else sorted(set(table[column]) - {None})
        return list(names or map(str, values)), {value: number for number, value in enumerate(values)}
    except TypeError:
        raise ValueError(f"load: the column {column} of {source} is not one class an image") from None


def _table_part(table: Dataset, columns: tuple[str, str], numbers: dict[Any, int], name: str) -> Part:
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


def _labelled_files(root: Path, classes: list[str]) -> Part:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = list(_image_files(root / name))
        files += found
        labels += [label] * len(found)
    return Part(
        EncodedImages(lambda i: files[i].read_bytes(), [str(file) for file in files]),
        torch.tensor(labels, dtype=torch.int64),
    )


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _image_files(folder: Path) -> Iterator[Path]:
    paths = sorted(folder.rglob("*")) if folder.is_dir() else []
    return (path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file())
