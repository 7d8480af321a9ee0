"""From the shapes of a depthwise convolution to a kernel and the numbers it is called with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from math import prod
from typing import Any

from sepconv.kernels.halide.conv import depthwise_gather, depthwise_weight_grad
from sepconv.kernels.halide.conv.depthwise_gather import GatherSpec
from sepconv.kernels.halide.conv.depthwise_taps import Phase, forward_taps, transposed_taps
from sepconv.kernels.halide.conv.depthwise_weight_grad import WeightSpec
from sepconv.kernels.halide.schedule import depthwise as schedule
from sepconv.kernels.halide.schedule import tuned
from sepconv.kernels.halide.schedule.depthwise import Sizes
from sepconv.kernels.halide.schedule.machine import host

Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """One pass of a depthwise convolution. ``image`` is the size of x, ``output`` that of the convolution's result;
    ``numbers`` is the kind of both (see ``numbers``), filters and bias are float32.

    Sizes are in the order x, y, z; the first ``dims`` of them are the tensor's, the rest are those of one pixel.
    """

    which: str
    dims: int
    channels_last: bool
    batch: int
    channels: int
    multiplier: int
    image: Sizes
    output: Sizes
    kernel: Sizes
    stride: Sizes
    low: Sizes
    dilation: Sizes
    bias: bool
    activation: str
    numbers: str = "float32"

    @property
    def bytes(self) -> int:
        """Size of x and of the result in float32."""
        return 4 * self.batch * self.channels * (prod(self.image) + self.multiplier * prod(self.output))


@dataclass(frozen=True)
class Plan:
    """``build`` makes the kernel for ``key``; ``arguments`` are its numbers; ``description()`` is for people."""

    key: str
    build: Callable[[], tuple[Any, list[Any]]]
    arguments: Numbers
    description: Callable[[], dict[str, Any]]


def _xyz(values: Sequence[int], missing: int) -> Sizes:
    x, y, z = (*reversed(values), missing, missing)[:3]
    return x, y, z


@lru_cache(maxsize=4096)
def problem(
    which: str,
    channels_last: bool,
    image: Numbers,
    output: Numbers,
    weight: Numbers,
    stride: Numbers,
    low: Numbers,
    dilation: Numbers,
    bias: bool = False,
    activation: str = "",
    numbers: str = "float32",
) -> Problem:
    """The problem with tensors of these shapes; arguments are in PyTorch's order."""
    return Problem(
        which,
        len(stride),
        channels_last,
        batch=image[0],
        channels=image[1],
        multiplier=weight[0] // image[1],
        image=_xyz(image[2:], 1),
        output=_xyz(output[2:], 1),
        kernel=_xyz(weight[2:], 1),
        stride=_xyz(stride, 1),
        low=_xyz(low, 0),
        dilation=_xyz(dilation, 1),
        bias=bias,
        activation=activation,
        numbers=numbers,
    )


@lru_cache(maxsize=4096)
def plan(p: Problem, threads: int) -> Plan:
    return _weight_plan(p, threads) if p.which == "grad_weight" else _gather_plan(p, threads)


def _taps(p: Problem) -> list[tuple[Phase, ...]]:
    if p.which == "forward":
        return [forward_taps(p.kernel[d], p.dilation[d]) for d in range(3)]
    return [transposed_taps(p.kernel[d], p.stride[d], p.dilation[d], p.low[d]) for d in range(3)]


def _reach(phases: tuple[Phase, ...]) -> int:
    ends = [p.offset + j * p.advance for p in phases if p.count for j in (0, p.count - 1)]
    return max(ends) - min(ends)


def _sizes(values: Sequence[int]) -> Sizes:
    x, y, z = values
    return x, y, z


def _gather_shape(p: Problem, taps: list[tuple[Phase, ...]]) -> schedule.GatherShape:
    forward = p.which == "forward"
    return schedule.GatherShape(
        channels=p.channels,
        image=p.output if forward else p.image,
        phases=_sizes([len(phases) for phases in taps]),
        taps=_sizes([max(phase.count for phase in phases) for phases in taps]),
        reach=_sizes([_reach(phases) for phases in taps]),
        step=p.stride if forward else (1, 1, 1),
        multiplier=p.multiplier,
    )


def _weight_shape(p: Problem) -> schedule.WeightShape:
    reach = _sizes([p.dilation[d] * (p.kernel[d] - 1) for d in range(3)])
    return schedule.WeightShape(p.channels, p.batch, p.output, p.kernel, reach, p.stride, p.multiplier)


def copied(p: Problem) -> float:
    """Numbers of the source that are copied into tiles for each position of the result (of grad_output, where its
    product with them is summed), by the usual schedule."""
    if p.which == "grad_weight":
        shape = _weight_shape(p)
        boxes = schedule.weight_boxes(
            shape, schedule.weight_tile(shape, p.channels_last, host()), p.channels_last, host()
        )
        return _spread((boxes.box_x, boxes.box_y, 1), shape.image, shape.step, (1, 1, 1), shape.reach)
    source = _gather_shape(p, _taps(p))
    tile = schedule.gather_tile(source, p.channels_last, host())
    box = schedule.size_of(source, tile, schedule.gather_boxes(source, tile, p.channels_last, host()))
    return _spread(box, source.image, source.step, source.phases, source.reach)


def _spread(box: Sizes, image: Sizes, step: Sizes, phases: Sizes, reach: Sizes) -> float:
    sizes = [min(size, most) for size, most in zip(box, image, strict=True)]
    under = [schedule.ceil_div(sizes[d], phases[d]) * step[d] + reach[d] for d in range(3)]
    return prod(under) / prod(sizes)


def _gather_plan(p: Problem, threads: int) -> Plan:
    taps, forward = _taps(p), p.which == "forward"
    base = [-p.low[d] if forward else p.low[d] // p.stride[d] for d in range(p.dims)]
    shape = _gather_shape(p, taps)
    tile = schedule.gather_tile(shape, p.channels_last, host())
    others = partial(schedule.gather_alternatives, shape, tile, p.channels_last, host())
    # The schedule does not depend on the kind of numbers: the tuner knows problems without it.
    problem = [value for name, value in vars(p).items() if name != "numbers"]
    tile = tuned.choose("depthwise", (*problem, threads), tile, others)
    boxes = schedule.gather_boxes(shape, tile, p.channels_last, host())
    blocks = schedule.ceil_div(p.channels, tile.block)
    items = schedule.items_per_task(blocks, p.batch * schedule.boxes_in(shape, tile, boxes), threads)
    planes = 1 if p.channels_last else min(items, schedule.planes(shape, tile, boxes))
    kind = (p.dims, p.channels_last, not forward)
    cut_rows = not p.channels_last and schedule.size_of(shape, tile, boxes)[0] < shape.image[0]
    spec = GatherSpec(*kind, tuple(taps), shape.step, p.multiplier, p.bias, p.activation, tile, p.numbers, cut_rows)
    return Plan(
        key=repr(spec),
        build=partial(depthwise_gather.build, spec),
        arguments=(*base, *boxes[: p.dims], items, planes),
        description=lambda: tile._asdict() | {"boxes": boxes, "blocks_per_task": items, "planes": planes},
    )


def _weight_plan(p: Problem, threads: int) -> Plan:
    shape = _weight_shape(p)
    tile = schedule.weight_tile(shape, p.channels_last, host())
    boxes = schedule.weight_boxes(shape, tile, p.channels_last, host())
    items = schedule.items_per_task(schedule.ceil_div(p.channels, tile.block), 1, threads)
    cut_rows = not p.channels_last and boxes.box_x < p.output[0]
    spec = WeightSpec(p.dims, p.channels_last, p.kernel, p.stride, p.dilation, p.multiplier, tile, p.numbers, cut_rows)
    return Plan(
        key=repr(spec),
        build=partial(depthwise_weight_grad.build, spec),
        arguments=(*(-low for low in p.low[: p.dims]), *asdict(boxes).values(), items),
        description=lambda: tile._asdict() | asdict(boxes) | {"blocks_per_task": items},
    )
