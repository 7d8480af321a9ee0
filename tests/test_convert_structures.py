"""Networks with inputs and outputs of any structure, in one, two and three dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from convertible import conv
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import sepconv
from sepconv.convert import Plan
from sepconv.convert.frontier import follow
from sepconv.convert.outputs import output_scales
from sepconv.convert.sites import find_sites, record
from sepconv.leaves import Inputs


@dataclass
class Found:
    boxes: Tensor
    heads: dict[str, Tensor]


class TwoEyes(nn.Module):
    """Two images and a number in, a dataclass out."""

    def __init__(self) -> None:
        super().__init__()
        self.eye, self.join, self.boxes, self.mask = conv(3, 4), conv(8, 5), conv(5, 4), conv(5, 2)

    def forward(self, left: Tensor, right: Tensor, *, scale: Tensor | None = None) -> Found:
        both = torch.cat([torch.relu(self.eye(left)), torch.relu(self.eye(right))], 1)
        y = torch.relu(self.join(both))
        y = y if scale is None else y * scale[:, :, None, None]
        return Found(100 * self.boxes(y), {"mask": self.mask(y).sigmoid()})


class Pairs(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        left, right = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(index))
        return {"left": left, "right": right, "scale": torch.tensor([1.0 + index % 3]), "labels": torch.tensor(1)}


def pairs() -> list[dict[str, Tensor]]:
    return list(DataLoader(Pairs(), batch_size=7))


def same(plan: Plan, other: Plan) -> bool:
    return [row.rank for row in plan.layers] == [row.rank for row in other.layers] and [
        stage["output_error"] for stage in plan.stages
    ] == pytest.approx([stage["output_error"] for stage in other.stages])


def test_a_network_of_several_inputs_and_outputs_from_a_loader() -> None:
    torch.manual_seed(0)
    model = TwoEyes().eval()
    new, plan = sepconv.convert(model, DataLoader(Pairs(), batch_size=7), 1 / 2, sweeps=3)
    assert plan.images == 24
    assert [row.name for row in plan.layers] == ["eye", "join", "boxes", "mask"]
    assert not any("not followed" in note for note in plan.notes)
    errors = [stage["output_error"] for stage in plan.stages]
    assert errors[1] < min(1, errors[0])
    batch = pairs()[0]
    batch.pop("labels")
    out = new(**batch)
    assert isinstance(out, Found)
    assert out.boxes.shape == (7, 4, 7, 7)
    # How a loader cuts the samples, and whether inputs have names, makes no difference.
    everything = {key: torch.cat([part[key] for part in pairs()]) for key in batch}
    assert same(plan, sepconv.convert(model, [everything], 1 / 2, sweeps=3)[1])


def test_positional_inputs_are_a_tuple_in_a_tuple() -> None:
    torch.manual_seed(0)
    model = TwoEyes().eval()
    left, right = torch.randn(2, 12, 3, 5, 5)
    _, plan = sepconv.convert(model, [((left, right), None)], 1 / 2, sweeps=1)
    _, named = sepconv.convert(model, [{"left": left, "right": right}], 1 / 2, sweeps=1)
    assert same(plan, named)
    new, _ = sepconv.convert(model, None, 1 / 2, method="svd", metric="macs", example_input=(left, right))
    assert new(left, right).boxes.shape == (12, 4, 5, 5)
    with pytest.raises(ValueError, match=r"fails on inputs of shape \(2, 3, 5, 5\), all that it is called with; batch"):
        sepconv.convert(model, [(left, right)])


def test_errors_count_by_the_variance_of_each_output_and_by_its_weight() -> None:
    """Without that the boxes, a hundred times as large, would be all that counts."""
    torch.manual_seed(0)
    model = TwoEyes().eval()
    data = [{key: batch[key] for key in ("left", "right")} for batch in pairs()]
    kept = {}
    for name in ("boxes", "heads.mask"):
        new, plan = sepconv.convert(model, data, 0.4, sweeps=3, output_weights={"boxes": 0, "heads.mask": 0, name: 1})
        batch = {key: torch.cat([part[key] for part in data]) for key in data[0]}
        with torch.no_grad():
            old_out, new_out = model(**batch), new(**batch)
        kept[name] = [
            float((a - b).square().sum() / (a - a.mean(0)).square().sum())
            for a, b in ((old_out.boxes, new_out.boxes), (old_out.heads["mask"], new_out.heads["mask"]))
        ]
        assert plan.stages[-1]["output_error"] == pytest.approx(kept[name][name == "heads.mask"], rel=1e-4)
    assert kept["boxes"][0] < kept["heads.mask"][0]
    assert kept["heads.mask"][1] < kept["boxes"][1]
    with pytest.raises(ValueError, match=r"convert: output_weights names 'mask', but the outputs of the network are"):
        sepconv.convert(model, data, output_weights={"mask": 1})


def test_scales_make_every_output_count_alike() -> None:
    model = TwoEyes().eval()
    batches = [Inputs.of({key: batch[key] for key in ("left", "right")}) for batch in pairs()]
    scales = output_scales(model, batches, None)
    found = [batch.run(model.requires_grad_(False)) for batch in batches]
    for scale, maps in zip(scales, ([f.boxes for f in found], [f.heads["mask"] for f in found]), strict=True):
        rows = torch.cat(maps).flatten(1).double()
        assert scale * float((rows - rows.mean(0)).square().sum(1).mean()) == pytest.approx(0.5, rel=1e-6)
    assert output_scales(conv(3, 4), [Inputs.of(torch.randn(2, 3, 5, 5))], {"": 3.0}) == [1.0]


def test_courses_hold_for_the_constants_that_they_were_recorded_with() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = conv(3, 4), conv(4, 4)

        def forward(self, x: Tensor, scale: int) -> Tensor:
            return self.second(self.first(x) * scale)

    model = Scaled().eval().requires_grad_(False)
    x = torch.randn(2, 3, 5, 5)
    once, twice = Inputs((x, 1)), Inputs((x, 2))
    courses = follow(model, record(model, find_sites(model), once), once)
    assert courses.reason == ""
    assert courses.of(once) is not None
    assert courses.of(twice) is not courses.of(once)
    new, _ = sepconv.convert(model, [((x, 1),), ((x, 2),)], depth_multiplier=9, form="separable")
    torch.testing.assert_close(new(x, 3), model(x, 3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["separable", "bottleneck"])
@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims: int, form: str) -> None:
    """Strides, dilation and padding modes that audio networks and volumes have; enough filters are exact."""
    torch.manual_seed(0)
    kind: Any = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    norm: Any = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[dims]
    size = {1: 5, 3: 3}[dims]
    model = nn.Sequential(
        kind(2, 6, size, stride=2, padding=1, padding_mode="replicate", bias=False),
        norm(6),
        nn.ReLU(inplace=True),
        kind(6, 5, size, padding="same", dilation=2),
        nn.GELU(),
        kind(5, 4, size, padding=1),
    )
    x = torch.randn(12, 2, *[{1: 41, 3: 9}[dims]] * dims)
    model(x)
    model.eval()
    new, plan = sepconv.convert(model, x, depth_multiplier=size**dims, form=form, sweeps=2)
    assert [row.kernel_size for row in plan.layers] == [(size,) * dims] * 3
    if form == "separable":
        torch.testing.assert_close(new(x), model(x), rtol=1e-3, atol=1e-4)
    smaller, plan = sepconv.convert(model, x, 1 / 2, form=form, metric="macs", sweeps=2)
    assert plan.converted
    errors = [stage["output_error"] for stage in plan.stages]
    assert errors[1] < errors[0]
    assert smaller(x).shape == model(x).shape


def test_numbers_that_are_no_fractions_pass() -> None:
    """Words of a text, in one dimension."""

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.conv = nn.Conv1d(6, 8, 3, padding=1)
            self.head = nn.Linear(8, 3)

        def forward(self, words: Tensor) -> Tensor:
            return self.head(torch.relu(self.conv(self.embed(words).transpose(1, 2))).mean(2))

    torch.manual_seed(0)
    words = torch.randint(0, 11, (40, 13))
    new, plan = sepconv.convert(Text().eval(), [{"words": words}], 1 / 2)
    assert len(plan.converted) == 1
    assert new(words).shape == (40, 3)


def test_networks_that_keep_what_they_computed() -> None:
    """As those for optical flow keep their correlations: copies are made of them in between."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = conv(3, 4), conv(4, 4)
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen = [self.first(x)]
            return self.second(self.seen[0])

    _, plan = sepconv.convert(Keeps().eval(), torch.randn(2, 3, 5, 5), depth_multiplier=2, sweeps=1)
    assert len(plan.converted) == 2


class Without(nn.Module):
    """Code that wants no gradients: of a method with a decorator, or around what its authors did not train."""

    def __init__(self, mode: Any, whole: bool) -> None:
        super().__init__()
        self.first, self.norm, self.second = conv(3, 6), nn.BatchNorm2d(6), conv(6, 5)
        self.mode, self.whole = mode, whole

    def forward(self, x: Tensor) -> Tensor:
        with self.mode():
            y = torch.relu(self.norm(self.first(x)))
            if self.whole:
                return self.second(y)  # type: ignore[no-any-return]
        return self.second(y.clone())  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("whole", [True, False])
def test_code_that_wants_no_gradients_is_weighed_by_norms(mode: Any, whole: bool) -> None:
    model, x = Without(mode, whole).eval(), torch.randn(10, 3, 7, 7)
    new, plan = sepconv.convert(model, x, 0.7, form="separable", sweeps=1)
    assert "not differentiable" in plan.notes[0]
    assert plan.converted
    assert new(x).shape == model(x).shape
