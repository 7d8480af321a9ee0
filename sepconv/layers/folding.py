"""Batch norms in evaluation, folded into the convolutions before them: one kernel then does a whole layer.

A norm that no longer learns multiplies each channel by a number and adds another; the convolution before it can do that
with other weights. These are kept for as long as not one bit of what they were made from changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from sepconv import direct
from sepconv.kernels import packing

Folded = tuple[Tensor, Tensor | None]
"""Weight and bias."""

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def watched(parts: Iterable[nn.Module | None]) -> bool:
    """Whether anybody wants to see what goes into or comes out of one of these modules."""
    return any(
        [
            bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
            for m in parts
            if m is not None
        ]
    )


def foldable(x: Tensor, pairs: Sequence[tuple[Any, Any]]) -> bool:
    """Whether the norms only scale and shift, nobody needs gradients or watches all modules, and our kernels are what
    ``x`` and the weights go to."""
    if torch_modules._has_any_global_hook() or not direct.inference(x):
        return False
    norms = [norm for _, norm in pairs if norm is not None]
    if not all([type(norm) in _BATCH_NORMS and not norm.training and norm.running_mean is not None for norm in norms]):
        return False
    tensors = [conv.weight for conv, _ in pairs] + [norm.running_mean for norm in norms]
    return all([direct.plain(tensor) for tensor in tensors])


def fold(pairs: Sequence[tuple[Any, nn.Module | None]]) -> list[Folded]:
    """Weight and bias of each convolution with the norm behind it, computed in float64 and kept."""
    tensors: list[Any] = []
    for conv, norm in pairs:
        if norm is not None:
            tensors += [conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias]
    variant = ("folded", *[None if norm is None else norm.eps for _, norm in pairs])
    made = packing.remembered(tuple(tensors), variant, lambda: [_fold(*pair) for pair in pairs if pair[1]])
    kept = iter(made)
    return [(conv.weight, conv.bias) if norm is None else next(kept) for conv, norm in pairs]


def _fold(conv: Any, norm: Any) -> Folded:
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    mean = norm.running_mean.double()
    shift = -mean if conv.bias is None else conv.bias.double() - mean
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    weight = conv.weight.double() * scale.view(-1, *[1] * (conv.weight.dim() - 1))
    return packing.constant(weight.float()), packing.constant(shift.float())
