"""LayerNorm over channels made ready for images of fixed sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from sepconv.kernels.halide.jit.calls import KernelCall, Strided
from sepconv.kernels.halide.training import finish_calls, layer_norm
from sepconv.kernels.halide.training.depthwise_calls import rows_layout, vector, vector_layout
from sepconv.kernels.halide.training.finish_calls import Pixels
from sepconv.kernels.prologue import InputGradients, StageCase

supports = finish_calls.supports
describe = finish_calls.describe
# Measured: below it Python in front of a kernel costs more than the pass that is saved.
_LEAST_NUMBERS = 1 << 17


def slower(case: StageCase) -> str:
    """Why PyTorch's kernels are expected to be as fast, in a sentence; the empty string if these are faster."""
    return f"{case.x.elements:,} numbers are too few to pay" if case.x.elements < _LEAST_NUMBERS else ""


def _call(case: StageCase, images: Sequence[Pixels], vectors: int, results: Sequence[Strided]) -> KernelCall:
    spec, channels = finish_calls.spec_of(case), case.x.shape[1]
    given = [image.layout for image in images] + [vector_layout(channels)] * vectors
    arguments = [finish_calls.length(case), case.eps, *given, *results]
    return KernelCall((spec.what, spec), partial(layer_norm.build, spec), arguments)


def prepare(case: StageCase) -> Callable[..., Tensor]:
    """See ``stages.layer_norm``."""
    image, shape, numbers, channels = Pixels(case.x), case.x.shape, case.x.dtype, case.x.shape[1]
    call = _call(case, [image], 2, [finish_calls.result_of(case)])
    usual = torch.ones(channels), torch.zeros(channels)

    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        held = [image.read(x), *[own if t is None else vector(t) for t, own in zip((weight, bias), usual, strict=True)]]
        out = torch.empty(shape, dtype=numbers, memory_format=torch.channels_last)
        call(*[tensor.data_ptr() for tensor in held], out.data_ptr())
        return out

    return run


def prepare_gradients(case: StageCase) -> Callable[..., InputGradients]:
    """See ``stages.layer_norm_gradients``."""
    grads, images = Pixels(case.y), Pixels(case.x)
    shape, channels, numbers = case.x.shape, case.x.shape[1], case.x.dtype
    call = _call(case, [grads, images], 1, [finish_calls.result_of(case), rows_layout(2, channels)])
    ones = torch.ones(channels)

    def run(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> InputGradients:
        held = [grads.read(grad), images.read(x), ones if weight is None else vector(weight)]
        out = torch.empty(shape, dtype=numbers, memory_format=torch.channels_last)
        sums = torch.empty(2, channels)
        call(*[tensor.data_ptr() for tensor in held], out.data_ptr(), sums.data_ptr())
        return InputGradients(out, *sums.unbind())

    return run
