"""From a step and how it was lowered to the call that computes it: a kernel bound to its memory and packed weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.compile.capture import first_line
from sepconv.compile.groups import ComputedGroup, Convolution, Pool, SeparableGroup
from sepconv.compile.lower import Lowered
from sepconv.compile.operations import operation_call
from sepconv.compile.program import Copy, Operation, Work
from sepconv.compile.store import Constant, Store
from sepconv.kernels.halide.conv import depthwise, pointwise, pool, separable, stem
from sepconv.kernels.halide.jit.buffers import Buffer
from sepconv.kernels.halide.jit.machine_code import Bound, in_chains
from sepconv.kernels.halide.jit.runtime import BuildError


class BoundStep(NamedTuple):
    """``run()`` computes the step. ``kernel`` and ``reason`` are as in ``Lowered``, if the kernel could be built.

    ``holds`` keeps packed weights alive for the next size.
    """

    run: Callable[..., Any]
    kernel: str
    reason: str = ""
    holds: object = None


class _Packed(list[Buffer]):
    """Buffers over packed weights, shared between the sizes of a model."""


class _Memory(NamedTuple):
    """The tensors that a group reads and writes."""

    inputs: Sequence[Tensor]
    out: Tensor

    @property
    def x(self) -> Tensor:
        return self.inputs[0]

    @property
    def residual(self) -> Tensor | None:
        return self.inputs[1] if len(self.inputs) > 1 else None


def bind_step(
    work: Work, lowered: Lowered, inputs: Sequence[Tensor], outputs: Sequence[Tensor], store: Store
) -> BoundStep:
    """The call that fills ``outputs`` from what is then in ``inputs``."""
    if isinstance(work, Copy):
        return BoundStep(partial(outputs[0].copy_, inputs[0]), lowered.kernel)
    if isinstance(work, Operation):
        return BoundStep(operation_call(work, inputs, outputs), lowered.kernel, lowered.reason)
    return _bind_group(work, lowered, _Memory(inputs, outputs[0]), store)


def bind_direct(work: Work, lowered: Lowered, x: Tensor, out: Tensor, store: Store) -> BoundStep:
    """The same for the first step of a network; ``run(x)`` takes any tensor with the sizes and strides of ``x``."""
    if not isinstance(work, Convolution):
        raise TypeError(f"only convolutions read the caller's own image, got {work}")
    step = _bind_group(work, lowered, _Memory([x], out), store)
    if step.kernel == "torch":
        return step._replace(run=lambda given: _through_torch(work, _Memory([given], out)))
    call = step.run
    if not isinstance(call, Bound):
        raise TypeError(f"{call} has no image to move")
    image = next(argument for argument in call.prepared.given if isinstance(argument, Buffer))

    def run(given: Tensor) -> None:
        image.move(given.data_ptr())
        call()

    return step._replace(run=run)


def _bind_group(group: ComputedGroup, lowered: Lowered, memory: _Memory, store: Store) -> BoundStep:
    reason = lowered.reason
    if lowered.kernel == "halide":
        try:
            return _bind_kernel(group, lowered, memory, store)
        except Exception as error:  # whatever goes wrong here is ours: the network runs all the same
            reason = str(error).splitlines()[0] if isinstance(error, BuildError) else first_line(error)
            warnings.warn(f"compile: a group runs through PyTorch: {reason}", stacklevel=2)
    return BoundStep(partial(_through_torch, group, memory), "torch", reason, _weights(group))


def _through_torch(group: ComputedGroup, memory: _Memory) -> None:
    with torch.no_grad():
        memory.out.copy_(group(*memory.inputs))


def _weights(group: ComputedGroup) -> list[Tensor]:
    """What PyTorch reads in every call, so that it need not be made again."""
    parts = (group.depthwise, group.pointwise) if isinstance(group, SeparableGroup) else (group,)
    convolutions = [part for part in parts if isinstance(part, Convolution)]
    constants = [constant for part in convolutions for constant in (part.weight, part.epilogue.bias)]
    return [constant.tensor for constant in constants if constant is not None]


def _bind_kernel(group: ComputedGroup, lowered: Lowered, memory: _Memory, store: Store) -> BoundStep:
    if isinstance(group, Pool):
        return BoundStep(pool.bind(memory.x, memory.out), "halide")
    if isinstance(group, SeparableGroup):
        bind = _bind_split if lowered.split else _bind_separable
        return bind(group, memory, store)._replace(reason=lowered.reason)
    return _BINDERS[group.kind](group, memory, store)


def _tensor(constant: Constant | None) -> Tensor | None:
    return None if constant is None else constant.tensor


def _keys(*constants: Constant | None) -> tuple[Hashable, ...]:
    return tuple(None if constant is None else constant.key for constant in constants)


def _bind_separable(group: SeparableGroup, memory: _Memory, store: Store) -> BoundStep:
    first, second, x = group.depthwise, group.pointwise, memory.x
    bias, last_bias = first.epilogue.bias, second.epilogue.bias
    found = separable.plan_for(
        x, first.weight.tensor, first.epilogue.activation, second.weight.tensor, second.epilogue.activation,
        first.stride, first.padding, first.dilation, memory.residual is not None,
    )  # fmt: skip
    packed = store.keep(
        (
            "separable",
            found.spec.multiplier,
            *found.spec.tile.panels,
            *_keys(first.weight, bias, second.weight, last_bias),
        ),
        lambda: _Packed(
            separable.pack(found, first.weight.tensor, _tensor(bias), second.weight.tensor, _tensor(last_bias))
        ),
    )
    return BoundStep(separable.bind(found, x, packed, memory.residual, memory.out), "halide", holds=packed)


def _bind_split(group: SeparableGroup, memory: _Memory, store: Store) -> BoundStep:
    """Depthwise and pointwise in turn, the depthwise result in memory of its own."""
    out = memory.out
    shape = (out.shape[0], group.depthwise.out_channels, *out.shape[2:])
    hidden = torch.empty(shape, memory_format=torch.channels_last)
    first = _bind_depthwise(group.depthwise, _Memory([memory.x], hidden), store)
    second = _bind_matrix(group.pointwise, _Memory([hidden, *memory.inputs[1:]], out), store)
    [both] = in_chains([first.run, second.run])
    return BoundStep(both, "halide", holds=(first, second, hidden))


def _bind_normal(group: Convolution, memory: _Memory, store: Store) -> BoundStep:
    weight, bias = group.weight.tensor, _tensor(group.epilogue.bias)
    found = stem.plan_for(memory.x, weight, group.epilogue.activation, group.stride, group.padding)
    packed = store.keep(
        ("conv", *found.spec.tile.panels, *_keys(group.weight, group.epilogue.bias)),
        lambda: _Packed(stem.pack(found, weight, bias)),
    )
    return BoundStep(stem.bind(found, memory.x, packed, memory.out), "halide", holds=packed)


def _bind_depthwise(group: Convolution, memory: _Memory, store: Store) -> BoundStep:
    weight, bias = group.weight.tensor, _tensor(group.epilogue.bias)
    geometry = (group.stride, group.padding, group.dilation)
    run = depthwise.bind(memory.x, weight, bias, *geometry, group.epilogue.activation, memory.out)
    return BoundStep(run, "halide")


def _bind_matrix(group: Convolution, memory: _Memory, store: Store) -> BoundStep:
    weight, bias = group.weight.tensor, _tensor(group.epilogue.bias)
    found = pointwise.plan(memory.x, group.out_channels, group.epilogue.activation, memory.residual is not None)
    packed = store.keep(
        ("matrix", *found.panels, *_keys(group.weight, group.epilogue.bias)),
        lambda: _Packed(pointwise.pack(found, weight, bias)),
    )
    return BoundStep(pointwise.bind(found, memory.x, packed, memory.residual, memory.out), "halide", holds=packed)


_BINDERS: dict[str, Callable[[Convolution, _Memory, Store], BoundStep]] = {
    "normal": _bind_normal,
    "depthwise": _bind_depthwise,
    "pointwise": _bind_matrix,
    "linear": _bind_matrix,
}
