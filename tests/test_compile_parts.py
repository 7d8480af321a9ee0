"""Models that cannot be captured as a whole run in parts: what can be captured is compiled, PyTorch runs the rest."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from networks import randomise
from torch import Tensor, nn

from sepconv.compile import CompiledModel, compile
from sepconv.compile.parts import MOST_SIZES
from sepconv.kernels.halide.jit import runtime

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing() or "")


class Backbone(nn.Sequential):
    def __init__(self) -> None:
        first = (nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU6())
        super().__init__(*first, nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.Conv2d(16, 32, 1), nn.ReLU())


class Detector(nn.Module):
    """A list of images in; of every image the boxes with a positive score, however many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Sequential(nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Conv2d(32, 5, 1))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        scores, *boxes = self.head(self.backbone(torch.stack(images))).flatten(2).unbind(1)
        corners = torch.stack(boxes, -1)
        return [{"scores": s[s > 0], "boxes": b[s > 0]} for s, b in zip(scores, corners, strict=True)]


def compiled(model: nn.Module, example: Any) -> CompiledModel:
    with pytest.warns(UserWarning, match=r"runs in \d+ parts? and between them through PyTorch: .* cannot be captured"):
        return compile(model, example)


def test_a_detector_runs_in_parts() -> None:
    model = randomise(Detector())
    images = [torch.randn(3, 33, 37) for _ in range(2)]
    fast = compiled(model, (images,))
    with torch.no_grad():
        for given in (images, [torch.randn(3, 33, 37) for _ in range(2)], [torch.randn(3, 41, 23) for _ in range(2)]):
            for ours, models in zip(fast(given), model(given), strict=True):
                assert len(models["scores"]) > 0
                torch.testing.assert_close(ours, models, rtol=1e-4, atol=1e-5)
    explanation = fast.explain()
    assert {group.kernel for group in explanation.groups} == {"halide"}
    assert [group.name.split(".")[0] for group in explanation.groups] == ["backbone", "backbone", "head", "head"]
    assert "cannot be captured" in explanation.reason
    assert str(explanation).startswith("in parts, and between them through PyTorch: the model cannot be captured")


def test_the_model_itself_and_its_copies_keep_their_modules() -> None:
    model = randomise(Detector())
    images = [torch.randn(3, 17, 19)]
    fast = compiled(model, (images,))
    assert model.backbone._compiled_call_impl is None
    weight: Any = model.backbone[0].weight
    before = fast(images)
    with torch.no_grad():
        weight.zero_()
    torch.testing.assert_close(fast(images), before, rtol=0, atol=0)


class Looks(Detector):
    """Its backbone keeps a feature in an attribute, which the model reads."""

    class Keeping(Backbone):
        kept: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x)
            self.kept = y
            return y

    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.Keeping()

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        found = super().forward(images)
        assert self.backbone.kept is not None
        return [{**one, "feature": self.backbone.kept[i]} for i, one in enumerate(found)]


def test_a_module_that_keeps_what_it_computed_is_no_part() -> None:
    model, images = randomise(Looks()), [torch.randn(3, 33, 37)]
    fast, others = compiled(model, (images,)), [torch.randn(3, 33, 37)]
    with torch.no_grad():
        for given in (images, others):
            torch.testing.assert_close(fast(given), model(given), rtol=1e-4, atol=1e-5)
    assert {group.name.split(".")[0] for group in fast.explain().groups} == {"head"}


class Crops(nn.Module):
    """The second stage sees as many crops as the first one has found."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = Backbone()

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        count = int(numbers.sum())
        out: Tensor = self.stage(x[:, :, :, : 8 + count])
        return out


def test_a_part_is_prepared_for_few_sizes() -> None:
    model, x = randomise(Crops()), torch.randn(1, 3, 9, 64)
    fast = compiled(model, (x, torch.tensor([0])))
    part = fast._parts[0]
    for count in range(MOST_SIZES + 3):
        numbers = torch.tensor([count])
        with torch.no_grad():
            torch.testing.assert_close(fast(x, numbers), model(x, numbers), rtol=1e-4, atol=1e-5)
    assert part.compiled.explain().reason == f"its inputs had {MOST_SIZES} sizes before"  # type: ignore[attr-defined]
    assert fast.explain().reason.endswith(f"; stage runs through PyTorch: its inputs had {MOST_SIZES} sizes before")
    fast(x, torch.tensor([1]))
    assert part.compiled.explain().reason == ""


class Picky(Detector):
    """It asks its backbone what it is before it runs, and does not run with another."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        if self.backbone._compiled_call_impl is not None:
            raise RuntimeError("somebody changed the backbone")
        return super().forward(images)


def test_a_model_that_does_not_run_with_its_parts_runs_through_pytorch() -> None:
    model, images = randomise(Picky()), [torch.randn(3, 33, 37)]
    with pytest.warns(UserWarning, match="the model runs through PyTorch: the model cannot be captured"):
        fast = compile(model, (images,))
    with torch.no_grad():
        torch.testing.assert_close(fast(images), model(images), rtol=0, atol=0)
    assert fast.explain().groups == ()


def test_a_model_of_single_layers_has_no_parts() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x)
            return y[y > 0]

    with pytest.warns(UserWarning, match="the model runs through PyTorch: the model cannot be captured"):
        fast = compile(Single().eval(), torch.randn(1, 3, 9, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(torch.randn(1, 3, 11, 9))
