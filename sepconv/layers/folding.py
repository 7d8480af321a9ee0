"""Batch norms in evaluation, folded into the convolutions before them: one kernel then does a whole layer.

A norm that no longer learns multiplies each channel by a number and adds another; the convolution before it can do that
with other weights. These are kept for as long as not one bit of what they were made from changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from sepconv import norms
from sepconv.kernels.halide.jit import packing
from sepconv.layers.stage import Stage
from sepconv.ops import call

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


def folded(x: Tensor, stages: Sequence[Stage]) -> list[Folded] | None:
    """Weight and bias of each convolution with the norm behind it, computed in float64 and kept.

    None unless the norms only scale and shift, nobody needs gradients or watches all modules, and our kernels are what
    ``x`` and all these tensors go to; where no stage has a norm, they are the convolutions' own for whatever use.
    """
    if all([stage.norm is None for stage in stages]):
        return [(stage.conv.weight, stage.conv.bias) for stage in stages]
    if torch_modules._has_any_global_hook() or not call.inference(x):
        return None
    tensors: list[Any] = []
    variant: list[Any] = ["folded"]
    for stage in stages:
        conv, norm = stage.conv, stage.norm
        if norm is None:
            variant.append(None)
            continue
        if type(norm) not in _BATCH_NORMS or norm.training:
            return None
        weight, mean, variance = conv.weight, norm.running_mean, norm.running_var
        if mean is None or variance is None:
            return None
        tensors += [weight, conv.bias, mean, variance, norm.weight, norm.bias]
        variant += [norm.eps, weight.shape]
    if not all([t is None or ((type(t) is Tensor or type(t) is nn.Parameter) and call.plain(t)) for t in tensors]):
        return None
    made = packing.remembered(tuple(tensors), tuple(variant), lambda: _fold_all(stages))
    if not made:
        return None
    kept = iter(made)
    return [(stage.conv.weight, stage.conv.bias) if stage.norm is None else next(kept) for stage in stages]


def _fold_all(stages: Sequence[Stage]) -> list[Folded]:
    """What has a norm, folded; nothing where one is for another number of channels, of which PyTorch will complain."""
    made = [(stage.conv, stage.norm) for stage in stages if stage.norm is not None]
    for conv, norm in made:
        vectors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        if any(vector is not None and vector.shape != conv.weight.shape[:1] for vector in vectors):
            return []
    return [_fold(conv, norm) for conv, norm in made]


def _fold(conv: Any, norm: Any) -> Folded:
    weight, bias = norms.fold(conv.weight, conv.bias, *norms.scale_and_shift_of(norm))
    return packing.constant(weight.float()), packing.constant(bias.float())
