"""The steps of a network, written down while it runs once, so that a pass can be taken up anywhere among them.

A step is a call of a module in which no layer to fit lies, whatever its Python does, or an operation on tensors in the
code around. Sizes are what they are on that run, so a course holds for images of one shape. A network whose code looks
at values (``if x.sum() > 0``) has no course, nor has one that uses tensors of unknown origin.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import EllipsisType, FunctionType, NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from sepconv.convert.outputs import tensors
from sepconv.convert.passes import LayerCall, first_input
from sepconv.convert.sites import Site
from sepconv.leaves import Inputs

ABOUT_SIZES = {
    *("__get__", "__hash__", "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous"),
    *("is_floating_point", "is_signed", "nelement", "ndimension", "numel", "result_type", "size", "storage_offset"),
    *("stride", "type"),
}
"""Functions of tensors that answer the same for all values. The first is any attribute, such as ``shape``."""

CONSTANTS = (
    *(NoneType, bool, int, float, complex, str, EllipsisType, FunctionType, type, torch.Size),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
"""What a call may be given beside tensors."""

MOST_COURSES = 64
"""Shapes of batches for which one network's course is kept."""


class Unfollowed(BaseException):
    """What a network does on a batch is not what its course says, or it has none.

    Not an Exception, so that no model's own handler swallows it.
    """


@dataclass(frozen=True)
class Value:
    """The number of a tensor among those that the steps give; the first are the inputs."""

    number: int


class Kind(NamedTuple):
    """What two tensors must have in common to take the same way through the code."""

    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class RecordedStep:
    """One call: of the module of a name, or of a function. Its results are numbered from ``first``."""

    called: str | Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    first: int
    kinds: Sequence[Kind]

    def run(self, network: nn.Module, values: dict[int, Tensor]) -> None:
        """Put the results into ``values``.

        Raises:
            Unfollowed: they have other shapes than when the step was written down.
        """
        args, kwargs = self.arguments(values)
        call = network.get_submodule(self.called) if isinstance(self.called, str) else self.called
        found = results(call(*args, **kwargs))
        if [kind(t) for t in found] != self.kinds:
            raise Unfollowed(f"results of {_name(self.called)} have other shapes on other images")
        values.update(enumerate(found, self.first))

    def arguments(self, values: dict[int, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def given(part: Any) -> Any:
            return values[part.number] if isinstance(part, Value) else part

        found: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(given, (self.args, self.kwargs))
        return found

    def layer_call(self, network: nn.Module, values: dict[int, Tensor]) -> LayerCall:
        """Run a step of one input and one output."""
        x = first_input(*self.arguments(values))
        self.run(network, values)
        return LayerCall(x, values[self.first])

    def uses(self) -> Iterator[int]:
        return (part.number for part in tree_leaves((self.args, self.kwargs)) if isinstance(part, Value))


@dataclass(frozen=True)
class Course:
    """All steps of a pass over images of one shape, the same in the original and in the converted network.

    ``calls`` has, by site, the places of its calls among the steps, ``outputs`` the numbers of the network's floating
    point outputs, and ``unused`` by place the values that no step behind it uses.
    """

    steps: Sequence[RecordedStep]
    calls: dict[str, list[int]]
    outputs: Sequence[int]
    unused: Sequence[Sequence[int]]


def kind(tensor: Tensor) -> Kind:
    return Kind(tensor.shape, tensor.dtype)


def results(found: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def _name(called: str | Callable[..., Any]) -> str:
    return f"layer {called!r}" if isinstance(called, str) else str(getattr(called, "__name__", called))


def write_down(model: nn.Module, sites: Sequence[Site], x: Inputs) -> Course:
    """Run the model on a batch and write down its steps.

    Raises:
        Unfollowed: it has no course.
    """
    x = x.clone()
    recorder = _StepRecorder(model, x)
    try:
        with ExitStack() as stack, torch.no_grad():
            for name, module in _outermost(model, {site.conv for site in sites}):
                stack.callback(module.register_forward_pre_hook(recorder.enter, with_kwargs=True, prepend=True).remove)
                stack.callback(module.register_forward_hook(recorder.leave(name)).remove)
            with recorder:
                outputs = model(*x.args, **x.kwargs)
    except Exception as error:  # what runs without a recorder may not with one
        raise Unfollowed(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    steps = recorder.steps
    returned = [recorder.number(t) for t in tensors(outputs)]
    calls = {site.name: [i for i, step in enumerate(steps) if step.called == site.name] for site in sites}
    if any(len(calls[site.name]) != site.calls for site in sites):
        raise Unfollowed("it calls its layers in another way on other images")
    return Course(steps, calls, returned, _unused(steps, returned, len(x.tensors)))


def _outermost(model: nn.Module, layers: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Every layer, and the modules in which none lies."""
    for name, module in model.named_modules():
        if module in layers or layers.isdisjoint(module.modules()):
            yield name, module


def _unused(steps: Sequence[RecordedStep], outputs: Sequence[int], inputs: int) -> list[list[int]]:
    last = dict.fromkeys(range(inputs), 0)
    for place, step in enumerate(steps):
        last |= {step.first + i: place for i in range(len(step.kinds))}
        last |= dict.fromkeys(step.uses(), place)
    unused: list[list[int]] = [[] for _ in steps]
    for number, place in last.items():
        if number not in outputs:
            unused[place].append(number)
    return unused


@dataclass
class _StepRecorder(TorchFunctionMode):
    """Writes down the calls of functions, and those of modules that have its hooks."""

    model: nn.Module
    x: Inputs
    steps: list[RecordedStep] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        given = self.x.tensors
        self._numbers = WeakTensorKeyDictionary({tensor: number for number, tensor in enumerate(given)})
        self._count = len(given)
        self._inside: list[tuple[Any, Any]] = []
        own = [leaf for module in self.model.modules() for leaf in tree_leaves(vars(module))]
        self._own = {id(leaf): leaf for leaf in own if isinstance(leaf, Tensor)}

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inside.append(([], []) if self._inside else self._references(args, kwargs))

    def leave(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if len(self._inside) == 1:
                others = [leaf for leaf in tree_leaves(output) if not isinstance(leaf, Tensor | NoneType)]
                if others:
                    raise Unfollowed(f"{_name(name)} returns {type(others[0]).__name__}")
                self._write(name, *self._inside[0], output)
            self._inside.pop()

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        given = results((args, kwargs))
        references = self._references(args, kwargs)
        output = func(*args, **kwargs)
        if results(output) or (given and output is None):
            self._write(func, *references, output)
        elif given and getattr(func, "__name__", "") not in ABOUT_SIZES:
            raise Unfollowed(f"its code looks at values ({_name(func)})")
        return output

    def number(self, tensor: Tensor) -> int:
        number: int | None = self._numbers.get(tensor)
        if number is None:
            raise Unfollowed("it uses a tensor of unknown origin")
        return number

    def _references(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments with numbers in the place of what the steps have given; tensors of the model are what they are."""
        return tree_map(self._reference, args), tree_map(self._reference, kwargs)

    def _reference(self, part: Any) -> Any:
        if isinstance(part, Tensor):
            own = id(part) in self._own and part not in self._numbers
            return part if own else Value(self.number(part))
        inner = (part.start, part.stop, part.step) if isinstance(part, slice) else (part,)
        for value in inner:
            if not isinstance(value, CONSTANTS):
                raise Unfollowed(f"a call is given {type(value).__name__}")
        return part

    def _write(self, called: str | Callable[..., Any], args: Any, kwargs: Any, output: Any) -> None:
        found = results(output)
        self.steps.append(RecordedStep(called, args, kwargs, self._count, [kind(t) for t in found]))
        self._numbers.update(dict(zip(found, itertools.count(self._count), strict=False)))
        self._count += len(found)


class Courses:
    """The courses of one network, for every kind of batch.

    ``reason`` says why there are none, or not for all batches; "" if there are.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], reason: str = "") -> None:
        self._model = model
        self._sites = sites
        self._found: dict[Hashable, Course] = {}
        self.reason = reason

    def of(self, x: Inputs) -> Course | None:
        """For batches like this one; None where a network must run from its beginning."""
        if self.reason or x.kind in self._found:
            return self._found.get(x.kind)
        try:
            if len(self._found) == MOST_COURSES:
                raise Unfollowed(f"on batches of more than {MOST_COURSES} shapes")
            self._found[x.kind] = write_down(self._model, self._sites, x)
        except Unfollowed as error:
            self.give_up(str(error))
        return self._found.get(x.kind)

    def give_up(self, reason: str) -> None:
        """From now on networks run from their beginning."""
        self.reason = reason
        self._found.clear()
