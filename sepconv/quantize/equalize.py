"""Channels brought to like ranges: what one layer multiplies a channel by, the next one divides it by.

All channels of a value share one scale. A channel that stays near zero would get a few of the 256 steps: depthwise
filters and batch norms make such channels, since nothing in training holds them together. Between layers a factor
per channel goes through what is positively homogeneous (ReLU, pooling), and through sums with shortcuts, where all
layers that add to a sum multiply and all that read one divide. It goes through ReLU6 as well, as long as
factors are at least 1: such a channel then ends at 6 divided by its factor, twice its largest value in the calibration,
instead of at 6. It goes through no SiLU or hardswish.

A depthwise layer has a scale for each channel, so factors cost it nothing and the channels become equal. A layer that
adds channels has one scale for all factors of a sum: how far its inputs are equalised is chosen by the expected error
of both roundings. Reference: Nagel et al. 2019, arXiv:1906.04721 (which equalises weights, for one scale per layer).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from sepconv.leaves import Inputs
from sepconv.quantize.layers import GraphLayer, find_layers
from sepconv.quantize.operations import argument, is_sum, name_of

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Powers of the factor that would make all channels equal."""

LARGEST_FACTOR = 4096.0

MARGIN = 2.0
"""Room below what a ReLU6 cuts, for values larger than all that were seen. It costs one bit of eight."""

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


@dataclass
class Channels:
    """What the calibration says of the channels of a value: (C,) each."""

    largest: Tensor
    sums: Tensor
    count: int

    @property
    def squares(self) -> Tensor:
        return self.sums / self.count

    def with_others(self, other: Channels) -> Channels:
        return Channels(torch.maximum(self.largest, other.largest), self.sums + other.sums, self.count + other.count)


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


@torch.no_grad()
def observe(module: fx.GraphModule, joints: list[Joint], batches: Iterable[Inputs]) -> list[Channels]:
    """What the channels of the joints' values are in these batches."""
    watched = {seen.node: seen.dim for joint in joints for seen in (*joint.read, *joint.bounded)}
    found: dict[fx.Node, Channels] = {}

    class Observer(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if n in watched and isinstance(result, Tensor):
                rows = result.detach().movedim(watched[n], 0).flatten(1)
                now = Channels(rows.abs().amax(1).double(), rows.double().square().sum(1), rows.shape[1])
                found[n] = now if n not in found else found[n].with_others(now)
            return result

    for batch in batches:
        Observer(module).run(*batch.args, *batch.kwargs.values())
    return [_of_joint(joint, found) for joint in joints]


def _of_joint(joint: Joint, found: dict[fx.Node, Channels]) -> Channels:
    """The numbers of what is read; and nothing between is larger than what the factors go by."""
    first, *others = (found[seen.node] for seen in joint.read)
    channels = first
    for other in others:
        channels = channels.with_others(other)
    for seen in joint.bounded:
        largest = torch.maximum(channels.largest, found[seen.node].largest)
        channels = Channels(largest, channels.sums, channels.count)
    return channels


@torch.no_grad()
def equalize(module: fx.GraphModule, joints: list[Joint], channels: list[Channels]) -> list[str]:
    """Multiply and divide, in place. Returns the names of the layers whose outputs changed."""
    changed = []
    for joint, seen in zip(joints, channels, strict=True):
        columns = [_columns(layer, module) for layer in joint.after]
        factor = _factor(joint, seen, columns)
        if (factor - 1).abs().max() < 1e-3:
            continue
        changed += [layer.name for layer in joint.before]
        for layer in joint.before:
            _scale_rows(module, layer, factor)
        for layer in joint.after:
            _scale_columns(module, layer, factor.reciprocal())
    return changed


def _columns(layer: GraphLayer, module: nn.Module) -> Tensor:
    """The weights by input channel: (C, weights that read it)."""
    weight = layer.tensor(module).detach().double()
    grouped = weight.reshape(layer.groups, -1, *weight.shape[1:]).transpose(1, 2)  # (groups, C/groups, O/groups, ...)
    return grouped.flatten(0, 1).flatten(1)


def _factor(joint: Joint, seen: Channels, columns: list[Tensor]) -> Tensor:
    """The factor of each channel: (C,)."""
    top = seen.largest.max() if math.isinf(joint.bound) else seen.largest.new_tensor(joint.bound / MARGIN)
    alive = seen.largest > 0
    most = torch.where(alive, top / seen.largest.clamp_min(1e-30), torch.ones_like(seen.largest))
    most = most.clamp(1.0, LARGEST_FACTOR)
    if all(layer.groups > 1 and layer.groups == len(most) for layer in joint.after):
        return most
    errors = [_expected_error(most**power, seen, columns) for power in STRENGTHS]
    return most ** STRENGTHS[errors.index(min(errors))]


def _expected_error(factor: Tensor, seen: Channels, columns: list[Tensor]) -> float:
    """Squared error of the next layers' outputs, by the rounding of their inputs and of their weights."""
    step = (seen.largest * factor).max() / 255
    total = 0.0
    for column in columns:
        scaled = column / factor[:, None]
        total += float(step.square() / 12 * scaled.square().sum())
        steps = scaled.abs().amax(0) / 127
        total += float((steps.square() / 12).sum() * (seen.squares * factor.square()).sum())
    return total


def _scale_rows(module: nn.Module, layer: GraphLayer, factor: Tensor) -> None:
    weight, bias = layer.tensor(module), layer.bias(module)
    weight.copy_(weight.double() * factor.view(-1, *[1] * (weight.dim() - 1)))
    if bias is not None:
        bias.copy_(bias.double() * factor)


def _scale_columns(module: nn.Module, layer: GraphLayer, factor: Tensor) -> None:
    weight = layer.tensor(module)
    by_group = factor.reshape(layer.groups, 1, -1)  # (groups, 1, C/groups)
    outputs = by_group.expand(-1, weight.shape[0] // layer.groups, -1).flatten(0, 1)
    weight.copy_(weight.double() * outputs.reshape(*outputs.shape, *[1] * (weight.dim() - 2)))
