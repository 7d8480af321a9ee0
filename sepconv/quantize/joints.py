"""Where a factor per channel goes through a graph: layers that write the same channels, and layers that read them.

It goes through what is positively homogeneous (ReLU, pooling), and through sums with shortcuts, where all layers that
add to a sum multiply and all that read one divide. It goes through ReLU6 as well, up to where that cuts, and through no
SiLU or hardswish.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx, nn

from sepconv.quantize.layers import GraphLayer, find_layers
from sepconv.quantize.operations import argument, is_sum, name_of

_LINEAR = frozenset({
    "relu", "clamp_min", "leaky_relu", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "dropout", "mean", "flatten",
    "view", "reshape", "upsample_nearest2d", "upsample_bilinear2d", "contiguous", "clone",
})  # fmt: skip


class Seen(NamedTuple):
    """A value whose channels are looked at, and the dimension that they lie along."""

    node: fx.Node
    dim: int


@dataclass
class Joint:
    """Layers that write the same channels and layers that read them, with nothing between that cares for a factor.

    Attributes:
        read: what the layers behind read.
        bounded: what an operation between them cuts at ``bound``.
    """

    before: list[GraphLayer] = field(default_factory=list)
    after: list[GraphLayer] = field(default_factory=list)
    read: list[Seen] = field(default_factory=list)
    bounded: list[Seen] = field(default_factory=list)
    bound: float = math.inf

    def take(self, other: Joint) -> None:
        self.before += other.before
        self.after += other.after
        self.read += other.read
        self.bounded += other.bounded
        self.bound = min(self.bound, other.bound)


def find_joints(module: fx.GraphModule) -> list[Joint]:
    """In a graph whose batch norms are folded and which has no quantizers yet."""
    layers = {layer.calls[0]: layer for layer in find_layers(module) if not layer.reason and len(layer.calls) == 1}
    of_value: dict[fx.Node, Joint | None] = {}
    for node in module.graph.nodes:
        of_value[node] = _follow(node, layers, of_value)
    joints = {id(joint): joint for joint in of_value.values() if joint is not None}
    return [joint for joint in joints.values() if joint.after and _channels_fit(module, joint)]


def _follow(node: fx.Node, layers: dict[fx.Node, GraphLayer], of_value: dict[fx.Node, Joint | None]) -> Joint | None:
    """The joint that a value belongs to; those whose values meet anything else are given up."""
    sources = node.all_input_nodes
    if node in layers:
        value, layer = sources[0], layers[node]
        if (joint := of_value[value]) is not None:
            joint.after.append(layer)
            joint.read.append(Seen(value, _channel_dim(layer)))
        return Joint([layer])
    limit = _limit(node)
    if is_sum(node) or (limit is not None and len(sources) == 1):
        if (joint := _merged(sources, of_value)) is not None and limit is not None and not math.isinf(limit):
            joint.bound = min(joint.bound, limit)
            joint.bounded.append(Seen(node, _channel_dim(joint.before[0])))
        return joint
    for source in sources:
        _give_up(source, of_value)
    return None


def _merged(sources: list[fx.Node], of_value: dict[fx.Node, Joint | None]) -> Joint | None:
    first = of_value[sources[0]]
    for source in sources[1:]:
        other = of_value[source]
        if first is None or other is None:
            for one in sources:
                _give_up(one, of_value)
            return None
        if other is not first:
            first.take(other)
            of_value.update({node: first for node, joint in of_value.items() if joint is other})
    return first


def _give_up(source: fx.Node, of_value: dict[fx.Node, Joint | None]) -> None:
    if (gone := of_value[source]) is not None:
        of_value.update({node: None for node, joint in of_value.items() if joint is gone})


def _limit(node: fx.Node) -> float | None:
    """Where an operation cuts values that grow; None where a factor does not go through it."""
    name = name_of(node)
    if name == "relu6":
        return 6.0
    if name == "hardtanh" and argument(node, "min_val") == 0:
        return float(argument(node, "max_val"))
    if name == "clamp" and argument(node, "min") == 0:
        most = argument(node, "max")
        return math.inf if most is None else float(most)
    if name == "clamp_min" and argument(node, "min") != 0:
        return None
    if name == "pad" and (argument(node, "mode") == "constant" and argument(node, "value")):
        return None
    return math.inf if name in _LINEAR or name in ("pad", "constant_pad_nd") else None


def _channels_fit(module: nn.Module, joint: Joint) -> bool:
    channels = joint.before[0].tensor(module).shape[0]
    for seen in (*joint.read, *joint.bounded):
        shape = seen.node.meta["val"].shape
        if len(shape) < -seen.dim or shape[seen.dim] != channels:
            return False
    # A linear layer behind a flattened image would have several columns for each channel.
    return all(layer.tensor(module).shape[0] == channels for layer in joint.before) and all(
        layer.tensor(module).shape[1] * layer.groups == channels for layer in joint.after
    )


def _channel_dim(layer: GraphLayer) -> int:
    return {"linear": -1, "conv1d": -2, "conv2d": -3, "conv3d": -4}[layer.kind]
