"""``sepconv bench ops``: depthwise convolutions of every kind, each pass, against PyTorch in both layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from sepconv import ops
from sepconv.bench.records import Record
from sepconv.kernels.case import Geometry
from sepconv.kernels.triton import events
from sepconv.ops import autograd
from sepconv.ops.explain import record
from sepconv.ops.geometry import resolve
from sepconv.system.threads import threads_set_to
from sepconv.system.timing import Timing, interleaved

_OURS = {1: ops.depthwise_conv1d, 2: ops.depthwise_conv2d, 3: ops.depthwise_conv3d}
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_FORMATS = {
    "nchw": {1: torch.contiguous_format, 2: torch.contiguous_format, 3: torch.contiguous_format},
    "nhwc": {2: torch.channels_last, 3: torch.channels_last_3d},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEVICES = ("cpu", "cuda")
PASSES = ("forward", "grad_input", "grad_weight")


@dataclass(frozen=True)
class OpCase:
    """One depthwise convolution as it occurs in a network."""

    batch: int
    channels: int
    image: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: int = 1
    dilation: int = 1
    multiplier: int = 1

    @property
    def name(self) -> str:
        size = "x".join(map(str, (self.batch, self.channels, *self.image)))
        extras = [
            "k" + "x".join(map(str, self.kernel)),
            f"s{self.stride}" if self.stride > 1 else "",
            f"d{self.dilation}" if self.dilation > 1 else "",
            f"m{self.multiplier}" if self.multiplier > 1 else "",
        ]
        return " ".join([size, *filter(None, extras)])

    @property
    def geometry(self) -> Geometry:
        padding = tuple(self.dilation * (k - 1) // 2 for k in self.kernel)
        return resolve("bench", len(self.image), self.kernel, self.stride, padding, self.dilation)

    @property
    def output(self) -> tuple[int, ...]:
        return self.geometry.output_size(self.image, self.kernel)

    @property
    def macs(self) -> int:
        return self.batch * self.channels * self.multiplier * prod(self.kernel) * prod(self.output)


CASES = [
    # 3x3 of MobileNet v1 and v2
    OpCase(1, 32, (112, 112), (3, 3)),
    OpCase(1, 96, (112, 112), (3, 3), stride=2),
    OpCase(8, 128, (56, 56), (3, 3)),
    OpCase(8, 128, (56, 56), (3, 3), stride=2),
    OpCase(32, 512, (14, 14), (3, 3)),
    OpCase(1, 512, (14, 14), (3, 3)),
    OpCase(1, 1024, (7, 7), (3, 3)),
    OpCase(8, 960, (7, 7), (3, 3)),
    # 5x5 of EfficientNet and MobileNetV3
    OpCase(8, 240, (28, 28), (5, 5)),
    OpCase(1, 672, (14, 14), (5, 5)),
    OpCase(1, 144, (56, 56), (5, 5), stride=2),
    # 7x7 of ConvNeXt
    OpCase(8, 96, (56, 56), (7, 7)),
    OpCase(1, 384, (14, 14), (7, 7)),
    OpCase(32, 768, (7, 7), (7, 7)),
    # 31x31 of RepLKNet
    OpCase(2, 64, (56, 56), (31, 31)),
    OpCase(1, 128, (28, 28), (31, 31)),
    # dilated, rectangular, several filters a channel
    OpCase(8, 128, (28, 28), (3, 3), dilation=2),
    OpCase(8, 256, (28, 28), (3, 3), dilation=4),
    OpCase(8, 64, (28, 28), (1, 7)),
    OpCase(8, 64, (28, 28), (11, 1)),
    OpCase(8, 64, (28, 28), (3, 3), multiplier=2),
    OpCase(8, 64, (56, 56), (3, 3), multiplier=4),
    # signals: Mamba (4), Conformer (15, 31), long filters
    OpCase(2, 1536, (512,), (4,)),
    OpCase(16, 256, (400,), (15,)),
    OpCase(8, 256, (2048,), (31,)),
    OpCase(8, 128, (1000,), (63,)),
    # volumes: video and medical images
    OpCase(2, 48, (8, 28, 28), (3, 3, 3)),
    OpCase(1, 32, (16, 32, 32), (3, 3, 3)),
    OpCase(1, 96, (8, 14, 14), (3, 3, 3), stride=2),
]


@dataclass(frozen=True)
class Tensors:
    """The operands of all three passes in one layout."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    grad: Tensor


def make_tensors(
    case: OpCase, memory_format: torch.memory_format, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    filters = case.channels * case.multiplier

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return Tensors(
        random(case.batch, case.channels, *case.image).contiguous(memory_format=memory_format),
        random(filters, 1, *case.kernel),
        random(filters),
        random(case.batch, filters, *case.output).contiguous(memory_format=memory_format),
    )


def ours(case: OpCase, t: Tensors) -> dict[str, Callable[[], Tensor]]:
    g, conv = case.geometry, _OURS[len(case.image)]
    padding = [low for low, _ in g.padding]
    x_size, w_size = list(t.x.shape), list(t.weight.shape)
    return {
        "forward": lambda: conv(t.x, t.weight, t.bias, g.stride, padding, g.dilation),
        "grad_input": lambda: autograd.depthwise_grad_input(t.grad, t.weight, x_size, g),
        "grad_weight": lambda: autograd.depthwise_grad_weight(t.grad, t.x, w_size, g),
    }


def pytorchs(case: OpCase, t: Tensors) -> dict[str, Callable[[], Tensor]]:
    g = case.geometry
    padding = [low for low, _ in g.padding]
    conv, backward = _CONV[len(case.image)], torch.ops.aten.convolution_backward.default
    arguments = (None, g.stride, padding, g.dilation, False, [0] * len(padding), case.channels)
    return {
        "forward": lambda: conv(t.x, t.weight, t.bias, g.stride, padding, g.dilation, case.channels),
        "grad_input": lambda: backward(t.grad, t.x, t.weight, *arguments, [True, False, False])[0],
        "grad_weight": lambda: backward(t.grad, t.x, t.weight, *arguments, [False, True, False])[1],
    }


def bounds(case: OpCase, t: Tensors) -> dict[str, tuple[Tensor, Tensor]]:
    """The float64 truth of each pass, and the bound of its rounding: terms * eps * (the same on absolute values).

    A result of 16 bits is summed in float32 and rounded once more.
    """
    doubles = Tensors(*(v.double().contiguous() for v in (t.x, t.weight, t.bias, t.grad)))
    sizes = Tensors(*(v.abs() for v in (doubles.x, doubles.weight, doubles.bias, doubles.grad)))
    taps = prod(case.kernel)
    terms = {"forward": taps + 1, "grad_input": taps * case.multiplier, "grad_weight": case.batch * prod(case.output)}
    eps = torch.finfo(torch.float32).eps
    true, large = pytorchs(case, doubles), pytorchs(case, sizes)
    last = 0.0 if t.x.dtype is torch.float32 else torch.finfo(t.x.dtype).eps
    return {p: (true[p](), (terms[p] + 2) * eps * large[p]() + last * true[p]().abs() + 1e-30) for p in PASSES}


def _bytes(case: OpCase, itemsize: int) -> int:
    x = case.batch * case.channels * prod(case.image)
    y = case.batch * case.channels * case.multiplier * prod(case.output)
    weight = case.channels * case.multiplier * prod(case.kernel)
    return itemsize * (x + y + weight)


def suite_name(dtype: torch.dtype, device: str = "cpu") -> str:
    parts = ["ops", *[device] * (device != "cpu"), *[str(dtype).removeprefix("torch.")] * (dtype is not torch.float32)]
    return "-".join(parts)


def _timed(calls: dict[str, Callable[[], Tensor]], seconds: float, device: str) -> dict[str, Timing]:
    """On a GPU what the device alone takes, with flushed caches, as the proof of its kernels measures."""
    if device == "cpu":
        return interleaved(calls, seconds)
    return events.interleaved(calls, seconds, torch.device(device, torch.cuda.current_device()))


def run_case(
    case: OpCase, threads: int, seconds: float, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Iterator[Record]:
    """Verify every contender and pass, then time them.

    Raises:
        ValueError: a result is outside its rounding bound; nothing of the case was timed. PyTorch's own may be on a
            GPU, whose float32 may have fewer digits, and in 16 bits, where some processors sum in them; its error is
            recorded.
    """
    layouts = [name for name, formats in _FORMATS.items() if len(case.image) in formats]
    tensors = {name: make_tensors(case, _FORMATS[name][len(case.image)], dtype, device) for name in layouts}
    suite, exact = suite_name(dtype, device), device == "cpu" and dtype is torch.float32
    truth = bounds(case, tensors["nchw"])
    with threads_set_to(threads), torch.inference_mode():
        for which in PASSES:
            calls, errors, kernels = {}, {}, {}
            for layout, t in tensors.items():
                for contender, make in (("torch", pytorchs), ("sepconv", ours)):
                    call, key = make(case, t)[which], f"{contender}-{layout}"
                    with record() as choices:
                        result = call()
                    expected, bound = truth[which]
                    errors[key] = float(((result.double() - expected).abs() / bound).max())
                    if not errors[key] <= 1 and (contender == "sepconv" or exact):
                        raise ValueError(f"bench ops: {key}, {case.name}, {which}: {errors[key]:.3g} times the bound")
                    calls[key] = call
                    kernels[key] = choices[0].kernel if choices else "torch"
            for key, timing in _timed(calls, seconds, device).items():
                contender, layout = key.split("-")
                name = key if contender == "torch" else contender
                yield Record(
                    suite, case.name, name, threads, layout, timing.median_ms, timing.low_ms, timing.high_ms,
                    timing.samples, case.macs, _bytes(case, dtype.itemsize), round(errors[key], 4), kernels[key], which,
                )  # fmt: skip
