"""The kernel for normal convolutions of many channels against the definition in double precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from kernel_checks import double, image, magnitude, poisoned
from torch import Tensor

from sepconv import reference
from sepconv.kernels import case as cases
from sepconv.kernels.case import Case, Geometry
from sepconv.kernels.halide.conv import normal
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.schedule.machine import Machine, host, named, targeting
from sepconv.kernels.halide.schedule.normal import NormalShape, normal_schedule

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing())


# Output channels in the narrowest block.
LEAST_WIDE = 4
PADDED = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))


@dataclass(frozen=True)
class Layer:
    name: str
    shape: tuple[int, int, int, int]
    out_channels: int
    kernel: tuple[int, int] = (3, 3)
    geometry: Geometry = PADDED
    groups: int = 1
    activation: str = "relu"
    residual: bool = False
    bias: bool = True


def walk(stride: int = 1, padding: int = 1, dilation: int = 1) -> Geometry:
    return Geometry((stride,) * 2, ((padding, padding),) * 2, (dilation,) * 2)


LAYERS = [
    Layer("whole_tiles", (1, 16, 9, 28), 64),
    Layer("a_tile_and_one_column", (1, 16, 3, 15), 33, residual=True),
    Layer("primes", (2, 7, 13, 17), 5, (3, 5), Geometry((2, 1), ((1, 0), (2, 3)), (1, 1)), activation="silu"),
    Layer("one_block_and_one_channel", (1, 33, 7, 7), 65, residual=True, activation="gelu"),
    Layer("dilated", (3, 12, 11, 9), 24, geometry=walk(1, 2, 2), activation=""),
    Layer("in_place", (1, 19, 8, 11), 96, (1, 1), walk(2, 0), activation="hardswish"),
    Layer("in_place_windows", (2, 8, 6, 5), 8, (2, 3), walk(1, 0), residual=True, activation="relu6"),
    Layer("column_of_pixels", (1, 20, 5, 1), 10, (5, 1), Geometry((1, 1), ((2, 2), (0, 0)), (1, 1)), activation=""),
    Layer("one_pixel", (1, 5, 1, 1), 3, activation="sigmoid"),
    Layer("groups_of_four", (2, 32, 9, 7), 32, groups=8, residual=True),
    Layer("groups_of_few_to_many", (1, 6, 7, 9), 40, groups=2, bias=False),
    Layer("groups_of_many_to_one", (1, 34, 5, 6), 2, groups=2, geometry=walk(2), activation=""),
    Layer("many_rows", (1, 16, 97, 5), 17, (7, 1), Geometry((3, 1), ((3, 3), (0, 0)), (1, 1)), bias=False),
]


def tensors(layer: Layer) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    x = image(layer.shape, True)
    weight = torch.randn(layer.out_channels, layer.shape[1] // layer.groups, *layer.kernel)
    size = layer.geometry.output_size(layer.shape[2:], layer.kernel)
    residual = image((layer.shape[0], layer.out_channels, *size), True).contiguous(memory_format=torch.channels_last)
    return x, weight, torch.randn(layer.out_channels) if layer.bias else None, residual if layer.residual else None


def described(layer: Layer, given: tuple[Tensor, Tensor, Tensor | None, Tensor | None]) -> Case:
    return cases.normal(*given, layer.geometry, layer.activation)


def truth(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Each group of channels by itself."""
    biases = [None] * layer.groups if bias is None else bias.chunk(layer.groups)
    parts = zip(x.chunk(layer.groups, 1), weight.chunk(layer.groups), biases, strict=True)
    y = torch.cat([reference.conv(*part, *layer.geometry) for part in parts], 1)
    return y if residual is None else y + residual


@pytest.mark.parametrize("layer", LAYERS, ids=[layer.name for layer in LAYERS])
def test_normal_matches_definition(layer: Layer, assert_rounding: Callable[..., None]) -> None:
    given = x, weight, bias, residual = tensors(layer)
    case = described(layer, given)
    assert normal.supports(case) == ""
    y = normal.prepare(case)(*given)
    expected = reference.ACTIVATIONS[layer.activation](truth(layer, *double(*given)))
    sizes = truth(layer, *magnitude(*given)) + expected.abs()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_rounding(y, expected, sizes, weight[0].numel() + 2)

    found = normal.plan(case)
    out, margins_untouched = poisoned(y)
    normal.bind(found, x, normal.pack(found, (weight, bias)), residual, out)()
    assert torch.equal(out, y)
    margins_untouched()


RUNS = [
    Layer("tiles_and_one_column", (2, 64, 5, 29), 33, residual=True),
    Layer("fewer_columns_than_a_tile", (1, 48, 7, 3), 64, geometry=walk(2), activation="silu"),
    Layer("dilated", (1, 80, 9, 7), 24, geometry=walk(1, 4, 4), activation=""),
    Layer("groups", (1, 96, 5, 6), 80, groups=2, bias=False),
]


@pytest.mark.parametrize("layer", RUNS, ids=[layer.name for layer in RUNS])
def test_sums_in_runs_match_definition(layer: Layer, threads: int, assert_rounding: Callable[..., None]) -> None:
    """As where the second cache is too small for the weights of a block."""
    given = x, weight, bias, residual = tensors(layer)
    small = dataclasses.replace(host(), l2_bytes=4 * weight[0].numel() * LEAST_WIDE)
    with targeting(small):
        found = normal.plan(described(layer, given))
        assert found.spec.run == 16 < weight.shape[1]
        expected = reference.ACTIVATIONS[layer.activation](truth(layer, *double(*given)))
        sizes = truth(layer, *magnitude(*given)) + expected.abs()
        like = torch.empty(expected.shape).contiguous(memory_format=torch.channels_last)
        out, margins_untouched = poisoned(like)
        normal.bind(found, x, normal.pack(found, (weight, bias)), residual, out)()
    assert_rounding(out, expected, sizes, weight[0].numel() + 2)
    margins_untouched()


@pytest.mark.parametrize("name", ["one_block_and_one_channel", "in_place", "groups_of_four"])
def test_normal_is_the_same_with_two_threads(name: str, threads: int) -> None:
    layer = next(layer for layer in LAYERS if layer.name == name)
    given = tensors(layer)
    results = [normal.prepare(described(layer, given))(*given) for _ in range(2)]
    torch.set_num_threads(1)
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], normal.prepare(described(layer, given))(*given), rtol=1e-4, atol=1e-4)


def test_changed_weights_are_packed_anew() -> None:
    layer = LAYERS[0]
    given = _, weight, bias, _ = tensors(layer)
    run = normal.prepare(described(layer, given))
    before = run(*given)
    weight.data.mul_(2)
    assert bias is not None
    bias.data.mul_(2)
    torch.testing.assert_close(run(*given), 2 * before)


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.randn(1, 8, 6, 6), "reads channels_last images only"),
        (torch.randn(1, 8, 6, 6, dtype=torch.float64), "float32"),
        (torch.randn(1, 8, 6), "got 1 spatial dimensions"),
        (torch.randn(1, 16, 6, 6).contiguous(memory_format=torch.channels_last)[:, ::2], "channels_last images only"),
    ],
)
def test_normal_says_what_it_does_not_support(x: Tensor, reason: str) -> None:
    weight = torch.randn(4, 8, *[3] * (x.dim() - 2), dtype=x.dtype)
    assert reason in normal.supports(cases.normal(x, weight, None, None, Geometry.of_pixels(x.dim() - 2)))


def test_groups_that_waste_a_vector_are_left_to_pytorch() -> None:
    x = image((1, 20, 6, 6), True)
    for outputs, reason in ((3, "groups of less than 4 output channels"), (4, "")):
        case = cases.normal(x, torch.randn(5 * outputs, 4, 3, 3), None, None, walk())
        assert case.groups == 5
        assert normal.slower(case).startswith(reason)
        assert bool(normal.slower(case)) == bool(reason)


def test_normal_bind_refuses_memory_in_another_layout() -> None:
    layer = LAYERS[1]
    given = x, weight, bias, residual = tensors(layer)
    found = normal.plan(described(layer, given))
    packed = normal.pack(found, (weight, bias))
    out = torch.empty(1, 33, 3, 15)
    with pytest.raises(ValueError, match=r"normal\.bind: out must be channels_last"):
        normal.bind(found, x, packed, residual, out)
    assert residual is not None
    with pytest.raises(ValueError, match=r"normal\.bind: residual must be channels_last"):
        normal.bind(found, x, packed, residual.contiguous(), out.contiguous(memory_format=torch.channels_last))


SHAPES = [
    NormalShape(64, 64, 1, 9, 1, 56, 56, 4 * 64 * 58),
    NormalShape(512, 512, 1, 9, 1, 7, 7, 4 * 512 * 9),
    NormalShape(8, 8, 32, 9, 1, 28, 28, 4 * 256 * 30),
    NormalShape(3, 5, 1, 1, 2, 1, 1, 12),
    NormalShape(2048, 2048, 1, 49, 1, 200, 200, 4 * 2048 * 206),
    NormalShape(2048, 512, 1, 9, 1, 28, 28, 4 * 2048 * 30, copied=True),
    NormalShape(64, 64, 1, 9, 1, 56, 56, 4 * 64 * 58, copied=True),
]


@pytest.mark.parametrize(("channels", "side"), [(64, 56), (128, 28), (256, 14), (512, 7)])
def test_where_a_broadcast_is_an_instruction_it_serves_several_vectors(channels: int, side: int) -> None:
    """ResNet-18's layers: a tile of one vector would wait for its broadcasts, though no column is computed twice."""
    shape = NormalShape(channels, channels, 1, 9, 1, side, side, 4 * channels * (side + 2), copied=True)
    assert normal_schedule(named("avx2"), shape, 1).tile.vectors >= 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("machine", [host(), *map(named, ("sse41", "avx2", "avx512", "neon"))])
@pytest.mark.parametrize("threads", [1, 2, 64])
def test_tiles_fit_into_registers_and_tasks_are_shared_out(machine: Machine, shape: NormalShape, threads: int) -> None:
    tile, rows, parts, run = normal_schedule(machine, shape, threads)
    assert tile.vectors * tile.scalars + tile.vectors + 1 <= machine.registers
    assert 1 <= tile.scalars <= shape.columns
    assert 1 <= rows <= shape.rows
    blocks = shape.groups * -(-shape.out_channels // tile.wide)
    assert 1 <= parts <= min(blocks, threads)
    assert shape.channels % run == 0
    assert shape.copied or run == shape.channels
    fits = 4 * tile.wide * shape.channels * shape.taps <= machine.l2_bytes // 2
    assert (run == shape.channels) == (fits or not shape.copied)
    assert run <= 16 or run == shape.channels or 4 * tile.wide * run * shape.taps <= machine.l2_bytes // 2
    tasks = shape.images * -(-shape.rows // rows) * parts
    assert tasks >= min(threads, shape.images * shape.rows * blocks) // 2
