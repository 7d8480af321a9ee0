"""Who computes a case: for each operation the kernels that may, in order, PyTorch's last; the first that can and wins.

The functions and ``compile`` ask the same list, so that the two can never disagree. A kernel more is an entry more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sepconv.kernels.case import Case
from sepconv.kernels.halide.conv import (
    depthwise,
    depthwise_direct,
    elementwise,
    gather,
    grouped,
    groupnorm,
    normal,
    normal_tiles,
    pointwise,
    pointwise_tiles,
    pool,
    product,
    reduce,
    resize,
    rownorm,
    separable,
    separable_tiles,
    shuffle,
    softmax,
    stem,
    window,
)
from sepconv.kernels.halide.jit.buffers import Buffer
from sepconv.kernels.halide.jit.machine_code import Bound, Chain
from sepconv.kernels.halide.jit.runtime import BuildError
from sepconv.kernels.halide.quantized import depthwise as quantized_depthwise
from sepconv.kernels.halide.quantized import normal as quantized_normal
from sepconv.kernels.halide.quantized import pointwise as quantized_pointwise
from sepconv.kernels.halide.quantized import separable as quantized_separable
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.halide.schedule.machine import Machine
from sepconv.kernels.torch import axes, prepared
from sepconv.kernels.triton import depthwise as triton_depthwise

Prepared = Callable[..., Tensor]
"""A kernel made ready for a case: call it with the case's tensors, in the order that ``case`` lists."""


@dataclass(frozen=True)
class Binder:
    """How a backend computes into given memory, call after call, from weights that it has brought into its order.

    Attributes:
        plan: all that is known before there is memory, as plain data. ``plan(case).variant`` is what packed weights
            depend on besides their numbers.
        pack: the weights and biases of a case, in the order in which a prepared kernel takes them, as that kernel
            reads them.
        bind: the call that fills ``out`` from what is then in ``x`` and ``residual``:
            ``bind(plan, x, packed, residual, out)``.
        several: whether ``bind`` takes a list of all further tensors in the place of the residual.
    """

    plan: Callable[[Case], Any]
    pack: Callable[[Any, Sequence[Tensor | None]], list[Buffer]]
    bind: Callable[[Any, Tensor, list[Buffer], Any, Tensor], Bound | Chain]
    several: bool = False


def _never(case: Case) -> str:
    return ""


def _nothing(case: Case) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Backend:
    """One kernel, or one way to several.

    Attributes:
        name: of what computes; a list may hold several kernels of one backend.
        supports: why it cannot compute a case, in a sentence; "" if it can.
        slower: why what follows in the list is the better choice; "" if this is.
        prepare: the kernel for a case; a BuildError is one reason more against it.
        describe: its schedule in words and numbers.
        binder: how ``compile`` uses it; None where it cannot.
        numbers: the type that some tensor must have, where a kernel before it in the list is for all others.
        device: the kind of device that it is for, where it has nothing to say of others.
        postponed: why it cannot be weighed at the moment, in a sentence; what is chosen meanwhile is not remembered.
    """

    name: str
    prepare: Callable[[Case], Prepared]
    supports: Callable[[Case], str] = _never
    slower: Callable[[Case], str] = _never
    describe: Callable[[Case], dict[str, Any]] = _nothing
    binder: Binder | None = None
    numbers: torch.dtype | None = None
    device: str = ""
    postponed: Callable[[Case], str] = _never


class InTurn:
    """A separable convolution as two kernels, each by a choice of its own."""

    def __init__(self, case: Case) -> None:
        assert case.then is not None
        self.parts = choose(case.first), choose(case.then)

    def __call__(
        self,
        x: Tensor,
        depthwise_weight: Tensor,
        pointwise_weight: Tensor,
        depthwise_bias: Tensor | None,
        pointwise_bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        first, second = self.parts
        return second(first(x, depthwise_weight, depthwise_bias), pointwise_weight, pointwise_bias, residual)


def _slower_in_turn(case: Case) -> str:
    """Given memory is filled by both kernels or by neither."""
    first = choose(case.first) if case.bound else None
    return "" if first is None or first.backend.binder else "; ".join(first.reasons.values())


def _unprepared(*given: Any) -> Any:
    raise TypeError("a choice for given memory is bound to it by backend.binder, not called")


def _halide(kernel: ModuleType, numbers: torch.dtype | None = None) -> Backend:
    """A module of ``halide.conv``, which all offer the same functions."""
    binder = Binder(kernel.plan, kernel.pack, kernel.bind, getattr(kernel, "SEVERAL", False))
    prepare: Callable[[Case], Prepared] = getattr(kernel, "prepare", _unprepared)  # some are for given memory only
    return Backend("halide", prepare, kernel.supports, kernel.slower, kernel.describe, binder, numbers)


def _triton(kernel: ModuleType) -> Backend:
    return Backend(
        "triton", kernel.prepare, kernel.supports, kernel.slower, kernel.describe, device="cuda",
        postponed=kernel.postponed,
    )  # fmt: skip


BACKENDS: dict[str, list[Backend]] = {
    "depthwise": [
        _halide(depthwise_direct, torch.bfloat16),
        _halide(depthwise),
        _halide(quantized_depthwise, torch.int8),
        _triton(triton_depthwise),
        Backend("torch", prepared.depthwise),
    ],
    "pointwise": [
        _halide(pointwise),
        _halide(pointwise_tiles, torch.bfloat16),
        _halide(quantized_pointwise, torch.int8),
        Backend("torch", prepared.pointwise),
    ],
    "normal": [
        _halide(stem),
        _halide(normal_tiles, torch.bfloat16),
        _halide(grouped),
        _halide(normal),
        _halide(quantized_normal, torch.int8),
        Backend("torch", prepared.normal),
    ],
    "pool": [_halide(pool), Backend("torch", prepared.pool)],
    "shuffle": [_halide(shuffle), Backend("torch", prepared.shuffle)],
    "window": [_halide(window), Backend("torch", prepared.window)],
    "group_norm": [_halide(groupnorm), Backend("torch", prepared.group_norm)],
    "resize": [_halide(resize), Backend("torch", prepared.resize)],
    "row_norm": [_halide(rownorm), Backend("torch", prepared.row_norm)],
    "elementwise": [_halide(elementwise), Backend("torch", prepared.elementwise)],
    "reduce": [_halide(reduce), Backend("torch", axes.reduce)],
    "softmax": [_halide(softmax), Backend("torch", axes.softmax)],
    "product": [_halide(product), Backend("torch", axes.product)],
    "gather": [_halide(gather), Backend("torch", axes.gather)],
    "separable": [
        _halide(separable),
        _halide(separable_tiles, torch.bfloat16),
        _halide(quantized_separable, torch.int8),
        Backend("depthwise, then pointwise", InTurn, slower=_slower_in_turn),
        Backend("torch", prepared.separable),
    ],
}
"""By operation; which devices and numbers a backend is for, it says itself."""


class Choice:
    """The backend for a case, and why it is none of those before it. Call it with the case's tensors.

    A kernel that cannot be built gives way to the next, when it is prepared or when it is first called. For given
    memory (``case.bound``) nothing is prepared; ``backend.binder`` ties it to the memory.
    """

    __slots__ = ("_others", "_weighed", "backend", "case", "reasons", "run")

    def __init__(self, case: Case, backends: Sequence[Backend]) -> None:
        self.case = case
        self.reasons: dict[str, str] = {}
        self._weighed = True
        self._others = iter(tuple(backends))
        self._take_next()

    def _take_next(self) -> None:
        for backend in self._others:
            if backend.numbers is not None and backend.numbers not in self.case.numbers:
                continue
            if backend.device and backend.device != self.case.x.device.type:
                continue
            reason = backend.supports(self.case)
            if not reason:
                reason = backend.postponed(self.case)
                self._weighed = self._weighed and not reason
            reason = reason or backend.slower(self.case)
            if not reason:
                try:
                    self.run = _unprepared if self.case.bound else backend.prepare(self.case)
                    self.backend = backend
                    self.reasons.pop(backend.name, None)  # of another kernel of the same backend
                    return
                except BuildError as error:
                    reason = str(error)
            self.reasons[backend.name] = reason
        raise LookupError(f"no backend for {self.case}: {self.reasons}")

    def __call__(self, *tensors: Tensor | None) -> Tensor:
        try:
            return self.run(*tensors)
        except BuildError as error:
            self.pass_over(str(error))
            return self(*tensors)

    def shortest(self) -> Prepared:
        """What to call without a way back: the prepared kernel where there is nothing to go back to."""
        return self.run if self.backend is BACKENDS[self.case.op][-1] else self

    def pass_over(self, reason: str) -> None:
        """Go on to the next backend, for a reason that showed itself late."""
        self.reasons[self.backend.name] = reason
        self._take_next()

    @property
    def settled(self) -> bool:
        """Whether it would be the same at another time: no kernel was passed over that could not be weighed now."""
        return self._weighed and all(part.settled for part in self.parts)

    @property
    def parts(self) -> tuple[Choice, ...]:
        """The choices behind a backend that is several kernels."""
        return self.run.parts if isinstance(self.run, InTurn) else ()


MAX_CHOICES = 4096
_choices: dict[tuple[Case, Machine | None], Choice] = {}


def choose(case: Case) -> Choice:
    """Who computes a case, remembered: to weigh the kernels takes longer than a small one runs.

    What is remembered depends on nothing but the case, the machine, the list and the table of tuned schedules:
    :func:`forget` where one of the latter changes. At ``MAX_CHOICES`` all is forgotten and weighed again.

    Another machine has no PyTorch: there no kernel gives way to it.
    """
    key = case, machine.targeted()
    choice = _choices.get(key)
    if choice is None:
        choice = Choice(case, BACKENDS[case.op])
        if machine.targeted() is not None and choice.backend is BACKENDS[case.op][-1]:
            choice = Choice(case, [replace(backend, slower=_never) for backend in BACKENDS[case.op]])
        if not choice.settled:
            return choice
        if len(_choices) >= MAX_CHOICES:
            _choices.clear()
        _choices[key] = choice
    return choice


def forget() -> None:
    """Weigh every case again, with schedules chosen anew."""
    _choices.clear()
