"""Memory of a compiled network: no two values that live at one time share any, and reshapes cost none."""

from __future__ import annotations

import itertools

import pytest
import torch
from networks import NETWORKS, ConvNeXtBlock, randomise
from torch import Tensor, nn

from sepconv.compile import CompiledModel, compile
from sepconv.compile.layout import Region
from sepconv.compile.network import PreparedNetwork


def network_of(compiled: CompiledModel) -> PreparedNetwork:
    network = next(iter(compiled._networks.values()))
    assert isinstance(network, PreparedNetwork)
    return network


def overlaps(a: Region, b: Region) -> bool:
    in_time = a.first <= b.last and b.first <= a.last
    return in_time and a.offset < b.offset + b.bytes and b.offset < a.offset + a.bytes


@pytest.mark.parametrize("name", ["mobilenet_v2", "strided", "several", "reused"])
def test_layout_gives_living_values_memory_of_their_own(name: str) -> None:
    make, inputs = NETWORKS[name]
    network = network_of(compile(randomise(make()), inputs()))
    arena = network.arena
    regions = [region for region in arena.regions if region.bytes]
    assert not any(overlaps(a, b) for a, b in itertools.combinations(regions, 2))
    for i, step in enumerate(network.program.steps):
        for place in step.outputs:
            assert isinstance(place.memory, int)
            assert arena.regions[place.memory].first <= i
    assert max(region.offset + region.bytes for region in regions) == arena.bytes
    assert all(region.offset % 64 == 0 for region in regions)


def test_layout_reuses_memory() -> None:
    chain = nn.Sequential(*(nn.Conv2d(8, 8, 1) for _ in range(6)))
    arena = network_of(compile(chain.eval(), torch.randn(1, 8, 16, 16))).arena
    assert arena.bytes == 2 * 4 * 8 * 16 * 16


def test_layout_makes_no_copies_between_layouts() -> None:
    make = randomise(ConvNeXtBlock())
    steps = network_of(compile(make, torch.randn(2, 8, 9, 7))).program.steps
    assert [step.kind for step in steps] == [
        "depthwise",
        "row_norm",
        "linear",
        "linear",
    ]


def test_layout_reads_the_callers_image_in_place() -> None:
    """The first convolution takes it in either layout; other inputs are copied once."""
    stem = network_of(compile(nn.Conv2d(3, 8, 3).eval(), torch.randn(1, 3, 8, 8)))
    assert (stem.program.direct, stem.arena.copied) == (0, ())
    pointwise = network_of(compile(nn.Conv2d(8, 8, 1).eval(), torch.randn(1, 8, 8, 8)))
    assert (pointwise.program.direct, pointwise.arena.copied) == (None, (0,))


def test_network_lends_an_instance_to_one_call_at_a_time() -> None:
    network = network_of(compile(nn.Conv2d(3, 8, 3).eval(), torch.randn(1, 3, 8, 8)))
    first, second = network.take(), network.take()
    assert first is not second
    network.give_back(first)
    assert network.take() is first
    third = network.take()
    assert third not in (first, second)


class Strides(nn.Module):
    """Reads memory by strides, of a value that lies differently here than in the model."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x)
        return torch.as_strided(y, (2, 12), (12, 1), 3) + y.view(-1, 12)[:2]


def test_layout_keeps_the_models_strides_for_as_strided() -> None:
    model, x = Strides(), torch.randn(1, 3, 4, 5).contiguous()
    assert torch.equal(compile(model.eval(), x)(x), model(x))
    images = torch.randn(1, 3, 8, 3)
    assert torch.equal(compile(model.eval(), images)(images), model(images))
