"""A shorter way for calls that were made before: no checks and no dispatcher, straight to the kernel chosen then.

Checking the arguments and going through PyTorch's dispatcher takes 60 us, more than many depthwise layers. Sizes,
strides and options that passed the checks once pass them again, and where nothing watches PyTorch's operators the
dispatcher would only hand on the call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from sepconv.ops.explain import NUMBERS, recording

MAX_CALLS = 4096

Run = Callable[..., Tensor]

_calls: dict[Hashable, Run] = {}


def key(tensors: Sequence[Tensor | None], *options: Any) -> tuple[Any, ...] | None:
    """What such a call is remembered by, first whether it needs gradients; None where it has to take the long way."""
    if _watched():
        return None
    # One loop instead of calls: this takes half as long as a small kernel.
    seen: list[Any] = []
    grad_enabled, needs_grad = torch.is_grad_enabled(), False
    for t in tensors:
        if t is None:
            seen.append(None)
            continue
        kind = type(t)
        if (kind is not Tensor and kind is not Parameter) or not _readable(t):
            return None
        seen += (t.dtype, t.shape, t.stride())
        if grad_enabled and t.requires_grad:
            needs_grad = True
    for option in options:
        kind = type(option)
        if kind is not int and kind is not str and option is not None:
            # Equal options must mean the same: True equals 1 but is no stride, and a list may hold anything.
            if not isinstance(option, (tuple, list)) or not all([type(item) is int for item in option]):
                return None
            option = tuple(option)
        seen.append(option)
    return needs_grad, torch.get_num_threads(), *seen


def plain(t: Tensor) -> bool:
    """Whether all our kernels may read it: float32 numbers in the memory of the CPU."""
    return t.dtype is torch.float32 and _readable(t)


def _readable(t: Tensor) -> bool:
    return t.is_cpu and t.dtype in NUMBERS and t.layout is torch.strided and not t.is_neg()


def possible(*tensors: Tensor) -> bool:
    """Whether a gradient operator may be left out too: nobody notices, and nobody differentiates it again."""
    if _watched() or not all([type(t) is Tensor or type(t) is Parameter for t in tensors]):
        return False
    return not (torch.is_grad_enabled() and any([t.requires_grad for t in tensors]))


def inference(x: Tensor) -> bool:
    """Whether only the result counts of what a layer does with ``x``, a plain float32 tensor on the CPU: no gradients,
    and no mode that wants to see each operator, but for ``explain``."""
    return not torch.is_grad_enabled() and not _traced() and type(x) is Tensor and plain(x)


def _watched() -> bool:
    """Whether a mode, a transformation, autocast, a profiler or ``explain`` wants to see each operator."""
    return _traced() or recording()


def _traced() -> bool:
    return bool(
        torch.compiler.is_compiling()  # first: what follows cannot be traced
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def find(call: Hashable | None) -> Run | None:
    """What an earlier call like this one came to."""
    return None if call is None else _calls.get(call)


def keep(call: Hashable, run: Run) -> Run:
    """Remember what a call came to whose arguments were in order."""
    if len(_calls) >= MAX_CALLS:
        _calls.clear()
    _calls[call] = run
    return run
