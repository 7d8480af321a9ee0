"""Convolutions that wait for what comes behind them while a network trains, and where they may not.

A layer with ``waits`` answers with a pending tensor (``ops.pending``), so that statistics, norm and activation become
part of the passes of the convolutions before and behind them. What it cannot do so exactly it does as always, and
``explain`` says why.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_modules
from torch.utils._pytree import tree_map

from sepconv.layers.folding import watched
from sepconv.ops import layer_norm, pending, tracing
from sepconv.ops.explain import Explanation, note, recording
from sepconv.ops.geometry import Padding, Size, resolve
from sepconv.ops.stages import StageConvolution


class NormalConv2d(nn.Conv2d):
    """``nn.Conv2d``, waiting: what ``replace_layers`` makes of one that is neither depthwise nor pointwise."""

    waits = True
    asked: bool | None = None  # whether a norm wanted the statistics of its results; None: nobody had one so far

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = waiting(self, "normal", x, weight, bias)
        return self.alone(x, weight, bias) if y is None else y

    def alone(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(pending.value_of(x), weight, bias)

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript compiles PyTorch's own layer, over the same parameters."""
        conv = nn.Conv2d(1, 1, 1, device="meta")
        conv.__dict__.update(self.__dict__)
        return conv


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` by kernels of ours while gradients are recorded: what ``replace_layers`` makes of one."""

    waits = True

    def forward(self, x: Tensor) -> Tensor:
        x = pending.value_of(x)
        reason = "the network is compiled" if torch.compiler.is_compiling() else self._unfit(x)
        if not reason:
            return layer_norm.layer_norm(x, self.weight, self.bias, self.eps)
        if not torch.compiler.is_compiling() and recording():
            note(Explanation("layer_norm_stage", "torch", reasons={"halide": reason}))
        return super().forward(x)

    def _unfit(self, x: Tensor) -> str:
        """Why PyTorch's has to compute it, in a sentence; "" if ours may."""
        if not torch.is_grad_enabled() or tracing.recorded(x):
            return "no gradients are recorded"
        if self.normalized_shape != tuple(x.shape[-1:]):
            return f"it is over {len(self.normalized_shape)} dimensions"
        vectors = [t for t in (self.weight, self.bias) if t is not None]
        if not pending.is_ordinary(x) or not all(pending.is_ordinary(t) and t.is_cpu for t in vectors):
            return "a tensor is not a plain one"
        if not x.is_cpu or any(t.dtype is not torch.float32 for t in vectors):
            return "kernels are for parameters of float32 on the CPU"
        return _looked_at(self) or layer_norm.unpaid(x, self.eps)

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript compiles PyTorch's own layer, over the same parameters."""
        norm = nn.LayerNorm(1, device="meta")
        norm.__dict__.update(self.__dict__)
        return norm


def waiting(layer: Any, op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The layer's convolution as a pending tensor; None where it is to be computed now."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or tracing.recorded(x):
        return None
    reason = _unfit(layer, x, weight, bias)
    if reason:
        if recording():
            note(Explanation(f"{op}_stage", "torch", reasons={"halide": reason}))
        return None
    if type(x) is not pending.Pending and not pending.laid_out(x):
        x = x.contiguous(memory_format=torch.channels_last)
    how = _how(op, weight.shape[2:], layer.stride, layer.padding, layer.dilation)
    return pending.convolve(how, layer, x, weight, bias)


@lru_cache(maxsize=1024)
def _how(op: str, kernel_size: tuple[int, ...], stride: Size, padding: Padding, dilation: Size) -> StageConvolution:
    return StageConvolution(op, resolve("Conv2d", 2, kernel_size, stride, padding, dilation))


def _unfit(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """Why a convolution cannot wait, in a sentence; "" if it can."""
    if type(x) is pending.Pending:
        shape, _, dtype, _ = x.outline
    elif pending.is_ordinary(x):
        shape, dtype = x.shape, x.dtype
        if shape[2:] == (1, 1):
            return "a single pixel is no work that would pay"
        laid_out = pending.laid_out(x)
        if not x.is_cpu or not (laid_out or _is_laid_out(weight)):
            return "stages are for channels_last images on the CPU"
        if laid_out and layer.asked is False:
            return "no norm stands before or behind it: there is no pass to save"
    else:
        return f"the image is a {type(x).__name__}"
    if not pending.is_ordinary(weight) or not weight.requires_grad or not weight.is_cpu:
        return "the weight is frozen or not a plain tensor"
    if len(shape) != 4 or 0 in shape or shape[1] != layer.in_channels:
        return f"stages are for batches of images, got {tuple(shape)}"
    if dtype is not torch.float32 and (dtype is not torch.bfloat16 or weight.dtype is not torch.float32):
        return f"stages have numbers of float32, or of bfloat16 by autocast, got {dtype}"
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is not torch.bfloat16:
        return f"autocast is to {torch.get_autocast_dtype('cpu')}"
    return _looked_at(layer)


def _is_laid_out(weight: Tensor) -> bool:
    """Whether a weight asks for channels_last images, as in PyTorch."""
    return not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def _looked_at(layer: nn.Module) -> str:
    """Who wants to see each operator or each layer's result."""
    if watched((layer,)) or torch_modules._has_any_global_hook():
        return "a hook watches the layer"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a mode wants to see each operator"
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "a torch.func transformation goes through PyTorch's operators"
    return ""


def finished(result: Any) -> Any:
    """A layer's or network's result with ordinary tensors in the place of pending ones."""
    return pending.value_of(result) if isinstance(result, Tensor) else tree_map(pending.value_of, result)
