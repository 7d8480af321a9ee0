"""Data that is no set of labelled images: files of arrays, one a sample, and what anybody's loader gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sepconv.data.augment import Augment, generator
from sepconv.data.dataset import NO_AUGMENT, Split, divided, in_batches
from sepconv.data.images import one_ahead, readable_suffixes
from sepconv.data.listing import Ignored, entries, files_below
from sepconv.data.parts import readable
from sepconv.data.splits import roles, splits_among
from sepconv.leaves import Inputs
from sepconv.leaves.inputs import joined, labels_of, refuse_single_samples
from sepconv.system.files import name_for_libraries

SUFFIXES = (".npy", ".safetensors")
MOST_BATCHES = 10_000
"""That a loader may give that does not say how many it has: it might never end."""
MOST_BYTES = 4 << 30
"""Of batches that can be gone through only once, and are kept in memory."""
ASTRAY = 10
"""Of so many files in a folder one may be of another kind."""


class Samples(Protocol):
    """What a network is trained and measured on: `sepconv.data.Split` for images, or one of the two classes below."""

    def __len__(self) -> int: ...

    def steps(self, batch_size: int) -> int:
        """Batches in an epoch, incomplete ones left out."""
        ...

    def batches(
        self,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        epoch: int = 0,
        augment: Augment = NO_AUGMENT,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[tuple[Tensor | Inputs, Tensor | None]]:
        """Batches of what the network is called with, and of classes where they are known."""
        ...


@dataclass(frozen=True)
class SampleFiles:
    """One sample a file, read when taken. All are of one structure."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def labels(self) -> Tensor:
        """As if all were of one class."""
        return torch.zeros(len(self), dtype=torch.int64)

    def subset(self, indices: Tensor) -> SampleFiles:
        return SampleFiles([self.paths[i] for i in indices.tolist()])

    def take(self, indices: Tensor) -> Inputs:
        return joined([read_sample(self.paths[i]) for i in indices.tolist()])

    def steps(self, batch_size: int) -> int:
        return len(self) // min(batch_size, len(self))

    def batches(
        self,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        epoch: int = 0,
        augment: Augment = NO_AUGMENT,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[tuple[Inputs, None]]:
        """As those of `sepconv.data.Split`."""
        _refuse_augment(augment)
        chosen = (c[rank::world] for c in in_batches(len(self), batch_size, shuffle_seed, epoch, drop_last))
        return one_ahead((self.take(indices), None) for indices in chosen if len(indices))


@dataclass(frozen=True)
class LoaderSplit:
    """The batches of a loader as it gives them: their size and order are the loader's.

    Where a loader never ends, ``LoaderSplit(loader, 100)`` is its first hundred batches.
    """

    loader: Iterable[Any]
    count: int
    """Batches in one pass; what the loader has beyond them is not asked for."""

    @classmethod
    def of(cls, loader: Iterable[Any]) -> LoaderSplit:
        """A loader that can be gone through only once is read into memory. Its length, if it has one, ends a pass.

        Raises:
            ValueError: it has no length and gives more batches than ``MOST_BATCHES``, or than memory should hold.
            TypeError: it is a data set, which gives single samples.
        """
        if isinstance(loader, LoaderSplit):
            return loader
        refuse_single_samples(loader, "the loader")
        if isinstance(loader, Tensor | Inputs):
            loader = [loader]
        kept = _in_memory(loader) if isinstance(loader, Iterator) else loader
        try:
            count = len(kept)  # type: ignore[arg-type]
        except TypeError:  # of an iterable data set
            count = sum(1 for _ in islice(kept, MOST_BATCHES + 1))
            if count > MOST_BATCHES:
                raise ValueError(
                    f"the loader has no length and gives more than {MOST_BATCHES:,} batches, as one that never ends: "
                    "say how many with sepconv.data.LoaderSplit(loader, N)"
                ) from None
        if not count:
            raise ValueError("the loader gives no batch")
        return cls(kept, count)

    def __len__(self) -> int:
        """Samples, where all batches are as large as the first."""
        return self.count * max(1, len(self.first(1)))

    def __iter__(self) -> Iterator[Any]:
        return islice(self.loader, self.count)

    def first(self, samples: int) -> Inputs:
        """So many samples from the beginning, or more where a batch cannot be divided."""
        found: list[Inputs] = []
        for batch in self:
            inputs = Inputs.of(batch)
            if found and (inputs.structure != found[0].structure or not inputs.divisible):
                break
            found.append(inputs)
            if sum(map(len, found)) >= samples:
                break
        return joined(found) if samples == 1 else joined(found)[:samples]

    def steps(self, batch_size: int) -> int:
        return self.count

    def batches(
        self,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        epoch: int = 0,
        augment: Augment = NO_AUGMENT,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[tuple[Inputs, Tensor | None]]:
        """All batches of the loader, whatever size is asked for."""
        _refuse_augment(augment)
        return ((Inputs.of(batch), labels_of(batch)) for batch in self)


def _in_memory(loader: Iterator[Any]) -> list[Any]:
    kept, size = [], 0
    for batch in loader:
        kept.append(batch)
        size += sum(t.numel() * t.element_size() for t in Inputs.of(batch).tensors)
        if size > MOST_BYTES or len(kept) > MOST_BATCHES:
            raise ValueError(
                f"the batches can be gone through only once, and {len(kept):,} of them take {size >> 20:,} MB of "
                "memory and do not end: give a loader, or so many of them: list(itertools.islice(batches, N))"
            )
    return kept


def as_samples(source: Samples | Iterable[Any]) -> Samples:
    """A split as it is, anything else as the batches of a loader."""
    return source if isinstance(source, Split | SampleFiles | LoaderSplit) else LoaderSplit.of(source)  # type: ignore[arg-type]


def first_of(split: Samples, count: int) -> Inputs:
    """So many samples from the beginning of a split, the first ones again where it has fewer."""
    if isinstance(split, LoaderSplit):
        found = split.first(count)
        return found[torch.arange(count) % len(found)] if len(found) < count else found
    chosen = torch.arange(count) % len(split)
    if isinstance(split, Split):
        return Inputs.of(split.normalise(split.images.take(chosen)))
    assert isinstance(split, SampleFiles)
    return split.take(chosen)


@dataclass(frozen=True)
class SampleData:
    """Samples for training and for testing, as :class:`sepconv.data.Data` is of images.

    Attributes:
        val: samples that the source sets apart from both.
        notes: what was left out and which split of the source serves for what, one line each.
        num_classes: of the samples' labels; 0 where they have none.
    """

    name: str
    train: SampleFiles | LoaderSplit
    test: Samples
    val: Samples | None = None
    notes: tuple[str, ...] = ()
    num_classes: int = 0

    items = "samples"
    """What they are called in sentences."""

    @property
    def classes(self) -> list[str]:
        return [str(i) for i in range(self.num_classes)]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample; () where the network has several inputs."""
        tensor = self.calibration(1).tensor
        return () if tensor is None else tuple(tensor.shape[1:])

    def calibration(self, n: int, seed: int = 0) -> Inputs:
        """`n` different training samples, without labels; of a loader the first, and fewer where it has fewer."""
        if isinstance(self.train, LoaderSplit):
            return self.train.first(n)
        if not 1 <= n <= len(self.train):
            raise ValueError(f"calibration: n must be from 1 to {len(self.train)} training samples but is {n}")
        return self.train.take(torch.randperm(len(self.train), generator=generator(seed))[:n])


def is_sample_folder(source: str | Path) -> bool:
    """Whether a folder holds files of samples, in it or below it, and not images: a few of the others may lie astray.

    Raises:
        ValueError: there are many of both.
    """
    path = Path(source)
    if not path.is_dir():
        return False
    found = files_below(path, {*SUFFIXES, *readable_suffixes()}, Ignored())
    kinds = Counter(file.suffix.lower() in SUFFIXES for file in found)
    samples, images = kinds[True], kinds[False]
    if ASTRAY * min(samples, images) > max(samples, images):
        kind = " or ".join(SUFFIXES)
        raise ValueError(f"load: {path} holds {images} images and {samples} samples ({kind}): give the folder of one")
    return samples > images


def load_samples(folder: str | Path, *, test_fraction: float = 0.2, seed: int = 0) -> SampleData:
    """A folder of samples without labels, one a file, each without the dimension of the batch.

    An ``.npy`` file holds the network's only input. A ``.safetensors`` file with one tensor does so too; with several
    it holds the network's arguments by name. Entries called "labels" or "targets" are left out. Subfolders that are
    splits by their names (`train/`, `test/`, `val/`) are; else ``test_fraction`` of all files is for testing.

    Raises:
        ValueError: there are fewer than two samples, one is damaged, or they have several shapes; the file is named.
    """
    folder, ignored = Path(folder), Ignored()
    splits = splits_among(path.name for path in entries(folder, Ignored()) if path.is_dir())
    if "train" not in splits or len(splits) < 2:
        files = list(files_below(folder, SUFFIXES, ignored))
        train, test = divided(torch.zeros(len(files)).long(), test_fraction, seed)
        parts = {"train": SampleFiles(files).subset(train), "test": SampleFiles(files).subset(test)}
    else:
        places = {kind: [folder / name for name in names] for kind, names in splits.items()}
        parts = {
            kind: SampleFiles([file for place in found for file in files_below(place, SUFFIXES, ignored)])
            for kind, found in places.items()
        }
    _check_samples(folder, parts)
    val = parts.get("val") if "test" in parts else None
    test_part = parts.get("test", parts.get("val"))
    assert test_part is not None
    notes = [f"{folder}: {sum(map(len, parts.values()))} samples, {ignored}"] if ignored else []
    if len(splits) > 1:
        notes.append(
            roles(("train", len(parts["train"])), ("test", len(test_part)), None if val is None else ("val", len(val)))
        )
    return SampleData(readable(folder.resolve().name), parts["train"], test_part, val, tuple(notes))


def read_sample(path: Path) -> Inputs:
    """A sample as a batch of one; numbers with fractions in float32.

    Raises:
        ValueError: the file is damaged or holds other things than numbers; it is named.
    """
    try:
        found = _of_numpy(path) if path.suffix.lower() == ".npy" else _of_safetensors(path)
        named = found if isinstance(found, Tensor) else Inputs.of(found).kwargs
    except (OSError, ValueError, EOFError, TypeError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"load_samples: {path} is no sample ({reason})") from error
    if not isinstance(named, Tensor) and len(named) == 1:
        (named,) = named.values()
    inputs = Inputs((named,)) if isinstance(named, Tensor) else Inputs((), named)
    return inputs.map(lambda t: t[None].float() if t.is_floating_point() else t[None])


def _of_numpy(path: Path) -> Tensor:
    # An array of objects would be a pickle, which runs code.
    return torch.from_numpy(np.ascontiguousarray(np.load(path, allow_pickle=False)))


def _of_safetensors(path: Path) -> dict[str, Tensor]:
    with name_for_libraries(path) as name, safe_open(name, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no dict)


def _check_samples(folder: Path, parts: dict[str, SampleFiles]) -> None:
    for kind, part in parts.items():
        if not len(part):
            least = f"two files ({' or '.join(SUFFIXES)}) are the least"
            raise ValueError(f"load_samples: {folder} has no sample for {kind}: {least}")
    first = parts["train"].paths[0]
    wanted = read_sample(first)
    for part in parts.values():
        for path in part.paths:
            if (found := read_sample(path)).structure != wanted.structure:
                raise ValueError(
                    f"load_samples: {path} is ({found}) but {first} is ({wanted}): all samples must have one shape"
                )


def _refuse_augment(augment: Augment) -> None:
    if augment != NO_AUGMENT:
        raise ValueError("batches: flips, crops and cutout are of images; other samples are taken as they are")
