"""Loaders that never end, or say how long they are, and what is no loader at all."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import sepconv
from sepconv.convert import images
from sepconv.convert.images import CalibrationImages
from sepconv.data import LoaderSplit, samples
from sepconv.train import Recipe


class Endless(IterableDataset[Any]):
    """Batches without end, with or without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(lambda: (torch.rand(2, 1, 8, 8), torch.tensor([0, 1])), None)


class Bounded(Endless):
    def __len__(self) -> int:
        return 3


def endless_loader() -> DataLoader[Any]:
    return DataLoader(Endless(), batch_size=None)


NETWORK = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()


class TestEndlessLoaders:
    def test_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(samples, "MOST_BATCHES", 20)
        message = r"no length and gives more than 20 batches.*sepconv\.data\.LoaderSplit\(loader, N\)"
        for source in (endless_loader(), Endless()):
            with pytest.raises(ValueError, match=message):
                sepconv.train.evaluate(NETWORK, source)
            with pytest.raises(ValueError, match=message):
                sepconv.train.train(NETWORK, source, Recipe(epochs=1))
            with pytest.raises(ValueError, match=message):
                sepconv.train.train(NETWORK, [torch.rand(2, 1, 8, 8)], Recipe(epochs=1), val=source, teacher=NETWORK)

    @pytest.mark.parametrize(("name", "most"), [("MOST_BATCHES", 20), ("MOST_BYTES", 5000)])
    def test_that_cannot_begin_again_do_not_fill_the_memory(
        self, monkeypatch: pytest.MonkeyPatch, name: str, most: int
    ) -> None:
        monkeypatch.setattr(samples, name, most)
        with pytest.raises(ValueError, match=r"only once, and \d+ of them take .* list\(itertools\.islice\(batches, N"):
            sepconv.train.evaluate(NETWORK, iter(endless_loader()))

    def test_are_taken_as_far_as_is_said(self) -> None:
        model = copy.deepcopy(NETWORK)
        for source in (LoaderSplit(endless_loader(), 3), Bounded()):
            assert sepconv.train.evaluate(model, source).confusion.sum() == 6
            history = sepconv.train.train(model, source, Recipe(epochs=2, lr=1e-3))
            assert [row["step"] for row in history.records] == [3, 6]
        assert sepconv.convert(NETWORK, LoaderSplit(endless_loader(), 3), 0.9, sweeps=1)[1].images == 6

    @pytest.mark.parametrize(("name", "most", "taken"), [("MOST_SAMPLES", 5, 6), ("MOST_BYTES", 2000, 8)])
    def test_for_calibration_are_taken_up_to_a_limit(
        self, monkeypatch: pytest.MonkeyPatch, name: str, most: int, taken: int
    ) -> None:
        monkeypatch.setattr(images, name, most)
        with pytest.warns(UserWarning, match=rf"convert: calibration has more than the {taken} samples"):
            assert sepconv.convert(NETWORK, endless_loader(), 0.9, sweeps=1)[1].images == taken
        with pytest.warns(UserWarning, match=rf"quantize: calibration has more than the {taken} samples"):
            assert sepconv.quantize(NETWORK, endless_loader(), force=True)[1].images == taken
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert CalibrationImages.of(NETWORK, [torch.rand(2, 1, 8, 8)] * 9).count == 18

    def test_nor_is_a_data_set_one(self) -> None:
        dataset = TensorDataset(torch.rand(4, 1, 8, 8), torch.zeros(4).long())
        message = r"TensorDataset is a data set of single samples: give torch\.utils\.data\.DataLoader\("
        for call in (sepconv.convert, sepconv.quantize, sepconv.train.evaluate):
            with pytest.raises(TypeError, match=message):
                call(NETWORK, dataset)
