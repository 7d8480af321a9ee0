"""The kernel for few channels in a group against the definition in double precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from kernel_checks import double, image, magnitude, poisoned
from torch import Tensor

from sepconv import reference
from sepconv.kernels import backends
from sepconv.kernels import case as cases
from sepconv.kernels.case import Case, Geometry
from sepconv.kernels.halide.conv import grouped
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.schedule.machine import host, named
from sepconv.kernels.halide.schedule.normal import grouped_schedule

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())
LANES = host().lanes


def walk(stride: int = 1, padding: int = 1, dilation: int = 1) -> Geometry:
    return Geometry((stride,) * 2, ((padding, padding),) * 2, (dilation,) * 2)


class Layer(NamedTuple):
    """Channels are those of a group, in and out."""

    channels: int
    out_channels: int
    groups: int
    image: tuple[int, int, int]
    kernel: tuple[int, int] = (3, 3)
    geometry: Geometry = walk()
    activation: str = ""
    residual: bool = False
    bias: bool = True


LAYERS = {
    "groups_of_one_vector": Layer(LANES, LANES, 3, (1, 5, 15), activation="relu"),
    "pairs": Layer(LANES // 2, LANES // 2, 4, (2, 7, 13), residual=True),
    "fours": Layer(LANES // 4, LANES // 4, 8, (1, 17, 29), activation="silu", residual=True),
    "half_vectors": Layer(LANES // 2, LANES // 2, 3, (1, 3, 5), bias=False),
    "few_to_many": Layer(3, LANES // 2, 2, (1, 7, 11), (5, 3), Geometry((2, 1), ((2, 1), (0, 3)), (1, 1))),
    "many_to_few": Layer(19, LANES // 8, 8, (1, 6, 4), (1, 1), walk(1, 0)),
    "strided": Layer(4, 4, LANES, (1, 13, 14), geometry=walk(2), activation="relu6"),
    "dilated": Layer(2, 4, LANES, (2, 9, 11), geometry=walk(1, 3, 3)),
    "one_pixel": Layer(5, 8, LANES, (1, 1, 1)),
}


def tensors(layer: Layer) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    images, *size = layer.image
    outputs = layer.out_channels * layer.groups
    out = layer.geometry.output_size(size, layer.kernel)
    return (
        image((images, layer.channels * layer.groups, *size), True),
        torch.randn(outputs, layer.channels, *layer.kernel),
        torch.randn(outputs) if layer.bias else None,
        image((images, outputs, *out), True).contiguous(memory_format=torch.channels_last) if layer.residual else None,
    )


def described(layer: Layer, given: tuple[Tensor, Tensor, Tensor | None, Tensor | None]) -> Case:
    return cases.normal(*given, layer.geometry, layer.activation)


def truth(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    biases = [None] * layer.groups if bias is None else bias.chunk(layer.groups)
    parts = zip(x.chunk(layer.groups, 1), weight.chunk(layer.groups), biases, strict=True)
    y = torch.cat([reference.conv(*part, *layer.geometry) for part in parts], 1)
    return y if residual is None else y + residual


@pytest.mark.parametrize("name", LAYERS)
def test_grouped_matches_definition(name: str, assert_rounding: Callable[..., None]) -> None:
    layer = LAYERS[name]
    given = x, weight, bias, residual = tensors(layer)
    case = described(layer, given)
    assert grouped.supports(case) == ""
    y = grouped.prepare(case)(*given)
    expected = reference.ACTIVATIONS[layer.activation](truth(layer, *double(*given)))
    assert_rounding(y, expected, truth(layer, *magnitude(*given)) + expected.abs(), weight[0].numel() + 2)

    found = grouped.plan(case)
    out, margins_untouched = poisoned(y)
    grouped.bind(found, x, grouped.pack(found, (weight, bias)), residual, out)()
    assert torch.equal(out, y)
    margins_untouched()


def test_grouped_is_the_same_with_two_threads(threads: int) -> None:
    layer = LAYERS["fours"]
    given = tensors(layer)
    several = grouped.prepare(described(layer, given))(*given)
    torch.set_num_threads(1)
    assert torch.equal(several, grouped.prepare(described(layer, given))(*given))


@pytest.mark.parametrize(
    ("groups", "outputs", "reason"),
    [
        (1, LANES, "1 groups of"),
        (3, LANES // 4, "do not fill vectors"),
        (2, LANES + 1, "do not fill vectors"),
        (3, LANES // 2, ""),
    ],
)
def test_grouped_says_which_groups_it_takes(groups: int, outputs: int, reason: str) -> None:
    x = image((1, 2 * groups, 6, 6), True)
    case = cases.normal(x, torch.randn(groups * outputs, 2, 3, 3), None, None, walk())
    assert reason in grouped.supports(case)
    assert bool(grouped.supports(case)) == bool(reason)


def test_the_list_asks_the_kernel_for_few_channels_first() -> None:
    layer = LAYERS["fours"]
    case = described(layer, tensors(layer))
    assert backends.choose(case).backend.describe(case) == grouped.describe(case)


def test_grouped_bind_refuses_memory_in_another_layout() -> None:
    layer = LAYERS["fours"]
    given = x, weight, bias, residual = tensors(layer)
    found = grouped.plan(described(layer, given))
    with pytest.raises(ValueError, match=r"grouped\.bind: out must be channels_last"):
        grouped.bind(found, x, grouped.pack(found, (weight, bias)), residual, torch.empty(1, 2 * LANES, 17, 29))


@pytest.mark.parametrize("threads", [1, 2, 64])
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (56, 56), (3, 1000)])
def test_rows_are_shared_out_and_columns_fit_into_registers(size: tuple[int, int], threads: int) -> None:
    for machine in map(named, ("avx2", "avx512", "neon")):
        found = grouped_schedule(machine, size, (1, 2), 4 * 16 * size[1], 4, threads)
        assert 1 <= found.columns <= min(size[1], machine.registers - 3)
        assert 1 <= found.rows <= size[0]
        assert 4 * -(-size[0] // found.rows) >= min(threads // 2, 4 * size[0])
