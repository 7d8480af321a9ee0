from __future__ import annotations

import math
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sepconv.leaves import Closeness, leaves
from sepconv.leaves.closeness import OutputComparison
from sepconv.leaves.outputs import checked_weights

Head = namedtuple("Head", ["boxes", "scores"])


@dataclass
class Output:
    last: Tensor
    hidden: tuple[Tensor, ...]
    count: Tensor


def compared(wanted: Any, given: Any, **arguments: Any) -> Closeness:
    found = OutputComparison(**arguments)
    half = len(leaves(wanted).popitem()[1]) // 2
    for part in (slice(None, half), slice(half, None)):
        found.add(_cut(wanted, part), _cut(given, part), 1)
    result = found.result()
    assert result is not None
    assert result.samples == 2
    return result


def _cut(output: Any, part: slice) -> Any:
    return {name: leaf[part] for name, leaf in output.items()} if isinstance(output, dict) else output[part]


def test_leaves_have_the_names_of_their_places() -> None:
    a, whole = torch.ones(1), torch.ones(1, dtype=torch.int64)
    assert list(leaves(a)) == [""]
    assert list(leaves([a, {"mask": a, "n": whole}, None, "text"])) == ["0", "1.mask"]
    assert list(leaves(Head(a, (a, a)))) == ["boxes", "scores.0", "scores.1"]
    assert list(leaves(Output(a, (a, a), whole))) == ["last", "hidden.0", "hidden.1"]
    assert leaves(whole) == {}


def test_each_output_counts_by_its_own_variance() -> None:
    torch.manual_seed(0)
    small, large = torch.randn(40, 5), 1000 * torch.randn(40, 7) + 300
    wanted = {"small": small, "large": large}
    given = {"small": small + 0.1 * torch.randn(40, 5), "large": large + 100 * torch.randn(40, 7)}
    found = compared(wanted, given)
    assert [leaf.name for leaf in found.leaves] == ["small", "large"]
    for leaf in found.leaves:
        assert leaf.relative_error == pytest.approx(0.01, rel=0.3)
        want, have = wanted[leaf.name].double(), given[leaf.name].double()
        exact = (want - have).square().sum() / (want - want.mean(0)).square().sum()
        assert leaf.relative_error == pytest.approx(float(exact), rel=1e-9)
    errors = [leaf.relative_error for leaf in found.leaves]
    assert found.relative_error == pytest.approx(sum(errors) / 2)
    weighted = compared(wanted, given, weights={"large": 3.0})
    assert weighted.relative_error == pytest.approx((errors[0] + 3 * errors[1]) / 4)
    assert compared(wanted, given, weights={"small": 0}).relative_error == pytest.approx(errors[1])


def test_agreement_of_class_outputs() -> None:
    wanted = torch.eye(4).repeat(2, 1)
    given = wanted.clone()
    given[0] = wanted[1]
    found = compared(wanted, given).leaves[0]
    assert found.agreement == pytest.approx(7 / 8)
    assert found.psnr is None


def test_psnr_of_images_in_a_known_range() -> None:
    images = torch.rand(4, 3, 8, 8)
    given = images + 0.01
    assert compared(images, given).leaves[0].psnr == pytest.approx(40, abs=1e-3)
    assert compared(255 * images, 255 * given, data_range=255).leaves[0].psnr == pytest.approx(40, abs=1e-3)
    assert compared(images, images).leaves[0].psnr == math.inf
    assert "psnr" not in compared(images, images).to_dict()["outputs"][0]
    for other in (255 * images, images - 0.5, images[:, :1].expand(4, 5, 8, 8), images[:, 0]):
        assert compared(other, other + 0.01).leaves[0].psnr is None
    assert "PSNR 40.00 dB" in str(compared(images, given))


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"evaluate: output_weights names 'box', but the outputs .* are 'boxes'"):
        checked_weights(["boxes"], {"box": 1}, "evaluate")
    with pytest.raises(ValueError, match=r"must be finite and at least 0, got -1 for 'boxes'"):
        checked_weights(["boxes"], {"boxes": -1}, "evaluate")
    with pytest.raises(ValueError, match=r"leave no output to compare"):
        checked_weights(["boxes"], {"boxes": 0}, "evaluate")
    with pytest.raises(ValueError, match=r"evaluate: data_range must be above 0 and finite, got 0"):
        OutputComparison(data_range=0)
    with pytest.raises(ValueError, match=r"train: the outputs of the model change their shapes from .* to "):
        OutputComparison(caller="train").add(torch.ones(2, 3), torch.ones(2, 4), 2)
    nothing = OutputComparison()
    nothing.add(torch.ones(2).long(), torch.ones(2).long(), 2)
    assert nothing.result() is None
