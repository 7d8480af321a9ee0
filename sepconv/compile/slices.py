"""The first steps of a large batch, image by image: what one step writes is then still in the cache for the next.

The first layers of a network have the largest activations and the smallest weights. All images of a batch at once would
send each activation through memory; one image after the other through all of these layers does not. Later layers are
the opposite and take the whole batch, for the sake of their weights.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from sepconv.compile.groups import writes_channels
from sepconv.compile.program import Place, Program, TensorForm
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.layout import pixel_step

# Activations of a step, over the cache of one core, from which on it is worth calling its kernel for each image.
_MANY_CACHES = 8


class Slices(NamedTuple):
    """The first ``steps`` steps run for each of ``images`` in turn, the others for all of them at once."""

    images: int = 1
    steps: int = 0


def slice_batch(program: Program) -> Slices:
    """Choose how many steps run image by image."""
    images = program.given[0].shape[0] if program.given and len(program.given[0].shape) == 4 else 1
    if images < 2 or runtime.missing():
        return Slices()
    large = 0
    for i, step in enumerate(program.steps):
        places = (*step.inputs, *step.outputs) if writes_channels(step.work) else ()
        if not places or not all(_by_image(place, images) for place in places):
            break
        if sum(place.form.bytes for place in places) > _MANY_CACHES * machine.host().l2_bytes:
            large = i + 1
    return Slices(images, large) if large > 1 else Slices()


def _by_image(place: Place, images: int) -> bool:
    form = place.form
    return isinstance(place.memory, int) and len(form.shape) == 4 and form.shape[0] == images and _is_dense(form)


def _is_dense(form: TensorForm) -> bool:
    """Whether the images lie one after the other without gaps, contiguous or channels_last; or the channels of such."""
    if pixel_step(form.shape, form.stride):
        return True
    sizes = zip(form.shape, form.stride, strict=True)
    return all(size == 1 or step == math.prod(form.shape[d + 1 :]) for d, (size, step) in enumerate(sizes))
