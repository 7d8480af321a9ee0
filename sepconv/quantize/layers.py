"""The layers of a captured graph: convolutions and linear layers with their weights; batch norms folded into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sepconv.norms import fold, scale_and_shift
from sepconv.quantize.operations import argument, is_layer, module_of, name_of

_CONVS: dict[str, Any] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}


@dataclass
class GraphLayer:
    """A weight and the calls that use it.

    Attributes:
        name: of the module that has the weight.
        calls: the operations, in the order in which they run.
        reason: why it stays in float32; empty if it does not.
    """

    name: str
    weight: fx.Node
    calls: list[fx.Node]
    reason: str = ""

    @property
    def kind(self) -> str:
        return name_of(self.calls[0])

    @property
    def inputs(self) -> list[fx.Node]:
        return [call.args[0] for call in self.calls if isinstance(call.args[0], fx.Node)]

    @property
    def groups(self) -> int:
        return 1 if self.kind == "linear" else int(argument(self.calls[0], "groups"))

    def tensor(self, module: nn.Module) -> nn.Parameter:
        return tensor_at(module, self.weight)

    def bias(self, module: nn.Module) -> nn.Parameter | None:
        node = argument(self.calls[0], "bias")
        return tensor_at(module, node) if isinstance(node, fx.Node) else None

    def like_conv(self, module: nn.Module) -> Any:
        """An ``nn.Conv`` of the same geometry, without numbers."""
        call, weight = self.calls[0], self.tensor(module)
        groups = self.groups
        padding = argument(call, "padding")
        return _CONVS[self.kind](
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            tuple(argument(call, "stride")),
            padding if isinstance(padding, str) else tuple(padding),
            tuple(argument(call, "dilation")),
            groups,
            device="meta",
        )


def tensor_at(module: nn.Module, node: fx.Node) -> Any:
    """The parameter or buffer that a node names."""
    owner, _, last = str(node.target).rpartition(".")
    return getattr(module.get_submodule(owner), last)


def _maybe_tensor_at(module: nn.Module, node: fx.Node | None) -> Any:
    return None if node is None else tensor_at(module, node)


def _is_parameter(module: nn.Module, node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(tensor_at(module, node), nn.Parameter)


def forget_unused(module: fx.GraphModule) -> None:
    """Delete the tensors that no node reads."""
    used = {str(node.target) for node in module.graph.nodes if node.op in ("get_attr", "call_module")}
    for name, _ in [*module.named_parameters(), *module.named_buffers()]:
        owner, _, last = name.rpartition(".")
        if name not in used and owner not in used:
            delattr(module.get_submodule(owner), last)


def find_layers(module: fx.GraphModule) -> list[GraphLayer]:
    """In the order in which they run."""
    found: dict[str, GraphLayer] = {}
    for node in module.graph.nodes:
        if not is_layer(node):
            continue
        weight = argument(node, "weight")
        if isinstance(weight, fx.Node) and _is_parameter(module, weight):
            path = str(weight.target)
            layer = found.setdefault(path, GraphLayer(path.rpartition(".")[0] or path, weight, []))
            layer.calls.append(node)
    for layer in found.values():
        layer.reason = _alike(layer)
    return list(found.values())


def _alike(layer: GraphLayer) -> str:
    """Why calls of one weight cannot be one layer."""
    if any(user not in layer.calls for user in layer.weight.users):
        return "its weight is used for something else as well"
    if len({(name_of(call), str(call.args[2:]), str(argument(call, "bias"))) for call in layer.calls}) > 1:
        return "its weight is used by different layers"
    return ""


def compute_constants(module: fx.GraphModule) -> None:
    """Weights that the model computes from its parameters (standardised, normalised) become parameters."""
    for node in list(module.graph.nodes):
        if not is_layer(node):
            continue
        weight = argument(node, "weight")
        if isinstance(weight, fx.Node) and weight.op == "call_function" and (parts := _constant_parts(weight)):
            value = _evaluate(module, weight, parts)
            path = f"{module_of(node)}.weight".lstrip(".")
            owner, _, last = path.rpartition(".")
            if hasattr(module.get_submodule(owner) if _has(module, owner) else nn.Module(), last):
                path = f"{path}_computed"
            with module.graph.inserting_before(node):
                new = _add_parameter(module, path, value)
            node.replace_input_with(weight, new)
    module.graph.eliminate_dead_code()


def _has(module: nn.Module, path: str) -> bool:
    return not path or path in dict(module.named_modules())


def _constant_parts(node: fx.Node) -> list[fx.Node]:
    """What a value is computed from, itself last; empty where that depends on the network's input."""
    parts: list[fx.Node] = []
    seen: set[fx.Node] = set()

    def visit(one: fx.Node) -> bool:
        if one in seen:
            return True
        seen.add(one)
        if one.op == "placeholder" or not all(visit(other) for other in one.all_input_nodes):
            return False
        parts.append(one)
        return True

    return parts if visit(node) else []


@torch.no_grad()
def _evaluate(module: fx.GraphModule, node: fx.Node, parts: list[fx.Node]) -> Tensor:
    interpreter = fx.Interpreter(module, garbage_collect_values=False)
    for part in parts:
        interpreter.env[part] = interpreter.run_node(part)
    value: Tensor = interpreter.env[node]
    return value


def _add_parameter(module: fx.GraphModule, path: str, value: Tensor) -> fx.Node:
    """A parameter of that name, made now, and the node that reads it."""
    owner, _, last = path.rpartition(".")
    if not _has(module, owner):
        module.add_submodule(owner, nn.Module())
    module.get_submodule(owner).register_parameter(last, nn.Parameter(value.detach().clone()))
    node = module.graph.get_attr(path)
    node.meta["val"] = value
    return node


def fold_norms(module: fx.GraphModule) -> None:
    """Batch norms behind layers become part of their weights; every layer gets a bias."""
    for layer in find_layers(module):
        if layer.reason:
            continue
        norms = [_norm_behind(call) for call in layer.calls]
        first = norms[0]
        if first is not None and all(norm is not None and norm.args[1:] == first.args[1:] for norm in norms):
            _fold(module, layer, [norm for norm in norms if norm is not None])
        elif layer.bias(module) is None:
            weight = layer.tensor(module)
            _set_bias(module, layer, weight.new_zeros(weight.shape[0]))
    module.graph.eliminate_dead_code()
    module.recompile()
    forget_unused(module)


def _norm_behind(call: fx.Node) -> fx.Node | None:
    """The batch norm that is all that becomes of a layer's output."""
    [*users] = call.users
    if len(users) != 1 or name_of(users[0]) != "batch_norm" or users[0].args[0] is not call:
        return None
    norm = users[0]
    known = argument(norm, "running_mean") is not None and not argument(norm, "training")
    return norm if known else None


@torch.no_grad()
def _fold(module: fx.GraphModule, layer: GraphLayer, norms: list[fx.Node]) -> None:
    numbers = [argument(norms[0], name) for name in ("running_mean", "running_var", "weight", "bias")]
    mean, variance, scale, shift = (_maybe_tensor_at(module, one) for one in numbers)
    factor, summand = scale_and_shift(mean, variance, scale, shift, argument(norms[0], "eps"))
    weight, bias = fold(layer.tensor(module), layer.bias(module), factor, summand)
    old = layer.tensor(module)
    old.copy_(weight)
    _set_bias(module, layer, bias.to(old.dtype))
    for call, norm in zip(layer.calls, norms, strict=True):
        norm.replace_all_uses_with(call)
        module.graph.erase_node(norm)


def _set_bias(module: fx.GraphModule, layer: GraphLayer, value: Tensor) -> None:
    node = argument(layer.calls[0], "bias")
    if isinstance(node, fx.Node) and len(node.users) == len(layer.calls):
        tensor_at(module, node).data = value
        return
    path = f"{str(layer.weight.target).removesuffix('weight')}bias"
    with module.graph.inserting_before(layer.calls[0]):
        new = _add_parameter(module, path, value)
    for call in layer.calls:
        call.args = (*call.args[:2], new, *call.args[3:])
        call.kwargs = {key: value for key, value in call.kwargs.items() if key != "bias"}
