"""Depthwise convolution of float32 tensors on CPUs: forward, gradient of the input, of the filters and of the bias.

Tensors are (N, C, ...) with one to three spatial dimensions, weights (C*M, 1, ...); output channel c*M + m depends on
input channel c alone. Contiguous and channels_last tensors are read in place, views included; others are copied once.
The result has the layout of the first tensor. Padding is one (low, high) pair per spatial dimension.

``which`` names a pass and the two tensors that go with it:

    "forward"      x, weight
    "grad_input"   grad_output, weight
    "grad_weight"  grad_output, x
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from sepconv.kernels import depthwise_gather, depthwise_weight_grad, runtime
from sepconv.kernels import schedule_depthwise as schedule
from sepconv.kernels.depthwise_gather import GatherSpec
from sepconv.kernels.depthwise_taps import Phase, forward_taps, transposed_taps
from sepconv.kernels.depthwise_weight_grad import WeightSpec
from sepconv.kernels.layout import is_channels_last
from sepconv.kernels.machine import host

Padding = Sequence[tuple[int, int]]
Numbers = tuple[int, ...]

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
# Below this many channels a vector of channels is mostly empty.
_LEAST_CHANNELS = 4
_NO_BIAS = torch.zeros(1)
_PASSES = ("forward", "grad_input", "grad_weight")


def supports(
    which: str,
    first: Tensor,
    second: Tensor,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    activation: str = "",
) -> str:
    """Why this kernel cannot do it, in a sentence; the empty string if it can."""
    if which not in _PASSES:
        raise ValueError(f"depthwise.supports: which must be one of {_PASSES} but is {which!r}")
    return runtime.missing() or runtime.unsuitable(first, second)


@dataclass(frozen=True)
class _Problem:
    """Everything that the choice of kernel and schedule depends on; spatial sizes in the order x, y, z."""

    which: str
    channels_last: bool
    batch: int
    channels: int
    multiplier: int
    image: schedule.Sizes
    output: schedule.Sizes
    kernel: schedule.Sizes
    stride: schedule.Sizes
    low: schedule.Sizes
    dilation: schedule.Sizes
    bias: bool
    activation: str


@dataclass(frozen=True)
class _Plan:
    """A kernel and the numbers it is called with."""

    key: str
    build: Any
    arguments: Numbers
    description: dict[str, Any]


def _xyz(values: Sequence[int], missing: int) -> schedule.Sizes:
    x, y, z = (*reversed(values), missing, missing)[:3]
    return x, y, z


@lru_cache(maxsize=4096)
def _problem(
    which: str,
    channels_last: bool,
    image: Numbers,
    output: Numbers,
    weight: Numbers,
    stride: Numbers,
    low: Numbers,
    dilation: Numbers,
    bias: bool,
    activation: str,
) -> _Problem:
    return _Problem(
        which,
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
    )


@lru_cache(maxsize=4096)
def _plan(problem: _Problem, threads: int) -> _Plan:
    return (_weight_plan if problem.which == "grad_weight" else _gather_plan)(problem, threads)


def _taps(p: _Problem) -> tuple[tuple[Phase, ...], ...]:
    if p.which == "forward":
        return tuple(forward_taps(p.kernel[d], p.dilation[d]) for d in range(3))
    return tuple(transposed_taps(p.kernel[d], p.stride[d], p.dilation[d], p.low[d]) for d in range(3))


def _gather_plan(p: _Problem, threads: int) -> _Plan:
    taps, forward = _taps(p), p.which == "forward"
    step = p.stride if forward else (1, 1, 1)
    base = tuple(-p.low[d] if forward else p.low[d] // p.stride[d] for d in range(3))
    shape = schedule.GatherShape(
        channels=p.channels,
        batch=p.batch,
        image=p.output if forward else p.image,
        phases=_xyz([len(phases) for phases in reversed(taps)], 1),
        taps=_xyz([max(phase.count for phase in phases) for phases in reversed(taps)], 1),
        reach=_xyz([_reach(phases) for phases in reversed(taps)], 0),
        step=step,
        multiplier=p.multiplier,
    )
    tile = schedule.gather_tile(shape, p.channels_last, host())
    boxes = schedule.gather_boxes(shape, tile, p.channels_last, host())
    blocks = schedule.ceil_div(p.channels, tile.block)
    others = p.batch * schedule.boxes_in(shape, tile, boxes)
    spec = GatherSpec(p.channels_last, not forward, taps, step, p.multiplier, p.bias, p.activation, tile)
    return _Plan(
        key=repr(spec),
        build=partial(depthwise_gather.build, spec),
        arguments=(*base, *boxes, schedule.items_per_task(blocks, others, threads)),
        description=asdict(tile) | {"boxes": boxes},
    )


def _reach(phases: tuple[Phase, ...]) -> int:
    ends = [p.offset + j * p.advance for p in phases if p.count for j in (0, p.count - 1)]
    return max(ends) - min(ends)


def _weight_plan(p: _Problem, threads: int) -> _Plan:
    reach = _xyz([p.dilation[d] * (p.kernel[d] - 1) for d in (2, 1, 0)], 0)
    shape = schedule.WeightShape(p.channels, p.batch, p.output, p.kernel, reach, p.stride, p.multiplier)
    tile = schedule.weight_tile(shape, p.channels_last, host())
    boxes = schedule.weight_boxes(shape, tile, p.channels_last, host())
    spec = WeightSpec(p.channels_last, p.kernel, p.stride, p.dilation, p.multiplier, tile)
    blocks = schedule.ceil_div(p.channels, tile.block)
    return _Plan(
        key=repr(spec),
        build=partial(depthwise_weight_grad.build, spec),
        arguments=(*(-low for low in p.low), *asdict(boxes).values(), schedule.items_per_task(blocks, 1, threads)),
        description=asdict(tile) | asdict(boxes),
    )


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    activation: str = "",
) -> Tensor:
    """``F.conv2d(x, weight, bias, stride, padding, dilation, groups=C)``, then the activation."""
    sizes = [
        (size + low + high - d * (k - 1) - 1) // s + 1
        for size, (low, high), k, s, d in zip(x.shape[2:], padding, weight.shape[2:], stride, dilation, strict=True)
    ]
    shape = (x.shape[0], weight.shape[0], *sizes)
    wide = _kernel_layout(x, x.shape[1])
    out = _empty(shape, wide, x)
    if out.numel():
        problem = _problem(
            "forward",
            wide,
            tuple(x.shape),
            shape,
            tuple(weight.shape),
            tuple(stride),
            tuple([low for low, _ in padding]),
            tuple(dilation),
            bias is not None,
            activation,
        )
        _gather(problem, x, 1, weight, bias, out, problem.multiplier)
    return _in_layout_of(x, out, wide)


def grad_input(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
) -> Tensor:
    """Gradient with respect to x, of shape ``input_size``."""
    wide = _kernel_layout(grad_output, input_size[1])
    out = _empty(input_size, wide, grad_output)
    if out.numel():
        problem = _problem(
            "grad_input",
            wide,
            tuple(input_size),
            tuple(grad_output.shape),
            tuple(weight.shape),
            tuple(stride),
            tuple([low for low, _ in padding]),
            tuple(dilation),
            False,
            "",
        )
        _gather(problem, grad_output, problem.multiplier, weight, None, out, 1)
    return _in_layout_of(grad_output, out, wide)


def grad_weight(
    grad_output: Tensor,
    x: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
) -> Tensor:
    """Gradient with respect to the filters, contiguous, of shape ``weight_size``."""
    out = grad_output.new_empty(tuple(weight_size))
    if grad_output.numel() == 0:
        return out.zero_()
    wide = _kernel_layout(x, x.shape[1])
    problem = _problem(
        "grad_weight",
        wide,
        tuple(x.shape),
        tuple(grad_output.shape),
        tuple(weight_size),
        tuple(stride),
        tuple([low for low, _ in padding]),
        tuple(dilation),
        False,
        "",
    )
    plan = _plan(problem, torch.get_num_threads())
    call = runtime.compiled(plan.key, plan.build)
    call(
        _planes(_readable(x, wide), 1),
        _planes(_readable(grad_output, wide), problem.multiplier),
        *plan.arguments,
        _filters(out, problem.multiplier),
    )
    return out


def grad_bias(grad_output: Tensor) -> Tensor:
    """Gradient with respect to the bias: the sum over images and positions."""
    return grad_output.sum([0, *range(2, grad_output.dim())])


def _gather(
    problem: _Problem, source: Tensor, source_m: int, weight: Tensor, bias: Tensor | None, out: Tensor, out_m: int
) -> None:
    plan = _plan(problem, torch.get_num_threads())
    call = runtime.compiled(plan.key, plan.build)
    call(
        _planes(_readable(source, problem.channels_last), source_m),
        _filters(weight, problem.multiplier),
        _biases(_NO_BIAS if bias is None else bias, problem.multiplier),
        *plan.arguments,
        _planes(out, out_m),
    )


def bind(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    activation: str,
    out: Tensor,
) -> Callable[[], None]:
    """The call of :func:`forward` that fills ``out`` from what is then in ``x``: for repeated use of the same memory.

    ``x`` and ``out`` are both contiguous or both channels_last.
    """
    problem = _problem(
        "forward",
        x.dim() > 3 and x.stride(1) == 1,
        tuple(x.shape),
        tuple(out.shape),
        tuple(weight.shape),
        tuple(stride),
        tuple([low for low, _ in padding]),
        tuple(dilation),
        bias is not None,
        activation,
    )
    plan = _plan(problem, torch.get_num_threads())
    return partial(
        runtime.compiled(plan.key, plan.build),
        _planes(x, 1),
        _filters(weight, problem.multiplier),
        _biases(_NO_BIAS if bias is None else bias, problem.multiplier),
        *plan.arguments,
        _planes(out, problem.multiplier),
    )


def _kernel_layout(x: Tensor, channels: int) -> bool:
    """Whether the channels_last kernel runs. It takes the input as it lies, unless a vector would be mostly empty."""
    return channels >= _LEAST_CHANNELS and is_channels_last(x)


def _empty(shape: Sequence[int], channels_last: bool, like: Tensor) -> Tensor:
    memory_format = _FORMATS[len(shape)] if channels_last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=like.dtype, memory_format=memory_format)


def _in_layout_of(x: Tensor, out: Tensor, channels_last: bool) -> Tensor:
    if channels_last or not is_channels_last(x):
        return out
    return out.contiguous(memory_format=_FORMATS[x.dim()])


def _readable(tensor: Tensor, channels_last: bool) -> Tensor:
    """The tensor, or a copy if the dimension that vectors run along does not lie side by side."""
    if tensor.stride(1 if channels_last else -1) == 1:
        return tensor
    memory_format = _FORMATS[tensor.dim()] if channels_last else torch.contiguous_format
    return tensor.clone(memory_format=memory_format)


def _planes(tensor: Tensor, multiplier: int) -> Any:
    """(N, C*M, ...) as a buffer x, y, z, m, c, n."""
    n, channels, *space = tensor.shape
    return runtime.buffer(tensor, (n, channels // multiplier, multiplier, *(1,) * (3 - len(space)), *space))


def _filters(weight: Tensor, multiplier: int) -> Any:
    """(C*M, 1, ...) as a buffer x, y, z, m, c."""
    channels, _, *space = weight.shape
    return runtime.buffer(weight, (channels // multiplier, multiplier, *(1,) * (3 - len(space)), *space))


def _biases(bias: Tensor, multiplier: int) -> Any:
    return runtime.buffer(bias, (-1, multiplier) if bias.numel() > 1 else (1, 1))
