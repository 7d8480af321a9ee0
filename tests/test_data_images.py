"""Image files of every kind: which are read, and what brightness their numbers mean."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from test_data_dataset import png, write_images

from sepconv.data import BrokenImage, Crop, load
from sepconv.data.images import decode, open_image, read_images, readable_suffixes


def encoded(image: Image.Image, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def pixels(content: bytes, channels: int = 1) -> torch.Tensor:
    return decode(open_image(content, "x"), "x", channels, None)


def written(name: str) -> bytes:
    """A bright image in the first mode that the format takes."""
    bright = Image.new("RGB", (32, 32), (200, 200, 200))
    for mode in ("RGB", "L", "P", "1", "F"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            return encoded(bright.convert(mode), name)
    raise AssertionError(name)


def test_every_format_that_pillow_writes_and_reads_is_read(tmp_path: Path) -> None:
    known = Image.registered_extensions()
    suffixes = sorted(suffix for suffix in readable_suffixes() if known[suffix] in Image.SAVE and suffix != ".im")
    assert {".jpg", ".jfif", ".jpe", ".png", ".avif", ".jp2", ".tga", ".webp", ".tiff", ".mpo"} <= set(suffixes)
    folder = write_images(tmp_path, {"a": [], "b": []})
    for i, suffix in enumerate(suffixes):
        name = suffix.upper() if i % 3 else suffix
        (folder / "ab"[i % 2] / f"{i}{name}").write_bytes(written(known[suffix]))
    data = load(folder, image_size=8)
    assert len(data.train) + len(data.test) == len(suffixes)
    assert data.notes == ()
    for split in (data.train, data.test):
        assert (split.images.take(torch.arange(len(split))).float().mean((1, 2, 3)) > 150).all()


def test_a_plugin_adds_its_format(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ".heic" not in readable_suffixes()
    assert not readable_suffixes() & {".pdf", ".eps", ".ps", ".mpg", ".h5", ".grib"}

    class Reader(ImageFile.ImageFile):
        format = "HEIF"

    Image.init()
    for name in ("ID", "OPEN", "EXTENSION"):
        monkeypatch.setattr(Image, name, getattr(Image, name).copy())
    Image.register_open("HEIF", Reader)
    Image.register_extension("HEIF", ".heic")
    assert ".heic" in readable_suffixes()


def test_a_program_in_the_guise_of_an_image_is_not_run() -> None:
    content = encoded(Image.new("RGB", (8, 8)), "EPS")
    with pytest.raises(BrokenImage, match="not an image that Pillow can read"):
        open_image(content, "x.png")


RAMP = np.linspace(0, 1, 64).reshape(8, 8)


@pytest.mark.parametrize(
    "values",
    [
        (RAMP * 255).astype(np.int32),
        (RAMP * 2**30).astype(np.int32),
        (RAMP * 60000 - 30000).astype(np.int32),
        RAMP.astype(np.float32),
        (RAMP * 255).astype(np.float32),
        (RAMP * 1e30 - 5e29).astype(np.float32),
    ],
    ids=["int_255", "int_2_30", "int_negative", "float_1", "float_255", "float_1e30"],
)
def test_numbers_of_32_bits_are_scaled_by_their_range(values: np.ndarray) -> None:
    found = pixels(encoded(Image.fromarray(values), "TIFF"))
    assert (found[0] - torch.from_numpy(RAMP * 255)).abs().max() <= 1


def test_numbers_without_a_range_and_without_a_value() -> None:
    for value, expected in ((0.0, 0), (0.5, 255), (-3.0, 0)):
        assert (pixels(encoded(Image.fromarray(np.full((4, 4), value, np.float32)), "TIFF")) == expected).all()
    holes = RAMP.astype(np.float32).copy()
    holes[0, 0], holes[0, 1], holes[7, 0] = np.nan, np.inf, -np.inf
    found = pixels(encoded(Image.fromarray(holes), "TIFF"))[0]
    assert found[[0, 0, 7], [0, 1, 0]].tolist() == [0, 0, 0]
    assert (found[7, 7], found[3, 3] > 50) == (255, True)


@pytest.mark.parametrize("name", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_their_upper_byte(name: str) -> None:
    content = encoded(Image.fromarray((np.arange(256).reshape(16, 16) * 257).astype(np.uint16)), name)
    assert pixels(content).flatten().tolist() == list(range(256))


MODES = ["1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_is_read_as_grey_and_as_colour(mode: str, channels: int) -> None:
    if mode in ("LAB", "HSV", "RGBa", "YCbCr"):
        image = Image.new(mode, (4, 4))
    else:
        image = Image.new("L", (4, 4), 255).convert("RGB" if mode == "CMYK" else "L").convert(mode)
    found = decode(image, "x", channels, None)
    assert (found.shape, found.dtype) == ((channels, 4, 4), torch.uint8)
    if mode not in ("LAB", "HSV", "RGBa", "YCbCr", "I;16"):
        assert (found >= 254).all()


def test_of_an_animation_the_first_frame_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), (value, value, value)) for value in (250, 10, 90)]
    for suffix in ("gif", "webp", "tiff", "png"):
        frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:])
        found = read_images([tmp_path / f"x.{suffix}"], 3, Crop(4, 4))
        assert (found >= 240).all(), suffix


def test_the_palette_and_transparency_give_the_colour_beneath() -> None:
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    assert pixels(encoded(image, "PNG"), 3)[:, 0, 0].tolist() == [200, 100, 50]
    several = encoded(image.convert("RGB").convert("P"), "PNG", transparency=bytes(range(256)))
    assert pixels(several, 3)[:, 0, 0].tolist() == [204, 102, 51]
    assert pixels(png(7, mode="P"), 3)[:, 0, 0].tolist() == [7, 7, 7]
