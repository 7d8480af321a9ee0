"""The first steps of a large batch, image by image: what one step writes is then still in the cache for the next.

The first layers of a network have the largest activations and the smallest weights. All images of a batch at once would
send each activation through memory; one image after the other through all of these layers does not. Later layers are
the opposite and take the whole batch, for the sake of their weights.
"""

from __future__ import annotations

import math

from torch import Tensor

from sepconv.compile.groups import Convolution, Separable
from sepconv.compile.places import Layout, Place, Root, is_channels_last
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.schedule import machine

# Activations of a step, over the cache of one core, from which on it is worth calling its kernel for each image.
_MANY_CACHES = 8


def slice_batch(layout: Layout) -> None:
    """Choose how many steps run image by image, and let values that only they see take the memory of one image."""
    images = layout.given[0].shape[0] if layout.given and layout.given[0].dim() == 4 else 1
    if images < 2 or runtime.missing():
        return
    large = 0
    for i, step in enumerate(layout.steps):
        places = [*step.args, *step.outputs] if isinstance(step.target, (Convolution, Separable)) else []
        if not places or not all(_by_image(place, images) for place in places):
            break
        if sum(_bytes(place.meta) for place in places) > _MANY_CACHES * machine.host().l2_bytes:
            large = i + 1
    if large > 1:
        layout.images, layout.sliced = images, large
        _share_memory(layout)


def _by_image(place: Place, images: int) -> bool:
    meta = place.meta
    dense = is_channels_last(meta) or meta.is_contiguous()
    return isinstance(place.root, Root) and meta.dim() == 4 and meta.shape[0] == images and dense


def _bytes(meta: Tensor) -> int:
    return math.prod(meta.shape) * meta.element_size()


def _share_memory(layout: Layout) -> None:
    kept = {id(place.root) for place, _ in layout.outputs} | {id(place.root) for place in layout.inputs}
    for root in layout.roots:
        if root.first >= layout.sliced:
            continue
        if root.last < layout.sliced and id(root) not in kept:
            root.images = layout.images
            root.bytes //= layout.images
        else:
            # The first image's share is written, or still read, when the last image begins.
            root.first, root.last = min(root.first, 0), max(root.last, layout.sliced - 1)
