"""Data without labels: files of arrays, and the batches of loaders."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from sepconv.data import Augment, LoaderSplit, load_samples
from sepconv.data.samples import is_sample_folder, read_sample
from sepconv.leaves import Inputs


def write_arrays(folder: Path, count: int, shape: tuple[int, ...] = (1, 5)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        np.save(folder / f"{i}.npy", np.full(shape, i, dtype=np.float64))


def test_an_array_is_the_only_input(tmp_path: Path) -> None:
    write_arrays(tmp_path, 10)
    (tmp_path / "notes.txt").touch()
    assert is_sample_folder(tmp_path)
    data = load_samples(tmp_path)
    assert (len(data.train), len(data.test), data.val) == (8, 2, None)
    assert (data.classes, data.input_shape) == ([], (1, 5))
    assert data.notes == (f"{tmp_path}: 10 samples, 1 ignored: .txt 1",)
    found = data.calibration(8)
    assert found.tensor is not None
    assert found.tensor.dtype == torch.float32
    values = set(found.tensor[:, 0, 0].int().tolist())
    assert len(values) == 8
    test = [batch.tensor[0, 0, 0].item() for batch, _ in data.test.batches(1) if batch.tensor is not None]
    assert values | set(map(int, test)) == set(range(10))


def test_one_file_of_another_kind_decides_nothing(tmp_path: Path) -> None:
    assert not is_sample_folder(tmp_path)
    write_arrays(tmp_path / "samples", 11)
    (tmp_path / "samples" / "preview.png").touch()
    assert is_sample_folder(tmp_path / "samples")
    for i in range(12):
        (tmp_path / f"{i}.jpg").touch()
    with pytest.raises(ValueError, match=r"holds 13 images and 11 samples \(\.npy or \.safetensors\): give the folder"):
        is_sample_folder(tmp_path)
    for i in range(1, 11):
        (tmp_path / "samples" / f"{i}.npy").unlink()
    (tmp_path / "samples" / "0.npy").rename(tmp_path / "model.safetensors")
    assert not is_sample_folder(tmp_path)


def test_epochs_have_their_own_order_and_processes_share_it(tmp_path: Path) -> None:
    write_arrays(tmp_path / "train", 9)
    write_arrays(tmp_path / "test", 2)
    data = load_samples(tmp_path)

    def order(**arguments: Any) -> list[list[int]]:
        batches = data.train.batches(4, shuffle_seed=3, drop_last=True, **arguments)
        return [inputs.tensors[0][:, 0, 0].int().tolist() for inputs, _ in batches]

    assert data.train.steps(4) == 2
    assert order() == order()
    assert order() != order(epoch=1)
    assert [len(batch) for batch in order()] == [4, 4]
    shares = [order(rank=rank, world=2) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in order()]
    with pytest.raises(ValueError, match="flips, crops and cutout are of images"):
        data.train.batches(4, augment=Augment(flip=True))


def test_several_tensors_are_arguments_by_name(tmp_path: Path) -> None:
    for i in range(3):
        both = {"left": torch.ones(2, 3) * i, "ids": torch.arange(4), "labels": torch.tensor(1)}
        save_file(both, tmp_path / f"{i}.safetensors")
    data = load_samples(tmp_path)
    found = data.calibration(2)
    assert data.input_shape == ()
    assert {name: (tuple(t.shape), t.dtype) for name, t in found.kwargs.items()} == {
        "left": ((2, 2, 3), torch.float32),
        "ids": ((2, 4), torch.int64),
    }
    save_file({"x": torch.ones(2), "target": torch.ones(1)}, tmp_path / "only.safetensors")
    assert read_sample(tmp_path / "only.safetensors").args[0].shape == (1, 2)


def test_unusable_samples(tmp_path: Path) -> None:
    write_arrays(tmp_path, 1)
    with pytest.raises(ValueError, match=r"has no sample for test: two files \(\.npy or \.safetensors\)"):
        load_samples(tmp_path)
    write_arrays(tmp_path, 3)
    np.save(tmp_path / "other.npy", np.zeros((1, 6)))
    with pytest.raises(ValueError, match=r"is \(\(1, 1, [56]\)\) but .* is \(\(1, 1, [56]\)\): all samples must have"):
        load_samples(tmp_path)
    for content in (b"", b"rubbish", pickle.dumps([1])):
        (tmp_path / "other.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"load_samples: .*other\.npy is no sample \("):
            load_samples(tmp_path)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def test_nothing_in_a_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "a.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy is no sample \(Object arrays cannot be loaded"):
        read_sample(tmp_path / "a.npy")
    assert not Path("exploded").exists()


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(6.0))


def test_loaders_give_their_own_batches() -> None:
    x, y = torch.arange(10.0)[:, None], torch.arange(10) % 2
    split = LoaderSplit.of(DataLoader(TensorDataset(x, y), batch_size=4))
    assert (len(split), split.count, split.steps(99)) == (12, 3, 3)
    found = list(split.batches(99))
    assert [labels.tolist() for _, labels in found if labels is not None] == [[0, 1, 0, 1], [0, 1, 0, 1], [0, 1]]
    torch.testing.assert_close(split.first(6).args[0], x[:6])
    torch.testing.assert_close(split.first(99).args[0], x)
    once = LoaderSplit.of(batch for batch in (x, x))
    assert [len(list(once.batches(1))), len(list(once.batches(1)))] == [2, 2]
    assert LoaderSplit.of(DataLoader(Stream(), batch_size=2)).count == 3
    assert len(LoaderSplit.of(Inputs((x,)))) == 10
    with pytest.raises(ValueError, match="the loader gives no batch"):
        LoaderSplit.of([])
