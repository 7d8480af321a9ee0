"""Networks for the page of a run: written where they can be, and a reason where not."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import live_page
import pytest
import torch
from torch import nn

from sepconv.runs import live
from sepconv.runs.live import LiveNetwork, write_live
from sepconv.runs.run_folder import LIVE


def test_all_that_the_page_needs_is_written() -> None:
    folder = live_page.page(live_page.COLOURED).parent
    found = json.loads((folder / LIVE).read_text())
    assert found["input"] == {"channels": 3, "size": 11, "resize": 13, "interpolation": "bicubic", "squash": False}
    assert found["classes"] == live_page.CARDS[live_page.COLOURED].classes
    assert found["ink"] is None
    rows = [(row["name"], row["precision"], row["symbol"], row["pixels"], row["classes"]) for row in found["networks"]]
    assert rows == [("normal", "float32", "network0", 363, 4), ("separable", "int8", "network1", 363, 4)]
    assert all(base64.b64decode(row["wasm"]).startswith(b"\0asm") for row in found["networks"])
    summary = json.loads((folder / "found.json").read_text())
    assert summary == {"written": True, "bytes": sum(len(row["wasm"]) for row in found["networks"])}


@pytest.mark.parametrize("dark", [False, True])
def test_ink_is_what_differs_from_most_of_the_image(dark: bool) -> None:
    images = torch.zeros(3, 1, 20, 20, dtype=torch.uint8)
    images[:, :, 3:17, 8:11] = 255
    images = 255 - images if dark else images
    assert live._ink(images) == {"dark": dark, "share": 0.7}
    assert live._ink(images.expand(-1, 3, -1, -1)) is None


def test_digits_fill_their_image() -> None:
    found = json.loads((live_page.page(live_page.GREY).parent / LIVE).read_text())
    assert found["ink"] == {"dark": False, "share": 1.0}


def refused(network: nn.Module, folder: Path) -> str:
    """The reason; what an earlier run left is gone, so that its networks are not shown with this one's numbers."""
    (folder / LIVE).write_text("{}")
    card, data = live_page.CARDS[live_page.GREY], live_page.data_of(live_page.GREY)
    found = write_live([LiveNetwork("normal", "float32", network)], card, data, folder)
    assert found["written"] is False
    assert list(folder.iterdir()) == []
    return str(found["reason"])


def test_too_large_is_said_before_anything_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "export_c", None)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 100_000), nn.Linear(100_000, 10, bias=False))
    assert refused(layers, tmp_path) == "the networks take 38.1 MB in the page, which may hold 32 MB of them"


def test_what_was_exported_may_be_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LARGEST_LIVE", 4_000)
    assert "in the page, which may hold 0.00381 MB" in refused(live_page.networks(live_page.GREY)[0].model, tmp_path)


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    class Warped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.svdvals(x.flatten(1)).expand(1, 10).contiguous()

    assert "linalg" in refused(Warped().eval(), tmp_path)


def test_outputs_must_be_the_classes(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 9, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    assert refused(model, tmp_path) == "the network gives ((1, 9),) and not a score for each of 10 classes"


def test_without_classes_there_is_nothing_to_tell(tmp_path: Path) -> None:
    card, data = live_page.CARDS[live_page.GREY], live_page.data_of(live_page.GREY)
    for one in (replace(data, classes=[]), data):
        found = write_live([], replace(card, mean=[], std=[]) if one is data else card, one, tmp_path)
        assert found == {"written": False, "reason": "the page runs networks that tell classes of images"}
