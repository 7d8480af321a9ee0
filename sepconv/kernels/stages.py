"""The parts of a network in training: a convolution with the norm before it and the statistics after it, and back.

Exactly ``nn.BatchNorm`` between convolutions, in as few passes over memory as there can be: see ``prologue`` for what
travels. Tensors in, tensors out; who computes is decided by the lists below, and remembered by sizes and options.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sepconv.kernels.case import Geometry, Outline
from sepconv.kernels.halide.jit.runtime import BuildError
from sepconv.kernels.halide.training import (
    depthwise_calls,
    finish_calls,
    layer_norm_calls,
    normal,
    normal_gradients,
    pointwise,
    pointwise_gradients,
)
from sepconv.kernels.prologue import (
    Deviation,
    InputGradients,
    Need,
    Prologue,
    StageCase,
    StageGradients,
    StageOutput,
    Statistics,
)
from sepconv.kernels.torch import stages as by_torch


@dataclass(frozen=True)
class StageBackend:
    """One way to compute the stages of a list, as ``backends.Backend`` is for single operations."""

    name: str
    prepare: Callable[[StageCase], Callable[..., Any]]
    supports: Callable[[StageCase], str] = lambda case: ""
    slower: Callable[[StageCase], str] = lambda case: ""
    describe: Callable[[StageCase], dict[str, Any]] = lambda case: {}


def _convolution(case: StageCase) -> Callable[..., StageOutput]:
    geometry, statistics = _geometry(case), case.statistics
    return lambda x, prologue, weight, bias: by_torch.convolution(x, prologue, weight, bias, geometry, statistics)


def _convolution_gradients(case: StageCase) -> Callable[..., StageGradients]:
    geometry, need = _geometry(case), case.need
    return lambda grad, deviation, x, prologue, weight: by_torch.convolution_gradients(
        grad, deviation, x, prologue, weight, geometry, need
    )


def _geometry(case: StageCase) -> Geometry:
    assert case.geometry is not None
    return case.geometry


def _halide(kernel: ModuleType, prepare: Callable[[StageCase], Callable[..., Any]] | None = None) -> StageBackend:
    """A module of ``halide.training``, which all offer the same functions."""
    slower = getattr(kernel, "slower", lambda case: "")
    return StageBackend("halide", prepare or kernel.prepare, kernel.supports, slower, kernel.describe)


_TORCH_FORWARD = StageBackend("torch", _convolution)
_TORCH_GRADIENTS = StageBackend("torch", _convolution_gradients)
BACKENDS: dict[tuple[str, str], list[StageBackend]] = {
    ("depthwise", "forward"): [_halide(depthwise_calls, depthwise_calls.prepare), _TORCH_FORWARD],
    ("depthwise", "gradients"): [_halide(depthwise_calls, depthwise_calls.prepare_gradients), _TORCH_GRADIENTS],
    ("pointwise", "forward"): [_halide(pointwise), _TORCH_FORWARD],
    ("pointwise", "gradients"): [_halide(pointwise_gradients), _TORCH_GRADIENTS],
    ("normal", "forward"): [_halide(normal), _TORCH_FORWARD],
    ("normal", "gradients"): [_halide(normal_gradients), _TORCH_GRADIENTS],
    ("finish", "forward"): [
        _halide(finish_calls, finish_calls.prepare),
        StageBackend("torch", lambda case: by_torch.finish),
    ],
    ("finish", "gradients"): [
        _halide(finish_calls, finish_calls.prepare_gradients),
        StageBackend("torch", lambda case: by_torch.finish_gradients),
    ],
    ("statistics", "forward"): [
        _halide(finish_calls, finish_calls.prepare_statistics),
        StageBackend("torch", lambda case: by_torch.statistics),
    ],
    ("layer_norm", "forward"): [
        _halide(layer_norm_calls, layer_norm_calls.prepare),
        StageBackend("torch", lambda case: by_torch.layer_norm),
    ],
    ("layer_norm", "gradients"): [
        _halide(layer_norm_calls, layer_norm_calls.prepare_gradients),
        StageBackend("torch", lambda case: by_torch.layer_norm_gradients),
    ],
}
"""By operation and pass, in order; PyTorch's last."""


class StageChoice:
    """The backend for a case, and why it is none of those before it. Call it with the tensors of the pass."""

    def __init__(self, case: StageCase) -> None:
        self.case = case
        self.reasons: dict[str, str] = {}
        self._others = iter(BACKENDS[case.op, case.which])
        self._take_next()

    def _take_next(self) -> None:
        for backend in self._others:
            reason = backend.supports(self.case) or backend.slower(self.case)
            if not reason:
                try:
                    self.run = backend.prepare(self.case)
                    self.backend = backend
                    return
                except BuildError as error:
                    reason = str(error)
            self.reasons[backend.name] = reason
        raise LookupError(f"no backend for {self.case}: {self.reasons}")

    def __call__(self, *tensors: Any) -> Any:
        watching = watcher.get()
        try:
            result = self.run(*tensors)
        except BuildError as error:
            self.reasons[self.backend.name] = str(error)
            self._take_next()
            return self(*tensors)
        if watching is not None:
            watching(self)
        return result


watcher: ContextVar[Callable[[StageChoice], None] | None] = ContextVar("sepconv_stages", default=None)
"""Who is told of every choice that has run: ``explain``, while it records."""

MAX_CHOICES = 4096
_choices: dict[Hashable, StageChoice] = {}


def forget() -> None:
    """Weigh every case again."""
    _choices.clear()


def choose(case: StageCase) -> StageChoice:
    """Who computes a case."""
    return StageChoice(case)


def _outline(tensor: Tensor) -> tuple[Any, ...]:
    """What is remembered of a tensor."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def _chosen(key: Hashable, describe: Callable[[], StageCase]) -> StageChoice:
    found = _choices.get(key)
    if found is None:
        if len(_choices) >= MAX_CHOICES:
            _choices.clear()
        found = _choices[key] = choose(describe())
    return found


def forward_choice(
    op: str,
    x: Tensor,
    activation: str | None,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    statistics: bool,
) -> StageChoice:
    """Who computes a stage's forward pass; ``activation`` is the prologue's, None without one."""
    key = (op, torch.get_num_threads(), *_outline(x), *_outline(weight), activation, bias is None, geometry, statistics)

    def describe() -> StageCase:
        image, filters = Outline.of(x), Outline.of(weight)
        size = geometry.output_size(image.shape[2:], filters.shape[2:])
        y = Outline.dense((image.shape[0], filters.shape[0], *size), image)
        return StageCase(op, "forward", image, y, filters, geometry, activation, bias is not None, statistics)

    return _chosen(key, describe)


def _forward(
    op: str,
    x: Tensor,
    prologue: Prologue | None,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    statistics: bool,
) -> StageOutput:
    activation = None if prologue is None else prologue.activation
    choice = forward_choice(op, x, activation, weight, bias, geometry, statistics)
    result: StageOutput = choice(x, prologue, weight, bias)
    return result


def gradients_choice(
    op: str, given: Sequence[Tensor], activation: str | None, geometry: Geometry, need: Need, normed: bool = True
) -> StageChoice:
    """Who computes a stage's gradients; ``given``: grad, x and weight, and y where there is a deviation."""
    key = (op, torch.get_num_threads(), *[_outline(t) for t in given], activation, geometry, need, normed)

    def describe() -> StageCase:
        y, image, filters = map(Outline.of, given[:3])
        deviated = len(given) > 3
        return StageCase(
            op, "gradients", image, y, filters, geometry, activation, deviated=deviated, need=need, normed=normed
        )

    return _chosen(key, describe)


def _gradients(
    op: str,
    grad: Tensor,
    deviation: Deviation | None,
    x: Tensor,
    prologue: Prologue | None,
    weight: Tensor,
    geometry: Geometry,
    need: Need,
) -> StageGradients:
    activation, normed = (None, True) if prologue is None else prologue[3:]
    given = (grad, x, weight) if deviation is None else (grad, x, weight, deviation.y)
    choice = gradients_choice(op, given, activation, geometry, need, normed)
    result: StageGradients = choice(grad, deviation, x, prologue, weight)
    return result


def depthwise_stage(
    x: Tensor, prologue: Prologue | None, weight: Tensor, bias: Tensor | None, geometry: Geometry, statistics: bool
) -> StageOutput:
    """``conv(act((x - mean) * scale + bias), weight)`` with a filter (C*M, 1, kH, kW) for each channel, plus its bias;
    then mean and biased variance of each channel of the result if ``statistics``."""
    return _forward("depthwise", x, prologue, weight, bias, geometry, statistics)


def depthwise_stage_gradients(
    grad: Tensor,
    deviation: Deviation | None,
    x: Tensor,
    prologue: Prologue | None,
    weight: Tensor,
    geometry: Geometry,
    need: Need,
) -> StageGradients:
    """Of :func:`depthwise_stage`, from that of y; what its statistics' gradients add to it is ``deviation``."""
    return _gradients("depthwise", grad, deviation, x, prologue, weight, geometry, need)


def pointwise_stage(
    x: Tensor, prologue: Prologue | None, weight: Tensor, bias: Tensor | None, statistics: bool
) -> StageOutput:
    """The same with a weight (O, C, 1, 1), pixel by pixel."""
    return _forward("pointwise", x, prologue, weight, bias, Geometry.of_pixels(x.dim() - 2), statistics)


def pointwise_stage_gradients(
    grad: Tensor, deviation: Deviation | None, x: Tensor, prologue: Prologue | None, weight: Tensor, need: Need
) -> StageGradients:
    """Of :func:`pointwise_stage`."""
    return _gradients("pointwise", grad, deviation, x, prologue, weight, Geometry.of_pixels(x.dim() - 2), need)


def normal_stage(
    x: Tensor, prologue: Prologue | None, weight: Tensor, bias: Tensor | None, geometry: Geometry, statistics: bool
) -> StageOutput:
    """The same with any weight (O, C/groups, kH, kW)."""
    return _forward("normal", x, prologue, weight, bias, geometry, statistics)


def normal_stage_gradients(
    grad: Tensor,
    deviation: Deviation | None,
    x: Tensor,
    prologue: Prologue | None,
    weight: Tensor,
    geometry: Geometry,
    need: Need,
) -> StageGradients:
    """Of :func:`normal_stage`."""
    return _gradients("normal", grad, deviation, x, prologue, weight, geometry, need)


def finish(x: Tensor, prologue: Prologue, residual: Tensor | None = None) -> Tensor:
    """``act((x - mean) * scale + bias) + residual`` as a tensor, for what is none of these kernels."""
    others: Sequence[Tensor] = (x,) if residual is None else (x, residual)
    key = ("finish", torch.get_num_threads(), *[_outline(t) for t in others], prologue.activation)

    def describe() -> StageCase:
        image = Outline.of(x)
        y = image if residual is None else Outline.of(residual)
        return StageCase("finish", "forward", image, y, prologue=prologue.activation, residual=residual is not None)

    result: Tensor = _chosen(key, describe)(x, prologue, residual)
    return result


def finish_gradients(grad: Tensor, x: Tensor, prologue: Prologue) -> InputGradients:
    """Of :func:`finish`; that of the residual is ``grad`` itself."""
    key = ("finish gradients", torch.get_num_threads(), *_outline(grad), *_outline(x), prologue.activation)

    def describe() -> StageCase:
        return StageCase("finish", "gradients", Outline.of(x), Outline.of(grad), prologue=prologue.activation)

    result: InputGradients = _chosen(key, describe)(grad, x, prologue)
    return result


def statistics(x: Tensor) -> Statistics:
    """Mean and biased variance of each channel of an image."""
    key = ("statistics", torch.get_num_threads(), *_outline(x))

    def describe() -> StageCase:
        return StageCase("statistics", "forward", Outline.of(x), Outline.of(x))

    result: Statistics = _chosen(key, describe)(x)
    return result


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Each pixel's channels brought to mean 0 and deviation 1, then ``weight`` and ``bias``."""
    result: Tensor = layer_norm_choice(x, eps)(x, weight, bias, eps)
    return result


def layer_norm_choice(x: Tensor, eps: float) -> StageChoice:
    """Who computes it."""

    def describe() -> StageCase:
        return StageCase("layer_norm", "forward", Outline.of(x), Outline.of(x), eps=float(eps))

    return _chosen(("layer_norm", torch.get_num_threads(), *_outline(x), eps), describe)


def layer_norm_gradients(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> InputGradients:
    """Of :func:`layer_norm`: of x, and the sums that are the gradients of bias and weight."""
    key = ("layer_norm gradients", torch.get_num_threads(), *_outline(grad), *_outline(x), eps)

    def describe() -> StageCase:
        return StageCase("layer_norm", "gradients", Outline.of(x), Outline.of(grad), eps=float(eps))

    result: InputGradients = _chosen(key, describe)(grad, x, weight, eps)
    return result
