"""Who looks through an operation: tracers and transformations know PyTorch's own operators, and none of ours.

While one of them is at work the functions and layers consist of PyTorch's operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_BATCHED: Any = torch._C._parse_dispatch_key("Batched")


def symbolic(*arguments: Any) -> bool:
    """Whether ``torch.fx`` traces: what stands for a tensor has neither sizes nor a dtype."""
    return any([isinstance(argument, fx.Proxy) for argument in arguments])


def recorded(x: Any) -> bool:
    """Whether ``torch.fx`` or ``torch.jit.trace`` writes down what happens to ``x``."""
    if torch.compiler.is_compiling():
        return False
    return symbolic(x) or torch._C._get_tracing_state() is not None


def reason(*tensors: Tensor | None) -> str:
    """Who needs PyTorch's operators here, in a sentence; the empty string if nobody does."""
    if torch.compiler.is_exporting():
        return "an exported graph consists of PyTorch's operators"
    if torch.compiler.is_compiling():
        return "a transformation is compiled" if _transforming() else ""
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records PyTorch's operators"
    if get_proxy_mode() is not None:
        return "make_fx records PyTorch's operators"
    return _transformation(tensors)


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a backward pass has to consist of PyTorch's operators: a transformation came after the forward pass."""
    return not torch.compiler.is_compiling() and bool(_transformation(tensors))


def _transforming() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


# torch.compile cannot trace it; it asks when it traces, and traces again inside of another transformation. This is
# torch.compiler.assume_constant_result without the seconds that torch._dynamo takes to be imported.
_transforming._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _transformation(tensors: tuple[Tensor | None, ...]) -> str:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transformation goes through PyTorch's operators"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation goes through PyTorch's operators"
    if any([t is not None and torch._C._dispatch_keys(t).has(_BATCHED) for t in tensors]):
        return "batched gradients go through PyTorch's operators"
    return ""


def paused() -> AbstractContextManager[None]:
    """While sizes are looked at: ``torch.jit.trace`` would make tensors of them and record each look."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is None:
        return nullcontext()
    return _pause()


@contextmanager
def _pause() -> Iterator[None]:
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]
