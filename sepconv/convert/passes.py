"""Calibration images, and runs of a network on them that stop where nothing more is needed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Hooks(contextlib.ExitStack):
    """Forward hooks that are gone when the block ends."""

    def after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self.callback(module.register_forward_hook(hook).remove)

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self.callback(module.register_forward_pre_hook(hook).remove)


class Images:
    """Unlabelled calibration images, cut into batches of a memory-friendly size.

    Args:
        source: a float tensor (N, C, *) or an iterable of such batches; of a batch (images, labels) only the images
        count. device, dtype: where the model wants them.
    """

    def __init__(self, source: Tensor | Iterable[Any], device: torch.device, dtype: torch.dtype) -> None:
        self._parts = [_check(part) for part in ([source] if isinstance(source, Tensor) else source)]
        self._parts = [part for part in self._parts if len(part)]
        if len({part.shape[1:] for part in self._parts}) == 1:
            self._parts = [torch.cat(self._parts)]  # how the caller cut them makes no difference to the result
        if not self._parts:
            raise ValueError("convert: calibration holds no images")
        self._to = {"device": device, "dtype": dtype}
        self.count = sum(len(part) for part in self._parts)

    def batches(self, limit: int | None = None) -> Iterator[Tensor]:
        """All images, or the first ``limit``."""
        left = self.count if limit is None else min(limit, self.count)
        for part in self._parts:
            size = max(8, min(128, (1 << 21) // max(1, math.prod(part.shape[1:]))))
            for batch in part[:left].split(size):
                yield batch.to(**self._to)
            left -= min(left, len(part))
            if not left:
                return


def _check(part: Any) -> Tensor:
    images = part[0] if isinstance(part, tuple | list) and part else part
    if not isinstance(images, Tensor):
        raise TypeError(f"convert: calibration must be a tensor or batches of tensors, got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"convert: calibration images must be floating point, got {images.dtype}")
    if not images.isfinite().all():
        raise ValueError("convert: calibration images hold NaN or infinity")
    return images.detach()


class _Stop(BaseException):
    """Ends a forward pass early; not an Exception, so that no model's own handler swallows it."""


def calls(model: nn.Module, module: nn.Module, x: Any, times: int) -> list[tuple[Tensor, Tensor]]:
    """Input and output of the first ``times`` calls of a module on a batch; the network runs no further than that."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, args: Any, output: Tensor) -> None:
        # Clones where an activation may be applied in place before the pass ends.
        last = len(seen) + 1 == times
        seen.append((args[0], output) if last else (args[0].clone(), output.clone()))
        if last:
            raise _Stop

    with Hooks() as hooks, torch.no_grad(), contextlib.suppress(_Stop):
        hooks.after(module, keep)
        model(x)
    return seen
