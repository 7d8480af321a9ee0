"""From the shapes of a depthwise convolution to a kernel and the numbers it is called with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from typing import Any, ClassVar

from sepconv.kernels.case import Case
from sepconv.kernels.halide.conv import depthwise_gather, depthwise_weight_grad
from sepconv.kernels.halide.conv.depthwise_gather import GatherSpec
from sepconv.kernels.halide.conv.depthwise_taps import Phase, forward_taps, transposed_taps
from sepconv.kernels.halide.conv.depthwise_weight_grad import WeightSpec
from sepconv.kernels.halide.numbers import KINDS
from sepconv.kernels.halide.schedule import depthwise as schedule
from sepconv.kernels.halide.schedule import tuned
from sepconv.kernels.halide.schedule.depthwise import Sizes
from sepconv.kernels.halide.schedule.machine import host

Numbers = tuple[int, ...]

# Below this many channels a vector of channels is mostly empty.
_LEAST_CHANNELS = 4


@dataclass(frozen=True)
class DepthwiseProblem:
    """One pass of a depthwise convolution. ``image`` is the size of x, ``output`` that of the convolution's result;
    ``numbers`` is the kind of what is read, ``written`` of what is written (see ``numbers``); filters and bias are
    float32.

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
    written: str = "float32"

    @property
    def bytes(self) -> int:
        """Size of x and of the result in float32."""
        return 4 * self.batch * self.channels * (prod(self.image) + self.multiplier * prod(self.output))


@dataclass(frozen=True)
class DepthwisePlan:
    """``build`` makes the kernel for ``key``; ``arguments`` are its numbers; ``description()`` is for people."""

    problem: DepthwiseProblem
    key: str
    build: Callable[[], tuple[Any, list[Any]]]
    arguments: Numbers
    description: Callable[[], dict[str, Any]]
    variant: ClassVar[str] = "in place"  # weights are not packed


def _xyz(values: Sequence[int], missing: int) -> Sizes:
    x, y, z = (*reversed(values), missing, missing)[:3]
    return x, y, z


def problem(case: Case) -> DepthwiseProblem:
    """The problem with tensors of these sizes; a case is in PyTorch's order."""
    image, g = case.x.shape, case.geometry
    return DepthwiseProblem(
        case.which,
        case.x.dims,
        _reads_channels_last(case),
        batch=image[0],
        channels=image[1],
        multiplier=case.weight.shape[0] // image[1],
        image=_xyz(image[2:], 1),
        output=_xyz(case.y.shape[2:], 1),
        kernel=_xyz(case.kernel_size, 1),
        stride=_xyz(g.stride, 1),
        low=_xyz([low for low, _ in g.padding], 0),
        dilation=_xyz(g.dilation, 1),
        bias=case.bias is not None,
        activation=case.activation,
        numbers=KINDS[case.x.dtype],
        written=KINDS[case.result.dtype],
    )


def _reads_channels_last(case: Case) -> bool:
    if case.bound:
        return case.x.dims == 2 and not (case.x.contiguous and case.y.contiguous)
    read = case.y if case.which == "grad_input" else case.x
    return case.x.shape[1] >= _LEAST_CHANNELS and read.channels_last


def plan(case: Case) -> DepthwisePlan:
    """The kernel and its schedule for such tensors."""
    p = problem(case)
    return _weight_plan(p, case.threads) if p.which == "grad_weight" else _gather_plan(p, case)


def _taps(p: DepthwiseProblem) -> list[tuple[Phase, ...]]:
    if p.which == "forward":
        return [forward_taps(p.kernel[d], p.dilation[d]) for d in range(3)]
    return [transposed_taps(p.kernel[d], p.stride[d], p.dilation[d], p.low[d]) for d in range(3)]


def _reach(phases: tuple[Phase, ...]) -> int:
    ends = [p.offset + j * p.advance for p in phases if p.count for j in (0, p.count - 1)]
    return max(ends) - min(ends)


def _sizes(values: Sequence[int]) -> Sizes:
    x, y, z = values
    return x, y, z


def _gather_shape(p: DepthwiseProblem, taps: list[tuple[Phase, ...]]) -> schedule.GatherShape:
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


def _weight_shape(p: DepthwiseProblem) -> schedule.WeightShape:
    reach = _sizes([p.dilation[d] * (p.kernel[d] - 1) for d in range(3)])
    return schedule.WeightShape(p.channels, p.batch, p.output, p.kernel, reach, p.stride, p.multiplier)


def copied(p: DepthwiseProblem) -> float:
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


def _gather_plan(p: DepthwiseProblem, case: Case) -> DepthwisePlan:
    taps, forward = _taps(p), p.which == "forward"
    base = [-p.low[d] if forward else p.low[d] // p.stride[d] for d in range(p.dims)]
    shape = _gather_shape(p, taps)
    tile = schedule.gather_tile(shape, p.channels_last, host())
    others = partial(schedule.gather_alternatives, shape, tile, p.channels_last, host())
    # The schedule does not depend on the kind of numbers: the tuner knows problems without it.
    known = [value for name, value in vars(p).items() if name not in ("numbers", "written")]
    threads = case.threads
    tile = tuned.choose("depthwise", (*known, threads), tile, others, case)
    boxes = schedule.gather_boxes(shape, tile, p.channels_last, host())
    blocks = schedule.ceil_div(p.channels, tile.block)
    items = schedule.items_per_task(blocks, p.batch * schedule.boxes_in(shape, tile, boxes), threads)
    planes = 1 if p.channels_last else min(items, schedule.planes(shape, tile, boxes))
    kind = (p.dims, p.channels_last, not forward)
    cut_rows = not p.channels_last and schedule.size_of(shape, tile, boxes)[0] < shape.image[0]
    spec = GatherSpec(
        *kind, tuple(taps), shape.step, p.multiplier, p.bias, p.activation, tile, p.numbers, cut_rows, p.written
    )
    return DepthwisePlan(
        p,
        key=repr(spec),
        build=partial(depthwise_gather.build, spec),
        arguments=(*base, *boxes[: p.dims], items, planes),
        description=lambda: tile._asdict() | {"boxes": boxes, "blocks_per_task": items, "planes": planes},
    )


def _weight_plan(p: DepthwiseProblem, threads: int) -> DepthwisePlan:
    shape = _weight_shape(p)
    tile = schedule.weight_tile(shape, p.channels_last, host())
    boxes = schedule.weight_boxes(shape, tile, p.channels_last, host())
    items = schedule.items_per_task(schedule.ceil_div(p.channels, tile.block), 1, threads)
    cut_rows = not p.channels_last and boxes.box_x < p.output[0]
    spec = WeightSpec(p.dims, p.channels_last, p.kernel, p.stride, p.dilation, p.multiplier, tile, p.numbers, cut_rows)
    return DepthwisePlan(
        p,
        key=repr(spec),
        build=partial(depthwise_weight_grad.build, spec),
        arguments=(*(-low for low in p.low[: p.dims]), *asdict(boxes).values(), items),
        description=lambda: tile._asdict() | asdict(boxes) | {"blocks_per_task": items},
    )
