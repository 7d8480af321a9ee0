"""A model that cannot be captured as a whole: the modules in it that can be, each compiled. PyTorch runs the rest.

Such are detectors, which choose boxes by their scores: how many there are decides what happens next. Backbone and head
are captured all the same. From the outermost module inwards the first that can be captured becomes a part; a part that
keeps getting inputs of new sizes is left to PyTorch for those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sepconv.compile.constants import first_unseen
from sepconv.compile.copies import trial_copy
from sepconv.compile.explain import NetworkExplanation

MOST_SIZES = 8
"""Sizes of inputs for which a part is prepared."""


class _Compiled(Protocol):
    """As far as parts use a compiled model."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def prepare(self, *args: Any, **kwargs: Any) -> None: ...
    def explain(self, *, measure: bool = False) -> NetworkExplanation: ...


Compile = Callable[[nn.Module, int], _Compiled]
"""Makes a compiled model of a module that belongs to it, for so many sizes at most."""


class CompiledPart:
    """A compiled module in the place of the module; what it was not prepared for, the module itself computes."""

    def __init__(self, name: str, module: nn.Module, compiled: _Compiled) -> None:
        self.name, self.compiled = name, compiled
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _all_plain((args, kwargs)):
            try:
                return self.compiled(*args, **kwargs)
            except ValueError:
                pass  # other arguments than those of the example; if they are wrong, the module says so
        return self._module(*args, **kwargs)


def _all_plain(arguments: Any) -> bool:
    """Whether nothing in the arguments has an identity of its own, by which it would be taken for a constant."""
    return not first_unseen(pytree.tree_leaves(arguments))


def put_in_place(
    frozen: nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec, compile: Compile
) -> list[CompiledPart]:
    """Compile what can be of a model's modules, and let the model call them; none where it does not run with them."""
    args, kwargs = pytree.tree_unflatten(list(leaves), spec)
    parts = list(_found(frozen, args, kwargs, compile))
    for part in parts:
        frozen.get_submodule(part.name)._compiled_call_impl = part
    trial = trial_copy(frozen, buffers=False)  # a copy of a module forgets its part
    for part in parts:
        trial.get_submodule(part.name)._compiled_call_impl = part
    try:
        trial(*_copied(args), **_copied(kwargs))
    except Exception:  # whatever other people's code does with its modules
        for part in parts:
            frozen.get_submodule(part.name)._compiled_call_impl = None
        return []
    return parts


def _copied(arguments: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), arguments)


def _found(frozen: nn.Module, args: Any, kwargs: Any, compile: Compile) -> Iterator[CompiledPart]:
    trial = trial_copy(frozen, buffers=False)
    names = {module: name for name, module in trial.named_modules()}
    found: list[CompiledPart] = []

    def compiled(module: nn.Module, args: Any, kwargs: Any) -> bool:
        part = _part(names[module], frozen.get_submodule(names[module]), (args, kwargs), compile)
        found.extend([] if part is None else [part])
        return part is not None

    _walk(trial, args, kwargs, compiled)
    yield from found


def _walk(parent: nn.Module, args: Any, kwargs: Any, compiled: Callable[[nn.Module, Any, Any], bool]) -> None:
    """Run a module and try every module that it calls, at its first call; look into those that cannot be compiled."""
    seen: set[nn.Module] = set()

    def consider(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module in seen:
            return
        seen.update(module.modules())
        if not compiled(module, args, kwargs):
            _walk(module, args, kwargs, compiled)

    with _before_calls([module for module in parent.modules() if module is not parent and _is_worth(module)], consider):
        parent(*_copied(args), **_copied(kwargs))


@contextmanager
def _before_calls(modules: list[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_worth(module: nn.Module) -> bool:
    """A layer of PyTorch alone gains nothing."""
    return any(True for _ in module.children()) or not type(module).__module__.startswith("torch.nn.")


def _part(name: str, module: nn.Module, arguments: tuple[Any, Any], compile: Compile) -> CompiledPart | None:
    """A part, if the module can be captured and a kernel of ours computes something in it."""
    if not _all_plain(arguments):
        return None
    try:
        own = trial_copy(module)
        if _remembers(own, *_copied(arguments)):
            return None
        args, kwargs = _copied(arguments)
        compiled = compile(trial_copy(module), MOST_SIZES)
        compiled.prepare(*args, **kwargs)
        explanation = compiled.explain()
    except Exception:  # other people's code, on its way to being tried; PyTorch runs it
        return None
    ours = any(group.kernel not in ("torch", "copy") for group in explanation.groups)
    return CompiledPart(name, own, compiled) if ours and not explanation.reason else None


def _remembers(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether a call leaves something in an attribute, where the model may look for it."""
    before = {each: dict(vars(each)) for each in module.modules()}
    module(*args, **kwargs)
    return any(
        vars(each).keys() != kept.keys() or any(vars(each)[key] is not value for key, value in kept.items())
        for each, kept in before.items()
    )
