"""Which values of a graph are integers: where ``FakeQuantize`` modules stand.

A value becomes integers where a layer reads it, or an operation between such values and a layer. What is computed with
the layer in front of it (its activation, the sum with a shortcut) is not rounded in between. The network's outputs stay
float32. The graph and the names of the layers that stay in float32 decide alone, so that a file names those and no
more.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from sepconv.quantize.fake import FakeQuantize
from sepconv.quantize.layers import GraphLayer, find_layers
from sepconv.quantize.operations import (
    argument,
    computes,
    is_activation,
    is_fraction,
    is_layer,
    is_sum,
    keeps_steps,
    module_of,
    moves,
    name_of,
)

WEIGHT = "weight_quantizer"
"""The module beside a weight."""

VALUES = "quantizers"
"""Where those of values are, by the module and the operation that made the value."""


def place(module: fx.GraphModule, left: Collection[str] = ()) -> list[GraphLayer]:
    """Put modules on weights and values, in place; their ranges are still to be found.

    Args:
        left: names of layers that stay in float32.

    Returns:
        The layers, those in float32 with the reason.
    """
    layers = find_layers(module)
    for layer in layers:
        if layer.name in left:
            layer.reason = layer.reason or "left"
        if any(not is_fraction(x) or x.op == "get_attr" for x in layer.inputs):
            layer.reason = layer.reason or "its input is a constant"
    inside = {call for layer in layers if not layer.reason for call in layer.calls}
    wanted = _wanted(module.graph, inside)
    for node in list(module.graph.nodes):
        if node in wanted and not _waits(node, wanted, inside):
            _place_value(module, node)
    for layer in layers:
        if not layer.reason:
            _place_weight(module, layer)
    module.graph.lint()
    module.recompile()
    return layers


def _wanted(graph: fx.Graph, inside: Collection[fx.Node]) -> set[fx.Node]:
    """Values that reach a layer as integers."""
    wanted: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for user in node.users:
            reads = user in inside and user.args[0] is node
            passes = user in wanted and (moves(user) or computes(user)) and not is_layer(user)
            if reads or passes:
                wanted.add(node)
    return wanted


def _waits(node: fx.Node, wanted: Collection[fx.Node], inside: Collection[fx.Node]) -> bool:
    """Whether a value is rounded later, with what is computed from it at once, or was rounded before."""
    if moves(node) or not is_fraction(node) or node.op == "get_attr":
        return True
    users = list(node.users)
    if len(users) != 1 or users[0] not in wanted:
        return False
    if is_activation(users[0]):
        return node in inside or _absorbed(node, inside) is not None
    return node in inside and _absorbed(users[0], inside) is node


def _absorbed(node: fx.Node, inside: Collection[fx.Node]) -> fx.Node | None:
    """The layer that a sum is computed with: of its operands the last one that nothing else reads."""
    if not is_sum(node):
        return None
    operands = [one for one in node.all_input_nodes if one in inside and len(one.users) == 1]
    return max(operands, key=_place_in_graph, default=None)


def _place_in_graph(node: fx.Node) -> int:
    return next(i for i, other in enumerate(node.graph.nodes) if other is node)


def _place_value(module: fx.GraphModule, node: fx.Node) -> None:
    same = _quantizer_before(node) if keeps_steps(node) else None
    path = same or _free_name(module, node)
    if same is None:
        module.add_submodule(path, FakeQuantize())
    with module.graph.inserting_after(node):
        new = module.graph.call_module(path, (node,))
    new.meta.update(node.meta)
    for user in list(node.users):
        if user is not new and user.op != "output":
            user.replace_input_with(node, new)


def _quantizer_before(node: fx.Node) -> str | None:
    """The module whose steps the numbers of a value have already."""
    source = node.args[0]
    while isinstance(source, fx.Node) and (moves(source) or keeps_steps(source)):
        source = source.args[0]
    return str(source.target) if isinstance(source, fx.Node) and source.op == "call_module" else None


def _free_name(module: fx.GraphModule, node: fx.Node) -> str:
    own = str(node.target) if node.op == "placeholder" else f"{module_of(node)}.{name_of(node) or node.op}"
    base = f"{VALUES}.{own.strip('.').replace('.', '_')}"
    known = {name for name, _ in module.named_modules()}
    number = next(i for i in range(len(known) + 1) if (base if i == 0 else f"{base}_{i}") not in known)
    return base if number == 0 else f"{base}_{number}"


def _place_weight(module: fx.GraphModule, layer: GraphLayer) -> None:
    path = f"{str(layer.weight.target).removesuffix('weight')}{WEIGHT}"
    module.add_submodule(path, FakeQuantize.of_weight(layer.tensor(module).shape[0]))
    with module.graph.inserting_after(layer.weight):
        new = module.graph.call_module(path, (layer.weight,))
    new.meta.update(layer.weight.meta)
    for call in layer.calls:
        assert argument(call, "weight") is layer.weight
        call.replace_input_with(layer.weight, new)
