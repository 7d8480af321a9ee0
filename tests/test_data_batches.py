"""Batches: order, share of each process, flips and crops; calibration images."""

from __future__ import annotations

import pytest
import torch

from sepconv.data import Augment, Data, Split, load
from sepconv.data.augment import generator
from sepconv.data.images import TensorImages


@pytest.fixture(scope="module")
def digits() -> Data:
    return load("digits")


def test_calibration_gives_different_training_images(digits: Data) -> None:
    images = digits.calibration(64, seed=3)
    assert images.shape == (64, 1, 8, 8)
    assert torch.equal(images, digits.calibration(64, seed=3))
    assert not torch.equal(images, digits.calibration(64, seed=4))
    train = {bytes(row) for row in digits.train.images.take(torch.arange(1438)).view(-1, 64).numpy()}
    pixels = ((images * digits.std + digits.mean) * 255).round().to(torch.uint8).view(-1, 64)
    rows = [bytes(row) for row in pixels.numpy()]
    assert set(rows) <= train
    assert len(set(rows)) == 64
    with pytest.raises(ValueError, match="n must be from 1 to 1438 training images but is 1439"):
        digits.calibration(1439)


def test_every_epoch_has_its_own_order_and_every_image_once(digits: Data) -> None:
    def labels(**settings: int) -> torch.Tensor:
        return torch.cat([y for _, y in digits.train.batches(100, **settings)])

    first, second = labels(shuffle_seed=0, epoch=0), labels(shuffle_seed=0, epoch=1)
    assert torch.equal(first, labels(shuffle_seed=0, epoch=0))
    assert not torch.equal(first, second)
    assert not torch.equal(first, labels(shuffle_seed=1, epoch=0))
    assert torch.equal(first.bincount(), digits.train.labels.bincount())
    assert torch.equal(labels(), digits.train.labels)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_batches_do_not_depend_on_the_number_of_processes(digits: Data, world: int) -> None:
    settings = dict(shuffle_seed=4, epoch=2, augment=Augment(flip=True, crop_padding=2, cutout=3), world=world)
    shares = [digits.test.batches(50, rank=rank, **settings) for rank in range(world)]
    whole = digits.test.batches(50, **(settings | {"world": 1}))
    count = 0
    for (images, labels), *parts in zip(whole, *shares, strict=True):
        for rank, (x, y) in enumerate(parts):
            assert torch.equal(x, images[rank::world])
            assert torch.equal(y, labels[rank::world])
            count += len(y)
    assert count == len(digits.test)
    with pytest.raises(ValueError, match="batch_size 2 is less than 1 for each of 3 processes"):
        digits.test.batches(2, world=3)


def test_drop_last_keeps_an_only_batch(digits: Data) -> None:
    assert [len(y) for _, y in digits.test.batches(100, drop_last=True)] == [100, 100, 100]
    assert [len(y) for _, y in digits.test.batches(100)] == [100, 100, 100, 59]
    assert [len(y) for _, y in digits.test.batches(1000, drop_last=True)] == [359]


def test_augment_moves_and_mirrors_and_pads_with_zeros() -> None:
    images = torch.randint(1, 256, (9, 2, 5, 5), dtype=torch.uint8)
    centre = torch.tensor([[2, 2, 0, 0, 0]]).expand(9, 5)
    augment = Augment(flip=True, crop_padding=2)
    assert torch.equal(augment(images, centre), images)
    assert torch.equal(augment(images, torch.tensor([[2, 2, 1, 0, 0]]).expand(9, 5)), images.flip(3))
    moved = augment(images, torch.tensor([[0, 3, 0, 0, 0]]).expand(9, 5))
    assert (moved[:, :, :2] == 0).all()
    assert (moved[:, :, :, -1] == 0).all()
    assert torch.equal(moved[:, :, 2:, :-1], images[:, :, :3, 1:])


def test_augment_draws_every_offset() -> None:
    flips = torch.tensor([0, 1]).repeat(1500)
    draw = Augment(flip=True, crop_padding=1).draw(flips, generator(0))
    assert draw[:, 0].bincount(minlength=3).min() > 900
    assert draw[:, 1].bincount(minlength=3).min() > 900
    assert torch.equal(draw[:, 2], flips)
    assert Augment().draw(torch.zeros(5, dtype=torch.int64), generator(0)).eq(0).all()
    with pytest.raises(ValueError, match="Augment: crop_padding must be at least 0 but is -1"):
        Augment(crop_padding=-1)
    with pytest.raises(ValueError, match="Augment: cutout must be at least 0 but is -2"):
        Augment(cutout=-2)


def test_two_epochs_show_both_forms_of_every_image() -> None:
    augment = Augment(flip=True)
    first, second, third = (augment.flips(3000, seed=1, epoch=epoch) for epoch in range(3))
    assert 1400 < first.sum() < 1600
    assert torch.equal(second, 1 - first)
    assert torch.equal(third, first)
    assert not torch.equal(augment.flips(3000, seed=2, epoch=0), first)
    assert Augment().flips(7, seed=1, epoch=1).eq(0).all()

    pixels = torch.tensor([10, 20], dtype=torch.uint8).expand(8, 1, 1, 2)
    split = Split(TensorImages(pixels), torch.arange(8), torch.zeros(1), torch.ones(1))

    def left(epoch: int) -> torch.Tensor:
        """The left pixel of each image, in the order of the data set."""
        (images, labels), *rest = split.batches(8, shuffle_seed=1, epoch=epoch, augment=augment)
        assert not rest
        return images[labels.argsort(), 0, 0, 0] * 255

    assert torch.equal(left(0) + left(1), torch.full((8,), 30.0))
    assert sorted(left(0).tolist()) != [10.0] * 8


@pytest.mark.parametrize(
    ("cutout", "row", "column", "rows", "columns"),
    [(3, 2, 3, range(1, 4), range(2, 5)), (2, 0, 6, range(1), range(5, 7)), (4, 4, 0, range(2, 5), range(2))],
)
def test_augment_cuts_out_one_square(cutout: int, row: int, column: int, rows: range, columns: range) -> None:
    images = torch.randint(1, 256, (3, 2, 5, 7), dtype=torch.uint8)
    # Only the remainder of a place counts, so that the draw need not know the image's size.
    draw = torch.tensor([[0, 0, 0, row + 5 * 11, column + 7 * 13]]).expand(3, 5)
    expected = images.clone()
    expected[:, :, rows.start : rows.stop, columns.start : columns.stop] = 0
    assert torch.equal(Augment(cutout=cutout)(images, draw), expected)


def test_augment_draws_squares_everywhere() -> None:
    flips = torch.zeros(4000, dtype=torch.int64)
    draw = Augment(cutout=3).draw(flips, generator(0))
    for place in (draw[:, 3] % 8, draw[:, 4] % 8):
        assert place.bincount(minlength=8).min() > 400
    assert torch.equal(draw[:, :3], Augment().draw(flips, generator(0))[:, :3])
