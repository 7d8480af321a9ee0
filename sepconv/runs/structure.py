"""How a converted network differs from the model it was made of, as plain data from which it is built again.

Only modules of the kinds below are ever built, from arguments of known names, kinds and sizes: a description from a
file cannot run anything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from reprlib import repr as shortened
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from sepconv import layers
from sepconv.activations import ACTIVATIONS, is_name, name_of

_DIMENSIONS = (1, 2, 3)
_SEPARABLE = {f"SeparableConv{d}d": getattr(layers, f"SeparableConv{d}d") for d in _DIMENSIONS}
_DEPTHWISE = {f"DepthwiseConv{d}d": getattr(layers, f"DepthwiseConv{d}d") for d in _DIMENSIONS}
_POINTWISE = {f"PointwiseConv{d}d": getattr(layers, f"PointwiseConv{d}d") for d in _DIMENSIONS}
_CONV = {f"Conv{d}d": getattr(nn, f"Conv{d}d") for d in _DIMENSIONS}
_NORM = {f"BatchNorm{d}d": getattr(nn, f"BatchNorm{d}d") for d in _DIMENSIONS}
_ACTIVATION = {kind.__name__: kind for kind in (type(record.module()) for record in ACTIVATIONS.values())}
KINDS: dict[str, Any] = {**_SEPARABLE, **_DEPTHWISE, **_POINTWISE, **_CONV, **_NORM, **_ACTIVATION}

_CONTAINERS = ("Sequential", *_SEPARABLE)
_MOST_CHILDREN = 64
_LARGEST_STEP = 1024
"""Of filters, strides, paddings and dilations in a description: an image grows by no more than twice as much."""

_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "padding_mode")

Description = dict[str, Any]


def differences(original: nn.Module, changed: nn.Module) -> list[Description]:
    """The modules of `changed` that `original` does not have at the same path, as descriptions with their "path".

    A module at several paths is described at the first; the others say "same_as".

    Raises:
        ValueError: a module was replaced by one of a kind that cannot be described.

    Example:
        >>> a, b = nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Sequential(nn.Identity())
        >>> differences(a, b)
        [{'path': '0', 'kind': 'Identity', 'arguments': {}, 'children': {}}]
    """
    found: list[Description] = []
    _compare(original, changed, "", found, {})
    return found


def _compare(
    before: nn.Module | None, after: nn.Module, path: str, found: list[Description], first: dict[nn.Module, str]
) -> None:
    if after in first:
        found.append({"path": path, "same_as": first[after]})
        return
    description = describe(after)
    if description is not None:
        if before is None or describe(before) != description:
            first[after] = path
            found.append({"path": path, **description})
        return
    if type(after) is nn.Sequential and type(before) is not nn.Sequential and (chain := _chain(after)) is not None:
        first[after] = path
        found.append({"path": path, **chain})
        return
    if before is None or _class(before) != _class(after):
        raise ValueError(
            f"differences: {path or 'the model'} became a {type(after).__name__}, which cannot be described"
        )
    # Not named_children, which passes over a module that stands there under a second name.
    for name, child in after._modules.items():
        if child is not None:
            _compare(before._modules.get(name), child, f"{path}.{name}".lstrip("."), found, first)


def _class(module: nn.Module) -> tuple[str, str]:
    """By name: parametrized modules, traced ones and those of a function's own class have a new class in every copy."""
    kind = type_before_parametrizations(module)
    return kind.__module__, kind.__qualname__


def describe(module: Any) -> Description | None:
    """Kind, arguments and children of one module; None if its kind is none of `KINDS`."""
    kind = type(module).__name__
    if KINDS.get(kind) is not type(module):
        return None
    if kind in _ACTIVATION and name_of(module) != name_of(_ACTIVATION[kind]()):
        return None
    if kind in _SEPARABLE:
        children = {name: describe(child) for name, child in module.named_children() if name != "activation"}
        if name_of(module.activation) is None or None in children.values():
            return None
        return {"kind": kind, "arguments": _separable_arguments(module), "children": children}
    return {"kind": kind, "arguments": _arguments(kind, module), "children": {}}


def _chain(modules: nn.Sequential) -> Description | None:
    """What stands where the original has a single module, if all of it can be described."""
    children = {name: describe(child) for name, child in modules.named_children()}
    return None if None in children.values() else {"kind": "Sequential", "arguments": {}, "children": children}


def build(description: Any) -> nn.Module:
    """The module that was described, with weights of its own.

    Raises:
        ValueError: not a description.
    """
    try:
        kind, arguments, children = (description[key] for key in ("kind", "arguments", "children"))
        _check_arguments(kind, arguments, children)
        module = nn.Sequential() if kind == "Sequential" else KINDS[kind](**arguments)
        for name, child in children.items():
            _put(module, kind, name, child)
        return module
    except (KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"build: this is no description of a module ({reason})") from error


def _check_arguments(kind: Any, arguments: Any, children: Any) -> None:
    if not isinstance(children, dict) or len(children) > _MOST_CHILDREN:
        raise TypeError(f"children: {shortened(children)}")
    for name, value in arguments.items():
        if name not in _ACCEPTS or not _ACCEPTS[name](value):
            raise TypeError(f"{shortened(kind)} with {shortened(name)}: {shortened(value)}")
    if arguments.get("pointwise_layers", 1) > max(1, len(children)):
        raise TypeError(f"pointwise_layers: {arguments['pointwise_layers']} without as many children")
    if kind == "Sequential" and arguments:
        raise TypeError(f"Sequential with {shortened(arguments)}")


def _put(parent: nn.Module, kind: str, name: str, description: Description) -> None:
    """A layer into a separable one, in the place of its like, or anything but a chain into a chain."""
    child = build(description)
    if kind == "Sequential":
        if type(child) is nn.Sequential:
            raise TypeError("a Sequential within a Sequential")
        parent.add_module(name, child)
        return
    norm = name.endswith("_norm") and isinstance(getattr(parent, name.removesuffix("_norm"), None), nn.Module)
    alike = type(child) is type(parent._modules.get(name)) and name != "activation"
    if not alike and not (norm and description["kind"] not in _CONTAINERS):
        raise TypeError(f"{kind} with {shortened(name)}: {shortened(description['kind'])}")
    setattr(parent, name, child)


def apply(model: nn.Module, changes: list[Description]) -> nn.Module:
    """Replace modules of `model`, in place, so that it is built as the network that was described.

    Raises:
        ValueError: the descriptions are damaged, or the model has no such module.
    """
    known = {name for name, _ in model.named_modules(remove_duplicate=False) if name}
    changed: set[str] = set()
    for change in changes:
        path = change.get("path") if isinstance(change, dict) else None
        if not isinstance(path, str) or path not in known:
            raise ValueError(f"apply: {shortened(path)} cannot be replaced: the model has no such module")
        if any(path == other or f"{path}.".startswith(f"{other}.") for other in changed):
            raise ValueError(f"apply: {path!r} cannot be replaced: it was replaced before")
        try:
            model.set_submodule(path, _same_or_new(model, change, changed))
        except (AttributeError, ValueError) as error:
            raise ValueError(f"apply: {path!r} cannot be replaced: {error}") from error
        changed.add(path)
    return model


def _same_or_new(model: nn.Module, change: Description, changed: set[str]) -> nn.Module:
    if "same_as" not in change:
        return build(change)
    if not isinstance(change["same_as"], str) or change["same_as"] not in changed:
        raise ValueError(f"{shortened(change['same_as'])} was not replaced before")
    return model.get_submodule(change["same_as"])


def _arguments(kind: str, module: Any) -> Description:
    if kind in _ACTIVATION:
        return {}
    if kind in _NORM:
        names = ("num_features", "eps", "momentum", "affine", "track_running_stats")
        return {name: getattr(module, name) for name in names}
    own: Description = {"in_channels": module.in_channels, "bias": module.bias is not None}
    if kind in _POINTWISE:
        return {**own, "out_channels": module.out_channels, "stride": _plain(module.stride)}
    geometry = {name: _plain(getattr(module, name)) for name in _GEOMETRY}
    if kind in _DEPTHWISE:
        return {**own, **geometry, "depth_multiplier": module.depth_multiplier}
    return {**own, **geometry, "out_channels": module.out_channels, "groups": module.groups}


def _separable_arguments(module: Any) -> Description:
    """What the constructor needs; the layers inside are described as children."""
    return {
        "in_channels": module.in_channels,
        "out_channels": module.out_channels,
        "kernel_size": _plain(module.depthwise.kernel_size),
        "activation": name_of(module.activation) or None,
        "pointwise_layers": module.pointwise_layers,
    }


def _plain(value: Any) -> Any:
    """As JSON gives it back: lists instead of tuples."""
    return list(value) if isinstance(value, tuple) else value


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _are_steps(least: int) -> Callable[[Any], bool]:
    def holds(value: Any) -> bool:
        steps = value if isinstance(value, list) else [value]
        return 0 < len(steps) <= 3 and all(type(step) is int and least <= step <= _LARGEST_STEP for step in steps)

    return holds


def _one_of(*choices: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(choice) and value == choice for choice in choices)


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


_ACCEPTS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("in_channels", "out_channels", "groups", "depth_multiplier", "num_features"), _is_size),
    "pointwise_layers": _is_size,
    **dict.fromkeys(("kernel_size", "stride", "dilation"), _are_steps(1)),
    "padding": lambda value: value in ("same", "valid") if isinstance(value, str) else _are_steps(0)(value),
    "padding_mode": _one_of("zeros", "reflect", "replicate", "circular"),
    **dict.fromkeys(("bias", "affine", "track_running_stats"), _one_of(True, False)),
    "eps": _is_share,
    "momentum": lambda value: value is None or _is_share(value),
    "activation": lambda value: value is None or (value != "" and is_name(value)),
}
