"""Tensors whose numbers are still to be computed: convolutions that wait until it is known what comes behind them.

A layer that may (``layers.replace``) answers with a :class:`Pending` tensor. Where ``F.batch_norm`` is called with it,
the convolution runs and gathers the statistics that the norm needs; norm and activation wait in turn, until the next
such convolution does them where it reads. All else that touches the tensor, be it a function, a method, a hook or a
sum, gets an ordinary one with the same numbers and the same gradients: PyTorch tells (``__torch_function__``), and what
does not ask first, such as an autograd function of somebody's own, finds the numbers (``__torch_dispatch__``) and in
its graph the node that leads back to them (``_Connection``).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Parameter
from torch.utils._pytree import tree_map

from sepconv.kernels.layout import memory_format
from sepconv.ops import stages
from sepconv.ops.explain import Explanation, note
from sepconv.ops.stages import Before, StageConvolution, composed_gradients


class WaitingLayer(Protocol):
    """A convolution that may wait.

    Attributes:
        asked: whether a norm wanted the statistics of what it gives; None while nobody wanted a number.
    """

    asked: bool | None

    def alone(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What it computes where it does not wait."""
        ...


class Call:
    """A convolution that was called: run once, when somebody needs its numbers, with statistics or without.

    What it reads may not change until then, which autograd forbids for its own reasons.
    """

    def __init__(
        self,
        how: StageConvolution,
        layer: WaitingLayer,
        x: Tensor,
        before: Before | None,
        weight: Tensor,
        bias: Tensor | None,
    ) -> None:
        self.how, self.layer = how, layer
        self.x, self.before, self.weight, self.bias = x, before, weight, bias
        self.versions = x._version, weight._version
        self.output: stages.StageOutput | None = None

    def run(self, statistics: bool) -> stages.StageOutput:
        if self.output is None:
            if (self.x._version, self.weight._version) != self.versions:
                raise RuntimeError(
                    f"{self.how.op} convolution: its input or weight was modified by an inplace operation before its "
                    "result was used; autograd needs both as they were"
                )
            self.output = self._computed(statistics)
        return self.output

    def _computed(self, statistics: bool) -> stages.StageOutput:
        if statistics or self.before is not None or stages.pays_alone(self.how, self.x, self.weight):
            return stages.stage(self.how, self.x, self.before, self.weight, self.bias, statistics)
        dtype, bias = self.x.dtype, self.bias
        y = self.layer.alone(self.x, self.weight.to(dtype), None if bias is None else bias.to(dtype))
        return stages.StageOutput(y, None, None)

    def inputs(self) -> tuple[Tensor | None, ...]:
        norm = (None,) * 4 if self.before is None else self.before[:4]
        return self.x, *norm, self.weight, self.bias

    def compose(self, x: Tensor, *tensors: Any) -> Tensor:
        *norm, weight, bias = tensors
        before = None if self.before is None else Before.of(norm, *self.before[4:])
        return stages.composed_convolution(self.how, x, before, weight, bias)


class Unfinished:
    """What has to be done for a tensor's numbers: a convolution to run, then ``before`` (None: nothing).

    Attributes:
        finished: the ordinary tensor, once there is one; from then on it is what everybody reads.
        changed: whether something was added to it in place.
        made_by: the node of autograd's graph that the ordinary tensor came from.
    """

    __slots__ = ("_hooks", "before", "call", "changed", "finished", "made_by")

    def __init__(self, call: Call, before: Before | None) -> None:
        self.call, self.before = call, before
        self.finished: Tensor | None = None
        self.made_by: Any = None
        self._hooks, self.changed = _saving(), False

    def value(self) -> Tensor:
        if torch.compiler.is_compiling():
            return self._traced()
        if self.finished is None:
            self._note_that_nobody_asked()
            with torch.enable_grad(), self.as_when_made():
                z, before = self.call.run(False).y, self.before
                if before is None or before.mean is None:
                    self.finish_as(stages.composed(z, before))
                else:
                    self.finish_as(stages.finish(z, before))
        assert self.finished is not None
        return self.finished

    def _traced(self) -> Tensor:
        """For a part of a network that is compiled alone: PyTorch's operators, in its graph; nothing is remembered."""
        call = self.call
        if self.finished is not None:
            return self.finished
        z = call.compose(call.x, *call.inputs()[1:]) if call.output is None else call.output.y
        return z if self.before is None else stages.composed(z, self.before)

    def _note_that_nobody_asked(self) -> None:
        """For a layer with no norm before or behind it, which the next time computes at once: that is the same, unless
        it is a stage all the same."""
        call = self.call
        bare = self.before is None and call.before is None and call.output is None
        if bare and call.layer.asked is None and not stages.pays_alone(call.how, call.x, call.weight):
            call.layer.asked = False

    def finish_as(self, h: Tensor) -> None:
        self.finished, self.made_by = h, h.grad_fn

    def as_when_made(self) -> AbstractContextManager[None]:
        """What is saved for the way back belongs to where the tensor was made: ``torch.utils.checkpoint`` counts what
        is saved between, twice."""
        return _AS_IT_IS if _saving() == self._hooks else saved_tensors_hooks(_itself, _itself)

    def inputs(self) -> tuple[Tensor | None, ...]:
        if self.before is None:
            return self.call.inputs()
        return self.call.run(False).y, *self.before[:4]

    def compose(self, *tensors: Any) -> tuple[Tensor]:
        if self.before is None:
            return (self.call.compose(*tensors),)
        x, *norm = tensors
        return (stages.composed(x, Before.of(norm, *self.before[4:])),)


_AS_IT_IS = nullcontext()


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _saving() -> Any:
    """The hooks that are told of every tensor saved for the way back."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


class _Connection(torch.autograd.Function):
    """Makes the pending tensor of some work, in the graph behind all that it is made from."""

    @staticmethod
    def forward(ctx: Any, work: Unfinished, outline: tuple[Any, ...], *tensors: Tensor | None) -> Tensor:
        shape, stride, dtype, device = outline
        ctx.work, ctx.given = work, tensors
        return Tensor._make_wrapper_subclass(Pending, shape, strides=stride, dtype=dtype, device=device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        need = ctx.needs_input_grad[2:]
        return None, None, *composed_gradients(ctx.work.compose, (grad,), ctx.given, need)


_connect: Callable[..., Any] = super(torch.autograd.Function, _Connection).apply


class Pending(Tensor):
    """A tensor in the making; see the module."""

    work: Unfinished
    outline: tuple[Any, ...]
    node: Any

    @classmethod
    def of(cls, work: Unfinished, outline: tuple[Any, ...]) -> Tensor:
        made: Any = _connect(work, outline, *work.inputs())
        with torch._C.DisableTorchFunctionSubclass():
            made.node = made.grad_fn
        made.work, made.outline = work, outline
        result: Tensor = made
        return result

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        known = HANDLERS.get(func)
        if known is not None and not kwargs.get("out"):
            result = known(*args, **kwargs)
            if result is not NotImplemented:
                return result
        args, kwargs = tree_map(value_of, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(_numbers_of, (args, kwargs or {}))
        return func(*args, **kwargs)


def _numbers_of(thing: Any) -> Any:
    """For who did not ask: the way back from here does not know what autograd saw change the numbers since."""
    if type(thing) is not Pending:
        return thing
    work: Unfinished = thing.work
    numbers = work.value()
    if work.changed or numbers.grad_fn is not work.made_by:
        raise RuntimeError("a tensor needed for gradient computation was modified by an inplace operation")
    return numbers.detach()


def value_of(thing: Any) -> Any:
    """The ordinary tensor in the place of a pending one."""
    if type(thing) is not Pending:
        return thing
    with torch._C.DisableTorchFunctionSubclass():
        if thing.grad_fn is not thing.node:  # somebody's own function has changed it in place
            return thing.clone()
    return thing.work.value()


def waiting(x: Any) -> Unfinished | None:
    """The work behind a tensor that nobody needs the numbers of so far."""
    if type(x) is not Pending:
        return None
    work: Unfinished = x.work
    if work.finished is not None:
        return None
    with torch._C.DisableTorchFunctionSubclass():
        return work if x.grad_fn is x.node else None


def convolve(how: StageConvolution, layer: WaitingLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of a plain or pending x, waiting; computed at once where no kernel of ours would gain by it."""
    work = waiting(x)
    if work is not None and work.before is not None and how.op == "normal":
        note(Explanation("normal_stage_input", "kept", reasons={"computed again": _KEPT}))
    elif work is not None and work.before is not None:
        z, before = work.call.run(False).y, work.before
        cast = z.dtype is torch.float32 and torch.is_autocast_enabled("cpu")
        alone = before.mean is None and how.op != "pointwise"
        if not cast and not alone and not stages.unpaid(how, z, before, weight, bias, True):
            return _waiting(Call(how, layer, z, before, weight, bias))
    x = value_of(x)
    if x.dtype is torch.float32 and torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    reason = stages.unpaid(how, x, None, weight, bias, True)
    if reason:
        note(Explanation(f"{how.op}_stage", "torch", reasons={"halide": reason}))
        return layer.alone(x, weight, bias)
    return _waiting(Call(how, layer, x, None, weight, bias))


_KEPT = "PyTorch's convolution reads it from memory both ways, which takes less time than to make it twice"


def _waiting(call: Call) -> Tensor:
    x, weight = call.x, call.weight
    outline = _outline(call.how, x.shape, weight.shape, x.dtype, x.device)
    return Pending.of(Unfinished(call, None), outline)


@lru_cache(maxsize=1024)
def _outline(
    how: StageConvolution, image: torch.Size, weight: torch.Size, dtype: torch.dtype, device: torch.device
) -> tuple[Any, ...]:
    """Shape, strides, dtype and device of what a convolution makes of a channels_last image."""
    channels, (height, width) = weight[0], how.geometry.output_size(image[2:], weight[2:])
    shape = (image[0], channels, height, width)
    return shape, (channels * height * width, 1, width * channels, channels), dtype, device


def laid_out(x: Tensor) -> bool:
    """Whether an image's layout is one that convolutions wait for."""
    return type(x) is Pending or memory_format(x) is torch.channels_last


def is_ordinary(t: Any) -> bool:
    return type(t) is Tensor or type(t) is Parameter


LOOKS: set[Any] = {
    *[
        getattr(Tensor, name).__get__
        for name in (
            "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "is_cuda", "is_cpu", "is_sparse",
            "is_quantized", "is_meta", "is_mkldnn", "is_mps", "grad_fn", "itemsize", "nbytes",
        )
    ],
    *[
        getattr(Tensor, name)
        for name in (
            "size", "dim", "stride", "numel", "nelement", "ndimension", "is_contiguous", "is_floating_point",
            "is_complex", "element_size", "get_device", "__len__",
        )
    ],
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}  # fmt: skip
"""Functions that ask for nothing but what is known without the numbers."""

HANDLERS: dict[Any, Callable[..., Any]] = {}
"""Functions that may let a tensor wait on; ``NotImplemented`` where they may not. Filled by ``postpone``."""
