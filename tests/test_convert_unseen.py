from __future__ import annotations

import pytest
import torch
from convertible import images, make_conv, resnet, smooth_images, trained

from sepconv.convert import convert
from sepconv.convert.images import CalibrationImages
from sepconv.convert.unseen import Unseen


def test_the_error_is_that_of_the_layer_on_these_images() -> None:
    conv, x = make_conv(), smooth_images(5)
    target = conv(x) + 0.3 * torch.randn(12, 7, 11, 11, dtype=torch.float64)
    root = torch.randn(7, 7, dtype=torch.float64)
    unseen = Unseen(conv, 12)
    for part in (slice(0, 5), slice(5, 12)):
        unseen.add(x[part], conv(x[part]), target[part], torch.Generator().manual_seed(1))
    weight, shift = torch.randn(7, 5, 9, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    answer = torch.nn.functional.conv2d(x, weight.view(7, 5, 3, 3), conv.bias + shift, padding=1)
    lack, whole = (
        (root @ t.transpose(0, 1).flatten(1)).square().sum()
        for t in (target - answer, target - target.mean((0, 2, 3), True))
    )
    assert unseen.relative_error(weight, shift, root.T @ root) == pytest.approx(float(lack / whole), rel=1e-6)


def test_errors_are_of_images_that_were_not_fitted() -> None:
    """Images in every sixteenth place that are like no other are answered badly, and the plan says so."""
    x = images(160)
    odd = x.clone()
    odd[15::16] = 4 * torch.randn(10, 3, 13, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    errors = []
    for calibration in (x, odd):
        _, plan = convert(trained(resnet), calibration, depth_multiplier=1, form="separable", reestimate_bn=False)
        assert plan.held_out == 10
        errors.append([row.error for row in plan.converted])
    assert sum(errors[1]) > 1.5 * sum(errors[0])  # type: ignore[arg-type]


def test_images_are_divided_without_a_copy() -> None:
    x = [torch.arange(5.0).view(5, 1, 1), torch.arange(5.0, 12.0).view(7, 1, 1).expand(7, 1, 2)]
    whole = CalibrationImages(x, torch.device("cpu"), torch.float32)
    most, few = whole.divided(4)
    firsts = [[int(v) for batch in part.batches() for v in batch.tensors[0][:, 0, 0]] for part in (whole, most, few)]
    assert firsts == [list(range(12)), [0, 1, 2, 4, 5, 6, 8, 9, 10], [3, 7, 11]]
    assert (whole.count, most.count, few.count) == (12, 9, 3)
    assert [len(batch) for batch in most.batches(5)] == [4, 1]


def test_batches_that_cannot_be_divided_stay_whole() -> None:
    """Lists of images, as detectors take them: every fourth batch is held out, and none is cut."""
    x = [([torch.full((3, 5, 5), float(i)), torch.full((3, 7, 5), float(i))],) for i in range(8)]
    whole = CalibrationImages([((batch,),) for (batch,) in x], torch.device("cpu"), torch.float32)
    most, few = whole.divided(4)
    firsts = [[float(batch.tensors[0].flatten()[0]) for batch in part.batches()] for part in (most, few)]
    assert firsts == [[0, 1, 2, 4, 5, 6], [3, 7]]
    assert (most.count, few.count) == (12, 4)
