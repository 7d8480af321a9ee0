"""Calibration images, and runs of a network on them that stop where nothing more is needed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class Hooks(contextlib.ExitStack):
    """Forward hooks on layers of one input that are gone when the block ends. They get the module and that input."""

    def after(self, module: nn.Module, hook: Callable[[Any, Any, Any], Any]) -> None:
        """``hook(module, x, output)``; what it returns, unless None, takes the output's place."""

        def call(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            return hook(module, first_input(args, kwargs), output)

        self.callback(module.register_forward_hook(call, with_kwargs=True).remove)

    def before(self, module: nn.Module, hook: Callable[[Any, Any], None]) -> None:
        """``hook(module, x)``."""

        def call(module: nn.Module, args: Any, kwargs: Any) -> None:
            hook(module, first_input(args, kwargs))

        self.callback(module.register_forward_pre_hook(call, with_kwargs=True).remove)


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return next(iter((*args, *kwargs.values())), None)


def run(model: nn.Module, x: Tensor) -> Any:
    """The model's outputs; it may change its input in place, so it gets images of its own."""
    return model(x.clone())


class Images:
    """Unlabelled calibration images, cut into batches of a memory-friendly size.

    Args:
        source: a float tensor (N, C, *) or an iterable of such batches; of a batch (images, labels) only the images
        count. device, dtype: where the model wants them. argument: what the caller calls them.
    """

    def __init__(
        self, source: Tensor | Iterable[Any], device: torch.device, dtype: torch.dtype, argument: str = "calibration"
    ) -> None:
        self._parts = [_check(part, argument) for part in ([source] if isinstance(source, Tensor) else source)]
        self._parts = [part for part in self._parts if len(part)]
        if len({part.shape[1:] for part in self._parts}) == 1:
            self._parts = [torch.cat(self._parts)]  # how the caller cut them makes no difference to the result
        if not self._parts:
            raise ValueError(f"convert: {argument} holds no images")
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


def _check(part: Any, argument: str) -> Tensor:
    images = part[0] if isinstance(part, tuple | list) and part else part
    if not isinstance(images, Tensor):
        raise TypeError(
            f"convert: {argument} must be a tensor or batches of tensors, got {type(images).__name__}; wrap a model of "
            "other inputs in a module that takes the images alone"
        )
    if not images.is_floating_point():
        raise TypeError(f"convert: {argument} images must be floating point, got {images.dtype}")
    if images.is_meta:
        raise ValueError(f"convert: {argument} images have no values (they are on the meta device)")
    if images.dim() < 2:
        raise ValueError(f"convert: {argument} images must have shape (N, C, *), got {tuple(images.shape)}")
    if not images.isfinite().all():
        raise ValueError(f"convert: {argument} images hold NaN or infinity")
    return images.detach()


def in_words(name: str, module: nn.Module) -> str:
    return f"layer {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"


@contextlib.contextmanager
def telling_where(model: nn.Module, shape: Sequence[int], hint: str = "") -> Iterator[None]:
    """Inside, the model runs on images of this shape: what it raises becomes a ValueError that names the layer."""
    names = {id(module): name for name, module in model.named_modules()}
    running: list[nn.Module] = []

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        while running and running.pop() is not module:
            pass

    with contextlib.ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(lambda module, args: running.append(module)).remove)
        stack.callback(register_module_forward_hook(leave).remove)
        try:
            yield
        except Exception as error:  # any code of the model may fail, in any way
            module = next((module for module in reversed(running) if names.get(id(module))), model)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            hint += ONE_INPUT if module is model and isinstance(error, TypeError) else ""
            layer = in_words(names[id(module)], module)
            raise ValueError(f"convert: {layer} fails on images of shape {tuple(shape)}{hint} ({reason})") from error


ONE_INPUT = ", the only thing it is called with; wrap a model of several inputs in a module that takes the images alone"


class _Stop(BaseException):
    """Ends a forward pass early; not an Exception, so that no model's own handler swallows it."""


class Call(NamedTuple):
    """Input and output of one call of a layer."""

    input: Tensor
    output: Tensor

    def kept(self) -> Call:
        """As it is now, whatever is changed in place before the pass ends."""
        return Call(self.input.clone(), self.output.clone())


def calls(model: nn.Module, module: nn.Module, x: Tensor, times: int) -> list[Call]:
    """Input and output of the first ``times`` calls of a module on a batch; the network runs no further than that."""
    seen: list[Call] = []

    def keep(_: nn.Module, x: Tensor, output: Tensor) -> None:
        last = len(seen) + 1 == times
        seen.append(Call(x, output) if last else Call(x, output).kept())
        if last:
            raise _Stop

    with Hooks() as hooks, torch.no_grad(), contextlib.suppress(_Stop):
        hooks.after(module, keep)
        run(model, x)
    return seen
