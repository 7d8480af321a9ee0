"""Data sets as batches: normalised images, labels, one training and one test split.

Splits, orders and batches are drawn here and not by ``DataLoader``: each follows from the seed and the epoch's number
alone, so that a run that was killed goes on to the bit, in one process or many.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import starmap
from pathlib import Path

import torch
from torch import Tensor

from sepconv.data.augment import Augment, generator
from sepconv.data.images import Images, TensorImages, one_ahead, read_images
from sepconv.data.preprocessing import Crop, Preprocessing, normalise
from sepconv.data.sources import read_source
from sepconv.data.uniform import uniform

STATISTICS_IMAGES = 5000  # mean and deviation of a data set that is not in memory come from so many images
NO_AUGMENT = Augment()


@dataclass(frozen=True)
class Split:
    """Images with labels, and the numbers that normalise them.

    Args:
        images: uint8 (N, C, H, W), in memory or decoded when taken.
        labels: int64 (N,).
        mean, std: per channel, in units of the full brightness 255.
        bgr: whether the network takes blue, green, red; mean and std are in its order.
    """

    images: Images
    labels: Tensor
    mean: Tensor
    std: Tensor
    bgr: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def image_size(self) -> int:
        return self.images.shape[2]

    def steps(self, batch_size: int) -> int:
        """Batches in an epoch, incomplete ones left out."""
        return len(self) // min(batch_size, len(self))

    def subset(self, indices: Tensor) -> Split:
        """These images alone, normalised as before."""
        return replace(self, images=self.images.subset(indices), labels=self.labels[indices])

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
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of (float32 images (n, C, H, W) normalised, int64 labels (n,)).

        With several processes `batch_size` is that of all of them together and process `rank` of `world` gets
        every world-th image of each batch: order, flips and crops do not depend on the number of processes.

        Args:
            shuffle_seed: None for the order of the data set; else each `epoch` has its own order.
            drop_last: leave out a last batch with fewer than `batch_size` images, unless it is the only one.
        """
        if batch_size < world:
            raise ValueError(f"batches: batch_size {batch_size} is less than 1 for each of {world} processes")
        seed = shuffle_seed or 0
        flips = augment.flips(len(self), seed, epoch)

        def batch(number: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
            draw = augment.draw(flips[chosen], generator(seed, epoch, number))
            mine = chosen[rank::world]
            images = self.images.take(mine)
            if augment != NO_AUGMENT:
                images = augment(images, draw[rank::world])
            return self.normalise(images), self.labels[mine]

        made = starmap(batch, enumerate(in_batches(len(self), batch_size, shuffle_seed, epoch, drop_last)))
        return made if isinstance(self.images, TensorImages) else one_ahead(made)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> float32 as the network takes it."""
        return normalise(images, self.mean, self.std, self.bgr)


@dataclass(frozen=True)
class Data:
    """A training and a test split of the same classes, channels and image size.

    Without classes the images have no labels: what a network answers to them is compared with what another does.

    Args:
        name: what the data set is called.
        classes: names of the classes, by label; none where there are no labels.
        skipped: names of the broken images that were left out.
        notes: what else was left out and which split of the source serves for what, one line each.
        val: images that the source sets apart from both splits, if it does: for choices made after the training.
        fit: how the images became squares; None where they were.
        prepared_for: the network whose preprocessing this is; "" where the training images' own statistics normalise.
    """

    name: str
    train: Split
    test: Split
    classes: list[str]
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    val: Split | None = None
    fit: Crop | None = None
    prepared_for: str = ""

    items = "images"
    """What they are called in sentences."""

    @property
    def num_classes(self) -> int:
        """0 where there are no labels."""
        return len(self.classes)

    @property
    def channels(self) -> int:
        return self.train.channels

    @property
    def image_size(self) -> int:
        return self.train.image_size

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of one image, (C, H, W)."""
        return self.channels, self.image_size, self.image_size

    @property
    def preprocessing(self) -> Preprocessing:
        """How the images become what the network is given."""
        numbers = (tuple(self.mean.tolist()), tuple(self.std.tolist()))
        return Preprocessing(self.fit, *numbers, self.train.bgr, self.prepared_for)

    @property
    def mean(self) -> Tensor:
        return self.train.mean

    @property
    def std(self) -> Tensor:
        return self.train.std

    def calibration(self, n: int, seed: int = 0) -> Tensor:
        """`n` different training images, normalised, without labels: float32 (n, C, H, W)."""
        if not 1 <= n <= len(self.train):
            raise ValueError(f"calibration: n must be from 1 to {len(self.train)} training images but is {n}")
        chosen = torch.randperm(len(self.train), generator=generator(seed))[:n]
        return self.train.normalise(self.train.images.take(chosen))

    def read_images(self, paths: Sequence[str | Path]) -> Tensor:
        """Image files brought to the shape and normalisation of this data set: float32 (N, C, H, W)."""
        fit = self.fit or Crop(self.image_size, self.image_size)
        return self.train.normalise(read_images(paths, self.channels, fit))


def load(
    source: str | Path,
    *,
    image_size: int | None = None,
    preprocessing: Preprocessing | None = None,
    labelled: bool | None = None,
    skip_broken: bool = False,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Data:
    """Load a data set.

    Args:
        source: `digits` (in scikit-learn, no network); an image folder with one subfolder a class, or without classes,
            or with `train/` and `test/` or `val/` (and such names, in any case) of that form; `*.parquet` files or a
            folder of them, with the columns image and label; a folder of IDX files (MNIST); or a Hugging Face data set
            name.
            Where there are all three splits, `val/` is kept apart from both as `Data.val`. Images are what Pillow
            opens; what else is in an image folder is counted in `Data.notes`.
        image_size: bring all images to squares of this side (short side resized, centre cropped).
        preprocessing: what a network that was trained elsewhere wants of images; what it leaves open, and everything
            without it, is as the data set has it: square images as they are, normalised by the training images' mean
            and deviation.
        labelled: whether the images have classes; None to find out: a folder of images without subfolders has none.
            False leaves the classes out where there are some.
        skip_broken: leave broken images out and list them in `Data.skipped`, instead of an error.
        test_fraction: share of each class that becomes the test split where the source has none.
        seed: of that choice.

    Raises:
        FileNotFoundError: nothing of that name.
        ValueError: no images, no labels, one class, a broken image, different sizes without `image_size`.
        ModuleNotFoundError: the extra `sepconv[data]` is needed.

    Example:
        >>> data = load("digits")
        >>> len(data.train), len(data.test), data.input_shape, data.num_classes
        (1438, 359, (1, 8, 8), 10)
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"load: image_size must be at least 1 pixel but is {image_size}")
    if not 0 < test_fraction < 1:
        raise ValueError(f"load: test_fraction must lie between 0 and 1 but is {test_fraction}")
    wanted = preprocessing or Preprocessing()
    if image_size is not None:
        wanted = replace(wanted, fit=Crop(image_size, image_size))
    found = read_source(source, labelled)
    if len(found.classes) == 1:
        raise ValueError(f"load: {source} has only one class ({', '.join(found.classes)}); two are the least")
    parts = [part for part in (found.train, found.test, found.val) if part is not None]
    parts, skipped = uniform(parts, wanted, skip_broken, str(source))
    empty = [name for i, name in enumerate(found.classes) if not (parts[0].labels == i).any()]
    if empty:
        raise ValueError(f"load: {source} has no training image of the class {empty[0]}")
    if found.test is None:
        parts = [parts[0].subset(chosen) for chosen in divided(parts[0].labels, test_fraction, seed)]
    train, test, *val = parts
    if not len(test.labels):
        what = "one image of each class" if len(found.classes) > 1 else "a single image"
        raise ValueError(f"load: {source} has {what}; two are the least, one for testing")
    missing = [name for i, name in enumerate(found.classes) if not (test.labels == i).any()]
    if missing:
        names = ", ".join(missing[:5])
        warnings.warn(f"load: no test image of {len(missing)} classes: {names}", stacklevel=2)
    numbers = _numbers(wanted, train.images)
    trains, tests, *rest = (Split(part.images, part.labels, *numbers, wanted.bgr) for part in (train, test, *val))
    held = rest[0] if rest else None
    source = wanted.source if wanted.mean else ""
    return Data(found.name, trains, tests, found.classes, skipped, found.notes, held, wanted.fit, source)


def _numbers(wanted: Preprocessing, images: Images) -> tuple[Tensor, Tensor]:
    """Mean and deviation, of the network's own images where it says so, else of the training images."""
    if wanted.mean:
        return torch.tensor(wanted.mean), torch.tensor(wanted.std)
    mean, std = _statistics(images)
    return (mean.flip(0), std.flip(0)) if wanted.bgr else (mean, std)


def in_batches(count: int, batch_size: int, shuffle_seed: int | None, epoch: int, drop_last: bool) -> Iterator[Tensor]:
    """Which of `count` samples are in each batch of an epoch."""
    order = torch.arange(count)
    if shuffle_seed is not None:
        order = torch.randperm(count, generator=generator(shuffle_seed, epoch))
    stop = count - count % batch_size if drop_last and count > batch_size else count
    return iter(order[:stop].split(batch_size) if stop else ())


def divided(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Which samples are for training and which for testing: `fraction` of each class, at least one of two or more."""
    random = generator(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        chosen[members[torch.randperm(len(members), generator=random)[:count]]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def _statistics(images: Images) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel in units of full brightness; a constant channel has deviation 1."""
    n, channels = images.shape[:2]
    if not isinstance(images, TensorImages) and n > STATISTICS_IMAGES:
        sample = torch.randperm(n, generator=generator(0))[:STATISTICS_IMAGES]
    else:
        sample = torch.arange(n)
    total, squares, count = torch.zeros(channels).double(), torch.zeros(channels).double(), 0
    for chosen in sample.split(500):
        pixels = images.take(chosen).double().div_(255).transpose(0, 1).flatten(1)
        total += pixels.sum(1)
        squares += pixels.square().sum(1)
        count += pixels.shape[1]
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0)
    std = torch.where(variance > 1e-8, variance.sqrt(), 1.0)
    return mean.float(), std.float()
