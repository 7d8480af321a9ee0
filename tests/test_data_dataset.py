"""Data sets: every source, what is refused with which line, batches that do not depend on the process count."""

from __future__ import annotations

import gzip
import io
import struct
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from sepconv.data import Augment, BrokenImage, Data, load, uniform
from sepconv.data.images import EncodedImages, TensorImages
from sepconv.data.preprocessing import Crop


def png(value: int, size: tuple[int, int] = (6, 6), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, value).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, classes: dict[str, list[bytes]]) -> Path:
    for name, images in classes.items():
        (folder / name).mkdir(parents=True)
        for i, content in enumerate(images):
            (folder / name / f"{i:02d}.png").write_bytes(content)
    return folder


def write_idx(path: Path, array: np.ndarray, magic: int | None = None) -> None:
    magic = 0x0800 + array.ndim if magic is None else magic
    content = struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf-cache"))


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    """Two classes of five grey-valued colour images: roses are dark, tulips bright."""
    return write_images(
        tmp_path / "flowers", {"rose": [png(v) for v in range(5)], "tulip": [png(200 + v) for v in range(5)]}
    )


@pytest.fixture(scope="module")
def digits() -> Data:
    return load("digits")


def test_digits_are_all_there_stratified_and_normalised(digits: Data) -> None:
    assert (len(digits.train), len(digits.test)) == (1438, 359)
    assert (digits.name, digits.input_shape, digits.num_classes) == ("digits", (1, 8, 8), 10)
    share = torch.bincount(digits.test.labels) / torch.bincount(torch.cat([digits.train.labels, digits.test.labels]))
    assert (share - 0.2).abs().max() < 0.01
    images = torch.cat([x for x, _ in digits.train.batches(100)])
    assert images.dtype == torch.float32
    torch.testing.assert_close(images.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std(correction=0), torch.tensor(1.0), atol=1e-5, rtol=0)


def test_split_is_fixed_by_its_seed_and_never_overlaps() -> None:
    first, again, other = load("digits"), load("digits"), load("digits", seed=1)
    assert torch.equal(first.test.images.take(torch.arange(9)), again.test.images.take(torch.arange(9)))
    assert not torch.equal(first.test.labels[:50], other.test.labels[:50])
    both = torch.cat([s.images.take(torch.arange(len(s))) for s in (first.train, first.test)])
    from sklearn.datasets import load_digits

    expected = np.rint(load_digits().images * (255 / 16)).astype(np.uint8).reshape(-1, 64)
    assert sorted(map(bytes, both.reshape(-1, 64).numpy())) == sorted(map(bytes, expected))


def test_image_folder_becomes_classes_and_its_own_split(flowers: Path) -> None:
    data = load(flowers)
    assert (data.name, data.classes, data.input_shape) == ("flowers", ["rose", "tulip"], (3, 6, 6))
    assert (len(data.train), len(data.test)) == (8, 2)
    values = data.train.images.take(torch.arange(8))[:, 0, 0, 0]
    assert torch.equal(values >= 200, data.train.labels == 1)
    assert isinstance(data.train.images, TensorImages)


@pytest.mark.parametrize("test_name", ["test", "val", "validation"])
def test_image_folder_with_splits(tmp_path: Path, test_name: str) -> None:
    write_images(tmp_path / "train", {"a": [png(1), png(2)], "b": [png(3)]})
    write_images(tmp_path / test_name, {"b": [png(9)]})
    with pytest.warns(UserWarning, match="no test image of 1 classes: a"):
        data = load(tmp_path)
    assert (len(data.train), data.test.labels.tolist()) == (3, [1])


def test_class_with_one_image_keeps_it_for_training(tmp_path: Path) -> None:
    write_images(tmp_path, {"many": [png(v) for v in range(10)], "single": [png(99)]})
    with pytest.warns(UserWarning, match="no test image of 1 classes: single"):
        data = load(tmp_path)
    assert 1 in data.train.labels


def test_two_hundred_classes_of_one_pixel(tmp_path: Path) -> None:
    data = load(write_images(tmp_path, {f"{i:03d}": [png(i, (1, 1))] * 2 for i in range(200)}))
    assert (data.num_classes, data.input_shape, len(data.train), len(data.test)) == (200, (3, 1, 1), 200, 200)
    assert torch.equal(data.test.images.take(torch.arange(200))[:, 0, 0, 0].long(), data.test.labels)


def test_grey_stays_grey_only_if_all_are(tmp_path: Path) -> None:
    modes = ["1", "L", "LA"]
    grey = write_images(tmp_path / "grey", {"a": [png(255, mode=m) for m in modes], "b": [png(9, mode="L")] * 2})
    assert load(grey).channels == 1
    mixed = write_images(
        tmp_path / "mixed", {"a": [png(255, mode=m) for m in [*modes, "P", "RGBA", "RGB"]], "b": [png(255)] * 2}
    )
    data = load(mixed)
    assert data.channels == 3
    for split in (data.train, data.test):
        assert (split.images.take(torch.arange(len(split))) == 255).all()


def test_sixteen_bit_grey_keeps_its_upper_byte(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": [], "b": [png(0, mode="L")] * 2})
    for i in range(2):
        Image.fromarray(np.full((6, 6), 128 * 257, np.uint16)).save(tmp_path / "a" / f"{i}.png")
    data = load(tmp_path)
    assert data.train.images.take((data.train.labels == 0).nonzero()[0]).unique().tolist() == [128]


def test_upright_as_the_camera_says(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter turn
    write_images(tmp_path, {"a": [], "b": [png(0, (4, 4))] * 2})
    for i in range(2):
        Image.fromarray(pixels).save(tmp_path / "a" / f"{i}.png", exif=exif)
    data = load(tmp_path)
    image = data.train.images.take((data.train.labels == 0).nonzero()[0])[0, 0]
    assert (image[:, -1] == 255).all()
    assert (image[:, :-1] == 0).all()


def test_image_size_resizes_the_short_side_and_crops_the_centre(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": [png(7, (40, 20))] * 2, "b": [png(8, (10, 30)), png(8, (5, 5))]})
    data = load(tmp_path, image_size=10)
    assert data.input_shape == (3, 10, 10)
    assert set(data.train.images.take(torch.arange(2)).unique().tolist()) == {7, 8}
    stripes = torch.zeros(1, 20, 40, dtype=torch.uint8)
    stripes[..., 10:30] = 200
    assert (Crop(10, 10)(stripes)[..., 2:-2] == 200).all()
    assert load("digits", image_size=16).input_shape == (1, 16, 16)


def test_resizing_down_is_antialiased() -> None:
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255
    small = Crop(8, 8)(board.to(torch.uint8)[None])
    assert (small.int() - 128).abs().max() <= 3


def test_broken_images_are_named_or_skipped(flowers: Path) -> None:
    (flowers / "rose" / "00.png").write_bytes(b"no image")
    whole = (flowers / "tulip" / "03.png").read_bytes()
    (flowers / "tulip" / "03.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BrokenImage, match=r"broken image \S*rose/00.png \(not an image.*skip_broken"):
        load(flowers)
    data = load(flowers, skip_broken=True)
    assert [Path(name).name for name in data.skipped] == ["00.png", "03.png"]
    assert len(data.train) + len(data.test) == 8


def test_large_sets_are_decoded_when_taken(flowers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = load(flowers, image_size=4)
    monkeypatch.setattr(uniform, "MEMORY_LIMIT", 100)
    lazy = load(flowers, image_size=4)
    assert isinstance(lazy.train.images, EncodedImages)
    assert torch.equal(lazy.mean, small.mean)
    settings = dict(batch_size=3, shuffle_seed=5, augment=Augment(True, 1))
    for (x, y), (x2, y2) in zip(lazy.train.batches(**settings), small.train.batches(**settings), strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
    (flowers / "rose" / "01.png").write_bytes(b"")
    assert len(load(flowers, image_size=4, skip_broken=True).skipped) == 1


def test_large_set_names_an_image_that_breaks_later(flowers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uniform, "MEMORY_LIMIT", 100)
    data = load(flowers)
    for path in flowers.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:45])
    with pytest.raises(BrokenImage, match=r"broken image .*png"):
        list(data.train.batches(4))


def parquet(path: Path, labels: list[int | None], size: int = 5, names: list[str] | None = None) -> None:
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    )
    images = [{"bytes": png(i, (size, size)), "path": None} for i in range(len(labels))]
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(path)


def test_parquet_folder_file_and_pattern(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    parquet(tmp_path / "set" / "train.parquet", [0, 1, 2] * 4, names=["x", "y", "z"])
    parquet(tmp_path / "set" / "test-00000-of-00001.parquet", [2, 1, 0], names=["x", "y", "z"])
    data = load(tmp_path / "set")
    assert (data.name, data.classes, data.input_shape) == ("set", ["x", "y", "z"], (3, 5, 5))
    assert (len(data.train), data.test.labels.tolist()) == (12, [2, 1, 0])
    assert data.train.images.take(torch.arange(12))[:, 0, 0, 0].tolist() == list(range(12))
    single = load(tmp_path / "set" / "train.parquet", test_fraction=0.5)
    assert (len(single.train), len(single.test)) == (6, 6)
    assert len(load(f"{tmp_path}/set/tr*.parquet").test) == 3


def test_parquet_without_class_names_takes_its_values(tmp_path: Path) -> None:
    parquet(tmp_path / "data.parquet", [7, 3] * 4)
    data = load(tmp_path / "data.parquet")
    assert data.classes == ["3", "7"]
    values = data.train.images.take(torch.arange(len(data.train)))[:, 0, 0, 0]
    assert torch.equal(values % 2 == 0, data.train.labels == 1)


def test_hub_name_is_the_same_as_parquet(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [Image.new("L", (3, 3), i) for i in range(6)]
    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=["x", "y"]))
    table = datasets.Dataset.from_dict({"img": images, "label": [0, 1] * 3}, features=features)
    hidden = datasets.Dataset.from_dict({"img": images[:1], "label": [-1]}, features=features)
    found = datasets.DatasetDict(train=table, test=hidden, validation=table)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: found if name == "someone/digits2" else None)
    data = load("someone/digits2")
    assert (data.channels, data.classes, len(data.test)) == (1, ["x", "y"], 6)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folder(tmp_path: Path, suffix: str) -> None:
    images = np.arange(5 * 16).reshape(5, 4, 4)
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte{suffix}", np.array([0, 1, 2, 1, 0]))
    data = load(tmp_path)
    assert (data.input_shape, data.classes, len(data.test)) == ((1, 4, 4), ["0", "1", "2"], 5)
    assert torch.equal(data.train.images.take(torch.arange(5)).flatten(), torch.arange(80, dtype=torch.uint8))
    assert data.train.labels.tolist() == [0, 1, 2, 1, 0]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda p, b: p.write_bytes(b"\0\0\x08\x01" + b[4:]), "should start with 0x00000803"),
        (lambda p, b: p.write_bytes(b[:-1]), "its header promises 96"),
        (lambda p, b: p.write_bytes(b + b"\0"), "its header promises 96"),
        (lambda p, b: p.write_bytes(b"\0"), "should start with"),
        (lambda p, b: write_idx(p, np.zeros((4, 4, 4))), "4 images but .* 5 labels"),
        (lambda p, b: (p.unlink(), p.with_suffix(".gz").write_bytes(gzip.compress(b)[:-9])), "truncated"),
        (lambda p, b: p.with_name("train-labels-idx1-ubyte").unlink(), "no train-labels-idx1-ubyte"),
    ],
    ids=["magic", "short", "long", "header_only", "counts", "gzip", "no_labels"],
)
def test_idx_damage_is_named(tmp_path: Path, edit, message: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    write_idx(path, np.arange(5 * 16).reshape(5, 4, 4))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array([0, 1, 2, 1, 0]))
    edit(path, path.read_bytes())
    if message == "truncated":
        path.with_suffix(".gz").rename(path.with_name(path.name + ".gz"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(tmp_path)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="image_size must be at least 1 pixel but is 0"):
        load("digits", image_size=0)
    with pytest.raises(ValueError, match="test_fraction must lie between 0 and 1 but is 1"):
        load("digits", test_fraction=1)


def test_unusable_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no images in .*one subfolder a class"):
        load(tmp_path)
    (tmp_path / "a.png").write_bytes(png(1))
    with pytest.raises(ValueError, match=r"no labels: .* no subfolders"):
        load(tmp_path, labelled=True)
    with pytest.raises(ValueError, match=r"a single image; two are the least"):
        load(tmp_path)
    write_images(tmp_path, {"rose": [png(1)] * 3})
    with pytest.raises(ValueError, match=r"only one class \(rose\)"):
        load(tmp_path)
    (tmp_path / "tulip").mkdir()
    with pytest.raises(ValueError, match="no training image of the class tulip"):
        load(tmp_path)
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match="no images in"):
        load(tmp_path)
    write_images(tmp_path / "few", {"a": [png(1)], "b": [png(2)]})
    with pytest.raises(ValueError, match=r"one image of each class; two are the least, one for testing"):
        load(tmp_path / "few")


def test_different_sizes_need_image_size(tmp_path: Path) -> None:
    write_images(tmp_path / "mixed", {"a": [png(1, (5, 5))] * 2, "b": [png(1, (4, 4))]})
    with pytest.raises(ValueError, match="2 sizes, most 5x5 pixels: image_size"):
        load(tmp_path / "mixed")
    write_images(tmp_path / "wide", {"a": [png(1, (7, 5))] * 2, "b": [png(1, (7, 5))]})
    with pytest.raises(ValueError, match="images of 7x5 pixels: image_size"):
        load(tmp_path / "wide")


def test_test_class_unknown_to_training(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"a": [png(1)], "b": [png(3)]})
    write_images(tmp_path / "test", {"c": [png(9)]})
    with pytest.raises(ValueError, match="test/c is a class without training images"):
        load(tmp_path)


def test_all_images_broken(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": [b"x"], "b": [b"y"]})
    with pytest.raises(ValueError, match=r"no image in .* can be decoded"):
        load(tmp_path, skip_broken=True)


def test_parquet_mistakes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*missing.parquet"):
        load(tmp_path / "missing.parquet")
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*\*.parquet"):
        load(tmp_path / "*.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1nonsense")
    with pytest.raises(ValueError, match=r"bad.parquet cannot be read as parquet \("):
        load(tmp_path / "bad.parquet")
    datasets.Dataset.from_dict({"image": [1], "score": [2]}).to_parquet(tmp_path / "columns.parquet")
    with pytest.raises(ValueError, match=r"no labels: .* columns image, score but none called label"):
        load(tmp_path / "columns.parquet")
    parquet(tmp_path / "unlabelled.parquet", [0, None, 1, 1])
    with pytest.raises(ValueError, match="row 1: label None is none of the 2 classes"):
        load(tmp_path / "unlabelled.parquet")


def test_unknown_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes.txt is a file but not \*.parquet; known are 'digits'"):
        load(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match="no such file or folder: /nowhere/at/all; known are 'digits'"):
        load("/nowhere/at/all")

    def offline(name: str) -> None:
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(FileNotFoundError, match=r"'digit' is no file .* \(no network\); known are 'digits'"):
        load("digit")


def test_missing_package_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sepconv\[data\]'"):
        load("owner/name")


def test_images_for_prediction_match_the_training_images(flowers: Path) -> None:
    data = load(flowers)
    files = sorted(flowers.rglob("*.png"))
    images = data.read_images(files)
    assert images.shape == (10, 3, 6, 6)
    torch.testing.assert_close((images * data.std[0] + data.mean[0]).mul(255)[-1, 0, 0, 0].item(), 204.0)
    with pytest.raises(FileNotFoundError, match=r"no such file: .*gone.png"):
        data.read_images([flowers / "gone.png"])


def test_constant_images_are_not_divided_by_zero(tmp_path: Path) -> None:
    data = load(write_images(tmp_path, {"a": [png(50)] * 3, "b": [png(50)] * 3}))
    assert data.std.tolist() == [1, 1, 1]
    assert data.calibration(2).isfinite().all()
