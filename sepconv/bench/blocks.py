"""``sepconv bench blocks``: every distinct separable block of MobileNet v1 and v2 against PyTorch in both layouts.

The shapes come from walking the models, so no second list of them can drift. Of MobileNet v2 a block here is the
depthwise convolution and the projection behind it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

import sepconv
from sepconv.bench.records import Record
from sepconv.cost import count
from sepconv.kernels import case as cases
from sepconv.kernels.case import Geometry
from sepconv.kernels.halide.conv import separable
from sepconv.kernels.layout import new_output
from sepconv.models import MobileNetV1, MobileNetV2
from sepconv.ops.explain import record
from sepconv.system.threads import threads_set_to
from sepconv.system.timing import interleaved

_FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@dataclass(frozen=True)
class Block:
    """A depthwise 3x3 and a pointwise convolution, each with a bias; ReLU6 between and, in v1, at the end."""

    network: str
    channels: int
    out_channels: int
    side: int
    stride: int
    activation: str

    @property
    def name(self) -> str:
        step = f" s{self.stride}" if self.stride > 1 else ""
        return f"{self.network} {self.channels}-{self.out_channels} {self.side}px{step}"

    @property
    def out_side(self) -> int:
        return -(-self.side // self.stride)

    @property
    def macs(self) -> int:
        return self.out_side**2 * self.channels * (9 + self.out_channels)

    @property
    def bytes(self) -> int:
        weights = self.channels * (9 + self.out_channels)
        return 4 * (self.channels * self.side**2 + self.out_channels * self.out_side**2 + weights)


def blocks() -> Counter[Block]:
    """The distinct blocks of both networks at 224 pixels, and how often each occurs."""
    found: Counter[Block] = Counter()
    for network, model, activation in (("v1", MobileNetV1(), "relu6"), ("v2", MobileNetV2(), "")):
        layers = [layer for layer in count(model, (3, 224, 224)).layers if layer.macs]
        for dw, pw in pairwise(layers):
            if dw.kind == "depthwise":
                channels, side = dw.input_shape[:2]
                found[Block(network, channels, pw.output_shape[0], side, dw.stride[0], activation)] += 1
    return found


def _tensors(block: Block, batch: int, memory_format: torch.memory_format) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    c, o = block.channels, block.out_channels
    x = random(batch, c, block.side, block.side).contiguous(memory_format=memory_format)
    return x, random(c, 1, 3, 3) / 3, random(c), random(o, c, 1, 1) / c**0.5, random(o)


def ours(block: Block, t: tuple[Tensor, ...]) -> Tensor:
    x, dw, dw_bias, pw, pw_bias = t
    return sepconv.separable_conv2d(
        x, dw, pw, dw_bias, pw_bias, block.stride, 1, depthwise_activation="relu6", activation=block.activation or None
    )


def pytorchs(block: Block, t: tuple[Tensor, ...]) -> Tensor:
    x, dw, dw_bias, pw, pw_bias = t
    hidden = F.conv2d(x, dw, dw_bias, block.stride, 1, groups=block.channels)
    y = F.conv2d(F.relu6(hidden), pw, pw_bias)
    return F.relu6(y) if block.activation else y


def bound(block: Block, t: tuple[Tensor, ...]) -> tuple[str, Callable[[], object], Tensor]:
    """The block as it runs within a network of ``sepconv.compile``: weights packed once, memory fixed.

    Returns:
        Why there is no such kernel ("" if there is), the call, and the tensor that it fills.
    """
    x, dw, dw_bias, pw, pw_bias = t
    geometry = Geometry((block.stride,) * 2, ((1, 1), (1, 1)), (1, 1))
    first = cases.depthwise(x, dw, dw_bias, geometry, "relu6")
    whole = cases.separable(first, cases.pointwise(first.y, pw, pw_bias, None, block.activation))
    reason = separable.supports(whole)
    if reason:
        return reason, lambda: None, x
    found = separable.plan(whole)
    packed = separable.pack(found, (dw, pw, dw_bias, pw_bias))
    out = new_output(x, block.out_channels, found.size)
    return "", separable.bind(found, x, packed, None, out), out


def _error(result: Tensor, block: Block, t: tuple[Tensor, ...]) -> float:
    """Error against float64 in units of the rounding bound of both sums."""
    x, dw, dw_bias, pw, pw_bias = (v.double().contiguous() for v in t)
    truth = pytorchs(block, (x, dw, dw_bias, pw, pw_bias))
    hidden = F.conv2d(x.abs(), dw.abs(), dw_bias.abs(), block.stride, 1, groups=block.channels)
    size = F.conv2d(hidden, pw.abs(), pw_bias.abs())
    bound = (9 + block.channels + 4) * torch.finfo(torch.float32).eps * size
    return float(((result.double() - truth).abs() / bound).max())


def run_block(block: Block, batch: int, threads: int, seconds: float) -> Iterator[Record]:
    """Verify both contenders in both layouts, then time them.

    Raises:
        ValueError: a result is outside its rounding bound; nothing of the block was timed.
    """
    calls: dict[str, Callable[[], object]] = {}
    errors, kernels = {}, {}
    case = f"{block.name} b{batch}"
    with threads_set_to(threads), torch.inference_mode():
        for layout, memory_format in _FORMATS.items():
            t = _tensors(block, batch, memory_format)
            for contender, function in (("torch", pytorchs), ("sepconv", ours)):
                key = f"{contender}-{layout}"
                with record() as choices:
                    result = function(block, t)
                errors[key] = _error(result, block, t)
                if not errors[key] <= 1:
                    raise ValueError(f"bench blocks: {key}, {case}: {errors[key]:.3g} times the rounding bound")
                calls[key] = partial(function, block, t)
                kernels[key] = choices[0].kernel if choices else "torch"
        t = _tensors(block, batch, torch.channels_last)
        reason, fast, out = bound(block, t)
        if not reason:
            fast()
            errors["bound-nhwc"] = _error(out, block, t)
            if not errors["bound-nhwc"] <= 1:
                raise ValueError(f"bench blocks: bound, {case}: {errors['bound-nhwc']:.3g} times the rounding bound")
            calls["bound-nhwc"], kernels["bound-nhwc"] = fast, "halide"
        for key, timing in interleaved(calls, seconds).items():
            contender, layout = key.split("-")
            name = {"torch": key, "bound": "sepconv-bound"}.get(contender, contender)
            yield Record(
                "blocks", case, name, threads, layout, timing.median_ms, timing.low_ms, timing.high_ms,
                timing.samples, batch * block.macs, batch * block.bytes, round(errors[key], 4), kernels[key],
            )  # fmt: skip
