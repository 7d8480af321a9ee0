"""How a converted network differs from the model it was made of, as plain data from which it is built again.

Only modules of the kinds below are ever built: a description from a file cannot run anything else.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sepconv import layers

_DIMENSIONS = (1, 2, 3)
_SEPARABLE = {f"SeparableConv{d}d": getattr(layers, f"SeparableConv{d}d") for d in _DIMENSIONS}
_DEPTHWISE = {f"DepthwiseConv{d}d": getattr(layers, f"DepthwiseConv{d}d") for d in _DIMENSIONS}
_POINTWISE = {f"PointwiseConv{d}d": getattr(layers, f"PointwiseConv{d}d") for d in _DIMENSIONS}
_CONV = {f"Conv{d}d": getattr(nn, f"Conv{d}d") for d in _DIMENSIONS}
_NORM = {f"BatchNorm{d}d": getattr(nn, f"BatchNorm{d}d") for d in _DIMENSIONS}
_ACTIVATION = {
    kind.__name__: kind for kind in (nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.Sigmoid)
}
# The names under which separable layers compute an activation together with their convolutions.
_FUSED = {_ACTIVATION[kind]: kind.lower() for kind in ("ReLU", "ReLU6", "SiLU", "Hardswish", "GELU", "Sigmoid")}
KINDS: dict[str, Any] = {**_SEPARABLE, **_DEPTHWISE, **_POINTWISE, **_CONV, **_NORM, **_ACTIVATION}

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
    if type(before) is not type(after):
        raise ValueError(
            f"differences: {path or 'the model'} became a {type(after).__name__}, which cannot be described"
        )
    # Not named_children, which passes over a module that stands there under a second name.
    for name, child in after._modules.items():
        if child is not None:
            _compare(before._modules.get(name), child, f"{path}.{name}".lstrip("."), found, first)


def describe(module: nn.Module) -> Description | None:
    """Kind, arguments and children of one module; None if its kind is none of `KINDS`."""
    kind = type(module).__name__
    if KINDS.get(kind) is not type(module):
        return None
    if kind in _SEPARABLE:
        children = {name: describe(child) for name, child in module.named_children() if name != "activation"}
        known = type(module.activation) in _FUSED or module.activation is None
        if not known or None in children.values():
            return None
        return {"kind": kind, "arguments": _separable_arguments(module), "children": children}
    return {"kind": kind, "arguments": _arguments(kind, module), "children": {}}


def _chain(modules: nn.Sequential) -> Description | None:
    """What stands where the original has a single module, if all of it can be described."""
    children = {name: describe(child) for name, child in modules.named_children()}
    return None if None in children.values() else {"kind": "Sequential", "arguments": {}, "children": children}


def build(description: Description) -> nn.Module:
    """The module that was described, with weights of its own.

    Raises:
        ValueError: not a description.
    """
    try:
        kind = nn.Sequential if description["kind"] == "Sequential" else KINDS[description["kind"]]
        module = kind(**description["arguments"])
        for name, child in description["children"].items():
            setattr(module, name, build(child))
        return module
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"build: this is no description of a module ({error})") from error


def apply(model: nn.Module, changes: list[Description]) -> nn.Module:
    """Replace modules of `model`, in place, so that it is built as the network that was described.

    Raises:
        ValueError: the descriptions are damaged, or the model has no such module.
    """
    for change in changes:
        path = change.get("path", "")
        try:
            module = model.get_submodule(change["same_as"]) if "same_as" in change else build(change)
            model.set_submodule(path, module)
        except (AttributeError, ValueError) as error:
            raise ValueError(f"apply: {path!r} cannot be replaced: {error}") from error
    return model


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
        "activation": _FUSED.get(type(module.activation)),
        "pointwise_layers": module.pointwise_layers,
    }


def _plain(value: Any) -> Any:
    """As JSON gives it back: lists instead of tuples."""
    return list(value) if isinstance(value, tuple) else value
