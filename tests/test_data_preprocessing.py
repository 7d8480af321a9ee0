"""How images become what a network takes: torchvision's rules, Pillow's pixels, channels in the network's order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sepconv.data import Crop, Preprocessing, load
from sepconv.data.preprocessing import normalise

PILLOW = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def picture(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Waves of several lengths with some noise."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    waves = [127 + 60 * np.sin(x / (3 + c) + y / 7) + 40 * np.cos(y / (2 + c)) for c in range(channels)]
    return (np.stack(waves, -1) + random.normal(0, 5, (height, width, channels))).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize(("height", "width"), [(97, 131), (131, 97), (31, 37), (64, 64)])
def test_resized_and_cropped_as_torchvision_has_it(interpolation: str, height: int, width: int) -> None:
    """The short side by Pillow, the long one cut to whole pixels, the centre by rounding half to even."""
    pixels = picture(height, width)
    short = min(height, width)
    size = (int(67 * width / short), int(67 * height / short))
    resized = np.array(Image.fromarray(pixels).resize(size, PILLOW[interpolation]))
    top, left = (round((side - 59) / 2) for side in resized.shape[:2])
    expected = torch.from_numpy(resized[top : top + 59, left : left + 59]).permute(2, 0, 1)
    found = Crop(59, 67, interpolation)(torch.from_numpy(pixels).permute(2, 0, 1))
    assert found.shape == (3, 59, 59)
    apart = (found.int() - expected.int()).abs()
    if interpolation == "nearest":
        assert (apart > 0).float().mean() < 0.05  # where two pixels are equally near
    else:  # Pillow rounds its weights to whole numbers and the result of each direction to 8 bits
        assert apart.max() <= 2


def test_squashed_images_keep_all_their_pixels() -> None:
    pixels = torch.from_numpy(picture(40, 80)).permute(2, 0, 1)
    expected = np.array(Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((20, 20), PILLOW["bilinear"]))
    found = Crop(20, 20, squash=True)(pixels)
    assert (found.int() - torch.from_numpy(expected).permute(2, 0, 1).int()).abs().max() <= 2


def test_an_image_of_the_right_size_is_left_alone() -> None:
    pixels = torch.from_numpy(picture(32, 32)).permute(2, 0, 1)
    assert torch.equal(Crop(32, 32)(pixels), pixels)
    assert torch.equal(Crop(28, 32)(pixels), pixels[:, 2:30, 2:30])


def test_normalised_in_the_order_of_the_networks_channels() -> None:
    images = torch.tensor([10, 20, 40], dtype=torch.uint8).view(1, 3, 1, 1)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.25, 0.125])
    found = normalise(images, mean, std, bgr=True).flatten()
    expected = [(40 / 255 - 0.1) / 0.5, (20 / 255 - 0.2) / 0.25, (10 / 255 - 0.3) / 0.125]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def folder(path: Path, channels: int) -> Path:
    for label in ("a", "b"):
        (path / label).mkdir(parents=True)
        for i in range(4):
            pixels = picture(40 + i, 50, channels)
            Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(path / label / f"{i}.png")
    return path


WANTED = Preprocessing(Crop(24, 28), (0.4, 0.5, 0.6), (0.2, 0.3, 0.1), source="somebody")


def test_a_data_set_is_prepared_as_the_network_wants(tmp_path: Path) -> None:
    data = load(folder(tmp_path / "images", 3), preprocessing=WANTED)
    assert data.preprocessing.as_dict() == {
        "fit": {"size": 24, "resize": 28, "interpolation": "bilinear", "squash": False},
        "mean": pytest.approx([0.4, 0.5, 0.6]),
        "std": pytest.approx([0.2, 0.3, 0.1]),
        "bgr": False,
        "source": "somebody",
    }
    assert data.input_shape == (3, 24, 24)
    image = data.train.images.take(torch.tensor([0]))
    images = next(data.train.batches(1))[0]
    expected = (image / 255 - torch.tensor(WANTED.mean)[:, None, None]) / torch.tensor(WANTED.std)[:, None, None]
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)


def test_grey_images_for_a_network_of_colours_and_the_other_way(tmp_path: Path) -> None:
    grey = load(folder(tmp_path / "grey", 1), preprocessing=WANTED)
    image = grey.train.images.take(torch.tensor([0]))[0]
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])
    one = Preprocessing(Crop(24, 28), (0.5,), (0.25,))
    colours = folder(tmp_path / "colours", 3)
    found = load(colours, preprocessing=one)
    assert found.input_shape == (1, 24, 24)
    luminance = Image.open(colours / "a" / "0.png").convert("L")
    whole = torch.from_numpy(np.array(luminance))[None]
    kept = {tuple(Crop(24, 28)(whole).flatten().tolist())}
    seen = [*found.train.images.take(torch.arange(len(found.train))), *found.test.images.take(torch.arange(2))]
    nearest = min((image.int() - torch.tensor([*kept]).view(1, 24, 24).int()).abs().max() for image in seen)
    assert nearest <= 1  # grey before or after resizing: a rounding apart


def test_what_the_network_leaves_open_is_the_data_sets(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", 3)
    plain, fitted = (
        load(images, image_size=24),
        load(images, preprocessing=Preprocessing(Crop(24, 24), source="x")),
    )
    assert torch.equal(plain.mean, fitted.mean)
    assert (plain.prepared_for, fitted.prepared_for) == ("", "")
    swapped = load(images, image_size=24, preprocessing=Preprocessing(bgr=True))
    assert torch.equal(swapped.mean, plain.mean.flip(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Crop(10, 9), "size and resize must be pixels .* but are 10 and 9"),
        (lambda: Crop(0, 9), "but are 0 and 9"),
        (lambda: Crop(10, 10**6), "but are 10 and 1000000"),
        (
            lambda: Crop(10, 10, "lanczos"),
            "interpolation must be one of nearest, bilinear, bicubic but is 'lanczos'",
        ),
        (lambda: Preprocessing(None, (0.5,), ()), "1 or 3 numbers each, .* but have 1 and 0"),
        (lambda: Preprocessing(None, (0.5, 0.5), (1.0, 1.0)), "but have 2 and 2"),
        (lambda: Preprocessing(None, (0.5,), (0.0,)), "std above 0"),
        (lambda: Preprocessing(None, (float("nan"),), (1.0,)), "must be finite"),
        (lambda: Preprocessing(None, (0.5,), (1.0,), bgr=True), "bgr is for networks of three channels"),
    ],
)
def test_what_no_image_can_be_prepared_by(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
