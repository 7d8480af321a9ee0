from __future__ import annotations

import torch
from convertible import before_and_after
from torch import nn

from sepconv.convert.batch_norm import reestimate
from sepconv.convert.images import CalibrationImages


def test_reestimate_changes_nothing_where_nothing_differs() -> None:
    old, new, images = before_and_after()
    assert reestimate(old, new, images) == 2
    for (key, a), b in zip(old.state_dict().items(), new.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=key)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*old.modules(), *new.modules()])


def test_reestimate_undoes_shifts_and_scales_of_channels() -> None:
    old, new, images = before_and_after()
    with torch.no_grad():
        new[0].weight *= torch.tensor([0.5, 2, 1, 3])[:, None, None, None]
        new[0].bias.mul_(torch.tensor([0.5, 2, 1, 3])).add_(torch.tensor([1, 0, -2, 5]))
        new[3].weight *= 0.25
    (x,) = next(images.batches()).args
    assert (old(x) - new(x)).abs().max() > 0.5
    reestimate(old, new, images)
    torch.testing.assert_close(new(x), old(x), rtol=1e-3, atol=1e-3)


def test_reestimate_leaves_norms_without_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    assert reestimate(model, model, CalibrationImages(torch.randn(9, 3, 5, 5), torch.device("cpu"), torch.float32)) == 0
