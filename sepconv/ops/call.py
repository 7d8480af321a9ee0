"""From tensors to the kernel prepared for them; a call like an earlier one goes there at once.

Checking the arguments and going through PyTorch's dispatcher takes 60 us, more than many depthwise layers. Sizes,
strides and options that passed the checks once pass them again, and where nothing watches PyTorch's operators the
dispatcher would only hand on the call. So what a call came to is remembered by all that it depends on in its tensors
and options (:func:`key`); a ``Case`` is made only where nothing is found.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from sepconv.kernels import backends
from sepconv.kernels.case import Case
from sepconv.ops.explain import note_choice, recording

MAX_CALLS = 4096
_INTEGERS = frozenset([(int,) * size for size in range(4)])
"""Kinds of numbers in an option with one for each dimension."""

Run = Callable[..., Tensor]

# What is remembered depends on its key, the list of backends and the table of tuned schedules: ``forget`` where one of
# the latter changes. At MAX_CALLS all is forgotten and found again.
_calls: dict[Hashable, Run] = {}


def _signature(tensors: Sequence[Tensor | None]) -> list[Any] | None:
    """Whether gradients are needed, the number of threads, and all that a choice depends on in plain tensors on a CPU
    or a GPU; None where one is of another kind."""
    # One loop instead of calls: this takes half as long as a small kernel.
    seen: list[Any] = [False, torch.get_num_threads()]
    grad_enabled = torch.is_grad_enabled()
    for t in tensors:
        if t is None:
            seen.append(None)
            continue
        kind = type(t)
        if (kind is not Tensor and kind is not Parameter) or t.layout is not torch.strided or t.is_neg():
            return None
        seen += (t.dtype, t.shape, t.stride())
        if not t.is_cpu:
            if not t.is_cuda:
                return None
            seen.append(t.device)
        if grad_enabled and t.requires_grad:
            seen[0] = True
    return seen


def key(tensors: Sequence[Tensor | None], *options: Any) -> tuple[Any, ...] | None:
    """What such a call is remembered by, first whether it needs gradients; None where it has to take the long way."""
    if _seen_through() or recording() or (seen := _signature(tensors)) is None:
        return None
    if torch._C._is_any_autocast_enabled():
        if not all([t is None or t.is_cpu for t in tensors]):
            return None
        seen += (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
    for option in options:
        kind = type(option)
        if kind is not int and kind is not str and option is not None:
            # Equal options must mean the same: True equals 1 but is no stride, and a list may hold anything.
            if not isinstance(option, (tuple, list)) or tuple(map(type, option)) not in _INTEGERS:
                return None
            option = tuple(option)
        seen.append(option)
    return tuple(seen)


def find(known: Hashable | None) -> Run | None:
    """What an earlier call like this one came to."""
    return None if known is None else _calls.get(known)


def keep(known: Hashable, run: Run) -> Run:
    """Remember what a call came to whose arguments were in order; its tensors were cast as autocast wants it."""
    _remember(known, _cast(run) if torch._C._is_any_autocast_enabled() else run)
    return run


def _remember(known: Hashable, run: Run) -> None:
    if len(_calls) >= MAX_CALLS:
        _calls.clear()
    _calls[known] = run


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast does to the arguments of PyTorch's convolutions."""
    device = next((t.device.type for t in tensors if isinstance(t, Tensor)), "meta")
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple([t.to(dtype) if isinstance(t, Tensor) and _is_cast(t, device) else t for t in tensors])


def _is_cast(t: Tensor, device: str) -> bool:
    return t.is_floating_point() and t.dtype is not torch.float64 and t.device.type == device


def _cast(run: Run) -> Run:
    """The same of tensors as they come under autocast."""
    return lambda *tensors: run(*autocast(*tensors))


def forget() -> None:
    """Choose backends and schedules anew for every call."""
    _calls.clear()
    backends.forget()


def compute(describe: Callable[..., Case], tensors: Sequence[Tensor | None], *options: Hashable) -> Tensor:
    """The result of the case ``describe(*tensors, *options)``, by the backend that is chosen for it."""
    seen = _signature(tensors)
    known = None if seen is None else (describe, *seen, *options)
    choice: Any = find(known)
    if choice is None:
        choice = backends.choose(describe(*tensors, *options))
        if known is not None and choice.settled:
            _remember(known, choice)
    y: Tensor = choice(*tensors)
    if recording():
        note_choice(choice)
    return y


def plain(t: Tensor) -> bool:
    """Whether all our kernels may read it: float32 numbers in the memory of the CPU."""
    return t.dtype is torch.float32 and t.is_cpu and t.layout is torch.strided and not t.is_neg()


def inference(x: Tensor) -> bool:
    """Whether only the result counts of what a layer does with ``x``, a plain float32 tensor on the CPU: no gradients,
    and no mode that wants to see each operator, but for ``explain``."""
    return not torch.is_grad_enabled() and not _traced() and type(x) is Tensor and plain(x)


def unnoticed(*tensors: Tensor) -> bool:
    """Whether an operator may be left out: nobody notices, and nobody differentiates its result."""
    return not recording() and untraced(*tensors)


def untraced(*tensors: Tensor) -> bool:
    """The same, but for ``explain``: where what runs in its place is noted too."""
    if _traced() or not all([type(t) is Tensor or type(t) is Parameter for t in tensors]):
        return False
    return not (torch.is_grad_enabled() and any([t.requires_grad for t in tensors]))


def _traced() -> bool:
    """Whether a mode, a transformation, autocast or a profiler wants to see each operator."""
    return _seen_through() or bool(torch._C._is_any_autocast_enabled())


def _seen_through() -> bool:
    """The same, but for autocast."""
    return bool(
        torch.compiler.is_compiling()  # first: what follows cannot be traced
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )
