"""Calls of layers that come to PyTorch's own operation: known by their sizes, they go there at once.

Between a layer and the operation lie arguments, keys and tables. After a large operation nothing of that is in the
cache any more, and it takes as long as a small convolution.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from sepconv.ops import convolutions, pending
from sepconv.ops.explain import recording
from sepconv.ops.geometry import resolve

MAX_CALLS = 4096
_calls: dict[Hashable, bool] = {}


def _key(layer: Any, x: Tensor, weight: Tensor) -> Hashable | None:
    """What decides who computes a layer that is trained; None where it is not, or where somebody watches."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or recording():
        return None
    if not torch.is_grad_enabled() or not weight.requires_grad or torch._C._is_any_autocast_enabled():
        return None
    if layer.waits and layer.asked is not False:
        return None
    kind = type(layer), layer.waits, layer.stride, layer.padding, layer.dilation, layer.padding_mode
    return kind, x.shape, x.stride(), x.dtype, x.device, weight.shape, torch.get_num_threads()


def pytorchs(layer: Any, x: Tensor, weight: Tensor) -> bool:
    """Whether an earlier call like this one came to PyTorch's operation."""
    key = _key(layer, x, weight)
    return key is not None and _calls.get(key, False)


def learn(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """After a call that was in order."""
    key = _key(layer, x, weight)
    if key is None or key in _calls:
        return
    if len(_calls) >= MAX_CALLS:
        _calls.clear()
    _calls[key] = _is_pytorchs(layer, x, weight, bias)


def _is_pytorchs(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if x.dtype is not torch.float32 or not x.is_cpu or x.dim() != layer.dims + 2 or layer.padding_mode != "zeros":
        return False
    if layer.waits and not pending.laid_out(x):  # it becomes channels_last first
        return False
    space = weight.shape[2:]
    geometry = resolve(type(layer).__name__, layer.dims, space, layer.stride, layer.padding, layer.dilation)
    if layer.groups == 1:
        return max(geometry.stride) == 1 and convolutions.pointwise_is_pytorchs(x, weight, bias)
    return convolutions.depthwise_is_pytorchs(x, weight, geometry)


def forget() -> None:
    """Ask again for every call."""
    _calls.clear()
