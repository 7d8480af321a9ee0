"""Passes that go on where they stopped, so that layer after layer is fitted and each piece of the network runs once.

A network is followed into the modules in which the layers to fit lie (symbolic tracing); every other module runs as it
is, whatever its Python does. The values that the rest of the network needs are held between two layers, for each batch
of images, and what runs is the piece between. What depends on values or sizes cannot be followed, and what comes out
otherwise than from the network itself is not trusted: such a network runs from its beginning for every layer.

Memory: what one batch needs, and ``HELD_BYTES`` for each network; batches that do not fit run from the beginning.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from sepconv.convert.graph import Site
from sepconv.convert.outputs import tensors
from sepconv.convert.passes import Call, Hooks, calls, first_input, run

HELD_BYTES = 1 << 30
"""Values of one network held between two layers."""

ROUNDING = 64
"""Units in the last place by which a followed network may differ from itself."""

Values = dict[fx.Node, Any]


class _Alone(nn.Module):
    """A network that takes the images alone: its other arguments keep their defaults."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return self.network(x)


class _Tracer(fx.Tracer):
    """Goes into a module only if one of the layers lies in it."""

    def __init__(self, model: nn.Module, layers: set[nn.Module]) -> None:
        super().__init__()
        self._entered = {module for module in model.modules() if not layers.isdisjoint([*module.modules()][1:])}

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return module not in self._entered


@dataclass(frozen=True)
class Course:
    """The steps of a network in their order: those of the original, and of the converted one as well.

    ``calls`` has the places of each site's calls among the steps; ``last`` the place where a value is used last;
    ``constants`` are tensors that the network's Python makes anew in every pass.
    """

    steps: Sequence[fx.Node]
    calls: Mapping[str, Sequence[int]]
    last: Mapping[fx.Node, int]
    constants: Mapping[str, Tensor]


@dataclass
class _State:
    """How far a network has run on one batch, and the values that what follows needs."""

    place: int
    values: Values


def follow(model: nn.Module, sites: Sequence[Site], example: Tensor) -> Course | str:
    """The course of a network past these sites, or why there is none.

    Args:
        model: in evaluation mode; left as it is.
    """
    try:
        course = _trace(model, sites)
        return course if _is_right(model, course, sites, example) else "it computes something else when it is traced"
    except Exception as error:  # any code of the model may fail on a symbolic value, in any way
        return f"{type(error).__name__}: {error}".splitlines()[0]


def _trace(model: nn.Module, sites: Sequence[Site]) -> Course:
    root = _Alone(copy.deepcopy(model))  # what the Python keeps of a symbolic value stays in the copy
    layers = {root.network.get_submodule(site.name): site for site in sites}
    graph = _Tracer(root, set(layers)).trace(root)
    steps = list(graph.nodes)
    places = {node: place for place, node in enumerate(steps)}
    found: dict[str, list[int]] = {site.name: [] for site in sites}
    for node, place in places.items():
        site = layers.get(root.get_submodule(str(node.target))) if node.op == "call_module" else None
        if site is not None:
            found[site.name].append(place)
    last = {node: max((places[user] for user in node.users), default=-1) for node in steps}
    made = [str(node.target) for node in steps if node.op == "get_attr"]
    constants = {name: getattr(root, name) for name in made if "." not in name}
    return Course(steps, found, last, constants)


def _is_right(model: nn.Module, course: Course, sites: Sequence[Site], example: Tensor) -> bool:
    """Whether all sites see and give the same as in the network itself, and whether its outputs are the same."""
    real: dict[str, list[Call]] = {site.name: [] for site in sites}
    with Hooks() as hooks, torch.no_grad():
        for site in sites:
            hooks.after(site.conv, _keeping(real[site.name]))
        outputs = tensors(run(model, example))
    frontier = Frontier(model, course, fixed=True)
    if not _same(outputs, tensors(frontier.outputs(0, example, sites[0]))):
        return False
    # Compared at once, as the steps behind may change in place what these gave.
    return all(_same(_flat(real[site.name]), _flat(frontier.calls(0, example, site))) for site in sites)


def _keeping(seen: list[Call]) -> Callable[[nn.Module, Tensor, Tensor], None]:
    return lambda _, x, output: seen.append(Call(x, output).kept())


def _flat(calls: Sequence[Call]) -> list[Tensor]:
    return [tensor for call in calls for tensor in call]


def _same(wanted: Sequence[Tensor], given: Sequence[Tensor]) -> bool:
    return len(wanted) == len(given) and all(map(_near, wanted, given))


def _near(want: Tensor, have: Tensor) -> bool:
    if want.shape != have.shape or want.dtype != have.dtype:
        return False
    most = float(want.abs().nan_to_num(0, 0, 0).max()) if want.numel() else 0.0
    bound = ROUNDING * torch.finfo(want.dtype).eps
    return torch.allclose(want, have, rtol=bound, atol=bound * most, equal_nan=True)


class Frontier:
    """One network on its way along a course, on every batch of images; without a course it starts anew for each layer.

    Args:
        fixed: its layers stay what they are; if not, a layer is replaced after its calls were looked at, and the
            frontier waits in front of it.
    """

    def __init__(self, network: nn.Module, course: Course | None, fixed: bool) -> None:
        self._network = network
        self._root = _Alone(network)
        self._course = course
        self._fixed = fixed
        self._held: dict[int, _State] = {}
        self._bytes: dict[int, int] = {}

    def calls(self, number: int, x: Tensor, site: Site) -> list[Call]:
        """Input and output of every call of a site on batch ``number``, whose images are ``x``."""
        if self._course is None:
            return calls(self._network, self._network.get_submodule(site.name), x, site.calls)
        places = self._course.calls[site.name]
        with torch.no_grad():
            values = self._reach(number, x, places[0])
            if not self._fixed:
                self._hold(number, places[0], values)
                values = dict(values)
            seen = [self._call(values, places[0])]
            if self._fixed:
                self._hold(number, places[0] + 1, values)
            if len(places) > 1:
                seen = [seen[0].kept()]
                values = _copied(values)  # what runs between may change it in place
            for place in range(places[0] + 1, places[-1] + 1):
                if place in places:
                    call = self._call(values, place)
                    seen.append(call if place == places[-1] else call.kept())
                else:
                    self._step(values, place)
        return seen

    def outputs(self, number: int, x: Tensor, site: Site) -> Any:
        """What the network returns on batch ``number``, run from the site on."""
        if self._course is None:
            return run(self._network, x)
        start = self._course.calls[site.name][0]
        with torch.no_grad():
            values = self._reach(number, x, start)
            self._hold(number, start, values)
            values = _copied(values)
            for place in range(start, len(self._course.steps)):
                result = self._step(values, place)
        return result

    def _reach(self, number: int, x: Tensor, place: int) -> Values:
        """The values in front of a step."""
        state = self._held.pop(number, None)
        self._bytes.pop(number, None)
        if state is None or state.place > place:
            state = _State(0, {})
        for step in range(state.place, place):
            self._step(state.values, step, x)
        return state.values

    def _hold(self, number: int, place: int, values: Values) -> None:
        held = _bytes(values)
        if sum(self._bytes.values()) + held <= HELD_BYTES:
            self._held[number], self._bytes[number] = _State(place, dict(values)), held

    def _call(self, values: Values, place: int) -> Call:
        assert self._course is not None
        args, kwargs = self._arguments(values, self._course.steps[place])
        return Call(first_input(args, kwargs), self._step(values, place))

    def _step(self, values: Values, place: int, x: Tensor | None = None) -> Any:
        """Run one step and forget what nothing needs any more."""
        assert self._course is not None
        node = self._course.steps[place]
        result = self._result(values, node, x)
        if self._course.last[node] > place and node.op != "get_attr":
            values[node] = result
        for source in node.all_input_nodes:
            if self._course.last[source] == place:
                values.pop(source, None)
        return result

    def _result(self, values: Values, node: fx.Node, x: Tensor | None) -> Any:
        args, kwargs = self._arguments(values, node)
        if node.op == "call_module":
            return self._root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_function":
            assert callable(node.target)
            return node.target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "placeholder":
            assert x is not None
            return x.clone()  # the network may change its input in place
        return args[0] if node.op == "output" else None

    def _arguments(self, values: Values, node: fx.Node) -> tuple[Any, dict[str, Any]]:
        found: Any = fx.node.map_arg((node.args, node.kwargs), lambda source: self._value(values, source))
        return found

    def _value(self, values: Values, node: fx.Node) -> Any:
        if node.op != "get_attr":
            return values[node]
        assert self._course is not None
        name = str(node.target)
        if name in self._course.constants:
            return self._course.constants[name]
        parent, _, leaf = name.rpartition(".")
        return getattr(self._root.get_submodule(parent), leaf)


def _copied(values: Values) -> Values:
    return dict(zip(values, copy.deepcopy(list(values.values())), strict=True))


def _bytes(values: Values) -> int:
    """What tensors take; several may be views of the same memory."""
    storages = [t.untyped_storage() for t in tree_leaves(list(values.values())) if isinstance(t, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
