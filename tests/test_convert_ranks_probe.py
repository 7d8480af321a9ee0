from __future__ import annotations

import pytest
import torch
from convertible import before_and_after

from sepconv.convert.course import Courses
from sepconv.convert.ranks.probe import Probe
from sepconv.convert.sites import find_sites, record


@pytest.mark.parametrize("reason", ["", "as asked"])
def test_a_probe_is_the_network_with_that_layer_changed(reason: str) -> None:
    old, new, images = before_and_after()
    old.requires_grad_(False)
    sites = record(old, find_sites(old), next(images.batches(2)))
    courses = Courses(old, sites, reason)
    probe = Probe(old, images, courses)
    assert probe.sees_outputs
    first = sites[0]
    before = first.conv.weight.clone()
    weight, shift = torch.randn(4, 3, 9, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    with torch.no_grad():
        new[0].weight.copy_(weight.view(4, 3, 3, 3))
        new[0].bias += shift
        expected = sum(float((x.run(old) - x.run(new)).square().sum()) for x in images.batches(256))
    assert probe.error(first, weight, shift) == pytest.approx(expected)
    assert torch.equal(first.conv.weight, before)
    assert probe.error(first, before.flatten(2), torch.zeros(4)) == 0
    assert not first.conv._forward_hooks
    assert courses.reason == reason


def test_a_probe_counts_outputs_by_their_scales() -> None:
    old, _, images = before_and_after()
    old.requires_grad_(False)
    sites = record(old, find_sites(old), next(images.batches(2)))
    weight, shift = torch.randn(4, 3, 9, dtype=torch.float64), torch.zeros(4)
    once, thrice = (
        Probe(old, images, Courses(old, sites), scales).error(sites[0], weight, shift) for scales in ((), [3])
    )
    assert thrice == pytest.approx(3 * once)
