"""Contenders that run a PyTorch module in memory: PyTorch itself in several ways, and sepconv."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sepconv.bench.peers.source import Contender, Network

_INDUCTOR = ("torch._inductor.compile_fx",)


def _sepconv(source: Network, x: Tensor, threads: int) -> Callable[[], Any]:
    from sepconv.compile import compile

    return partial(compile(source.model, x), x)


def _eager(memory_format: torch.memory_format, source: Network, x: Tensor, threads: int) -> Callable[[], Any]:
    """Weights in the layout of the images."""
    return partial(folded(source.model, memory_format), x)


def folded(model: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """A copy with its batch norms folded into the convolutions by PyTorch's own fusion."""
    with warnings.catch_warnings():  # its own imports are deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.fx.experimental.optimization import fuse
    found: nn.Module = fuse(model).to(memory_format=memory_format)  # type: ignore[call-overload]
    return found


def _compiled(options: dict[str, Any], source: Network, x: Tensor, threads: int) -> Callable[[], Any]:
    """The number of threads is part of the generated code, and named here it is part of the code's place on disk."""
    call: Any = torch.compile(copy.deepcopy(source.model), options={**options, "cpp.threads": threads})
    return partial(call, x)


def _backend(source: Network, x: Tensor, threads: int) -> Callable[[], Any]:
    call: Any = torch.compile(copy.deepcopy(source.model), backend="sepconv")
    return partial(call, x)


CONTENDERS = (
    Contender("sepconv", (), ("sepconv.compile", "halide"), "nchw", _sepconv, True),
    Contender("torch-nchw", (), (), "nchw", partial(_eager, torch.contiguous_format), True),
    Contender("torch-nhwc", (), (), "nhwc", partial(_eager, torch.channels_last), True),
    Contender("torch-compile", (), _INDUCTOR, "nchw", partial(_compiled, {}), True, True),
    Contender("torch-compile-freezing", (), _INDUCTOR, "nchw", partial(_compiled, {"freezing": True}), True, True),
    Contender(
        "torch-compile-sepconv", (), ("torch._dynamo", "sepconv.compile", "halide"), "nchw", _backend, True, True
    ),
)
