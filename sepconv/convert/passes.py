"""Runs of a network: with hooks, that stop where nothing more is needed, and that say which layer failed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from sepconv.leaves import Inputs


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


def run(model: nn.Module, x: Inputs) -> Any:
    """The model's outputs; it may change its input in place, so it gets one of its own."""
    return x.run(model)


def in_words(name: str, module: nn.Module) -> str:
    return f"layer {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"


@contextlib.contextmanager
def telling_where(model: nn.Module, x: Inputs, hint: str = "") -> Iterator[None]:
    """Inside, the model runs on inputs like these: what it raises becomes a ValueError that names the layer."""
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
            hint += SEVERAL if module is model and isinstance(error, TypeError) else ""
            layer = in_words(names[id(module)], module)
            shapes = f"inputs of shape {x}"
            raise ValueError(f"convert: {layer} fails on {shapes}{hint} ({reason})") from error


SEVERAL = ", all that it is called with; batches of a model of several inputs are dicts of its arguments, or ((a, b),)"


class _Stop(BaseException):
    """Ends a forward pass early; not an Exception, so that no model's own handler swallows it."""


class LayerCall(NamedTuple):
    """Input and output of one call of a layer."""

    input: Tensor
    output: Tensor

    def kept(self) -> LayerCall:
        """As it is now, whatever is changed in place before the pass ends."""
        return LayerCall(self.input.clone(), self.output.clone())


def calls(model: nn.Module, module: nn.Module, x: Inputs, times: int) -> list[LayerCall]:
    """Input and output of the first ``times`` calls of a module on a batch; the network runs no further than that."""
    seen: list[LayerCall] = []

    def keep(_: nn.Module, x: Tensor, output: Tensor) -> None:
        last = len(seen) + 1 == times
        call = LayerCall(x, output)
        seen.append(call if last else call.kept())
        if last:
            raise _Stop

    with Hooks() as hooks, torch.no_grad(), contextlib.suppress(_Stop):
        hooks.after(module, keep)
        run(model, x)
    return seen
