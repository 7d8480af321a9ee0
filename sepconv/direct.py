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

from sepconv.dispatch import recording, signature

MAX_CALLS = 4096

Run = Callable[..., Tensor]

_calls: dict[Hashable, Run] = {}


def key(tensors: Sequence[Tensor | None], *options: Any) -> tuple[Any, ...] | None:
    """What such a call is remembered by, first whether it needs gradients; None where it has to take the long way."""
    given = [t for t in tensors if t is not None]
    if not _unnoticed(given) or not all(map(_simple, options)):
        return None
    seen = signature(tensors)
    if seen is None:
        return None
    options = tuple([tuple(o) if type(o) is list else o for o in options])
    return _needs_grad(given), seen, torch.get_num_threads(), options


def possible(*tensors: Tensor) -> bool:
    """Whether a gradient operator may be left out too: nobody notices, and nobody differentiates it again."""
    return _unnoticed(tensors) and not _needs_grad(tensors)


def _unnoticed(tensors: Sequence[Tensor]) -> bool:
    """Whether PyTorch's dispatcher would only hand on a call with these tensors."""
    if torch.compiler.is_compiling() or recording() or _watched():
        return False
    return all([type(t) is Tensor or type(t) is Parameter for t in tensors])


def _needs_grad(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any([t.requires_grad for t in tensors])


def _simple(option: Any) -> bool:
    """Whether equal options mean the same: True equals 1 but is no stride, and a list may hold anything."""
    kind = type(option)
    if kind is int or kind is str or option is None:
        return True
    return isinstance(option, (tuple, list)) and all(type(item) is int for item in option)


def _watched() -> bool:
    """Whether a mode, a transformation, autocast or a profiler wants to see each operator."""
    return bool(
        torch._C._len_torch_dispatch_stack()
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
