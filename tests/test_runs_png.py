"""Pictures for a report: what an imaging library reads, stretched and small."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sepconv.runs import png


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_what_an_imaging_library_reads(channels: int, tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    (tmp_path / "a.png").write_bytes(png.encode(pixels))
    read = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).view(5, 7, channels)
    assert torch.equal(read.permute(2, 0, 1), pixels)


def test_png_stretches_and_shrinks(tmp_path: Path) -> None:
    uri = png.data_uri(torch.linspace(-3, 5, 300 * 40).view(1, 300, 40), limit=100)
    (tmp_path / "a.png").write_bytes(base64.b64decode(uri.removeprefix("data:image/png;base64,")))
    read = np.array(Image.open(tmp_path / "a.png"))
    assert read.shape == (100, 13)
    assert (read.min(), read.max()) == (0, 255)


def test_png_of_many_channels_constant_or_not_finite() -> None:
    for image in (torch.randn(5, 4, 4), torch.ones(1, 4, 4), torch.full((1, 4, 4), float("nan"))):
        assert png.data_uri(image).startswith("data:image/png;base64,iVBOR")


def test_png_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"^encode: pixels must be uint8 .* got torch.float32 \(1, 2, 2\)$"):
        png.encode(torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match=r"^data_uri: image must have shape \(C, H, W\), got \(4, 4\)$"):
        png.data_uri(torch.zeros(4, 4))
