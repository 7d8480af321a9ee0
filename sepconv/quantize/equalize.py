"""Channels brought to like ranges: what one layer multiplies a channel by, the next one divides it by.

All channels of a value share one scale. A channel that stays near zero would get a few of the 256 steps: depthwise
filters and batch norms make such channels, since nothing in training holds them together. Between two layers a factor
per channel goes through what is positively homogeneous (ReLU, pooling). It goes through ReLU6 as well, as long as
factors are at least 1: such a channel then ends at 6 divided by its factor, twice its largest value in the calibration,
instead of at 6.

A depthwise layer has a scale for each channel, so factors cost it nothing and the channels become equal. A layer that
adds channels has one scale for all factors of a sum: how far its inputs are equalised is chosen by the expected error
of both roundings. Reference: Nagel et al. 2019, arXiv:1906.04721 (which equalises weights, for one scale per layer).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from sepconv.leaves import Inputs
from sepconv.quantize.layers import GraphLayer, find_layers
from sepconv.quantize.operations import argument, name_of

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Powers of the factor that would make all channels equal."""

LARGEST_FACTOR = 4096.0

MARGIN = 2.0
"""Room above the largest value seen: of other images some are larger, and would be cut. It costs one bit of eight."""

_LINEAR = frozenset({
    "relu", "clamp_min", "leaky_relu", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "dropout", "mean", "flatten",
    "view", "reshape", "upsample_nearest2d", "upsample_bilinear2d", "contiguous", "clone",
})  # fmt: skip


@dataclass
class Joint:
    """A layer, the layers that read it and nothing else does, and the largest value that may stand between them."""

    before: GraphLayer
    after: list[GraphLayer]
    value: fx.Node
    bound: float = math.inf


@dataclass
class Channels:
    """What the calibration says of the channels of a value: (C,) each."""

    largest: Tensor
    squares: Tensor


def find_joints(module: fx.GraphModule) -> list[Joint]:
    """In a graph whose batch norms are folded and which has no quantizers yet."""
    layers = {layer.calls[0]: layer for layer in find_layers(module) if not layer.reason and len(layer.calls) == 1}
    found = [_joint(layer, layers) for layer in layers.values()]
    return [joint for joint in found if joint is not None and _channels_fit(module, joint)]


def _joint(layer: GraphLayer, layers: dict[fx.Node, GraphLayer]) -> Joint | None:
    node, bound = layer.calls[0], math.inf
    while len(node.users) == 1:
        [user] = node.users
        if user in layers or user.op == "output":
            break
        limit = _limit(user)
        if limit is None or user.args[0] is not node:
            return None
        node, bound = user, min(bound, limit)
    after = [layers[user] for user in node.users if user in layers and user.args[0] is node]
    return Joint(layer, after, node, bound) if after and len(after) == len(node.users) else None


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
    channels = joint.before.tensor(module).shape[0]
    shape = joint.value.meta["val"].shape
    for layer in joint.after:
        dim = _channel_dim(layer)
        if len(shape) < -dim or shape[dim] != channels or layer.tensor(module).shape[1] * layer.groups != channels:
            return False
    # A linear layer behind a flattened image would have several columns for each channel.
    return len({_channel_dim(layer) for layer in joint.after}) == 1


def _channel_dim(layer: GraphLayer) -> int:
    return {"linear": -1, "conv1d": -2, "conv2d": -3, "conv3d": -4}[layer.kind]


@torch.no_grad()
def observe(module: fx.GraphModule, joints: list[Joint], batches: Iterable[Inputs]) -> list[Channels]:
    """What the channels of the joints' values are in these batches."""
    watched = {joint.value: i for i, joint in enumerate(joints)}
    sums: list[tuple[Tensor, Tensor, int] | None] = [None] * len(joints)

    class Observer(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if n in watched and isinstance(result, Tensor):
                place = watched[n]
                rows = result.detach().movedim(_channel_dim(joints[place].after[0]), 0).flatten(1)
                largest, squares, count = rows.abs().amax(1), rows.double().square().sum(1), rows.shape[1]
                if (before := sums[place]) is not None:
                    largest, squares = torch.maximum(largest, before[0]), squares + before[1]
                    count += before[2]
                sums[place] = largest, squares, count
            return result

    for batch in batches:
        Observer(module).run(*batch.args, *batch.kwargs.values())
    return [Channels(found[0].double(), found[1] / found[2]) for found in sums if found is not None]


@torch.no_grad()
def equalize(module: fx.GraphModule, joints: list[Joint], channels: list[Channels]) -> list[str]:
    """Multiply and divide, in place. Returns the names of the layers whose outputs changed."""
    changed = []
    for joint, seen in zip(joints, channels, strict=True):
        columns = [_columns(layer, module) for layer in joint.after]
        factor = _factor(joint, seen, columns)
        if (factor - 1).abs().max() < 1e-3:
            continue
        changed.append(joint.before.name)
        _scale_rows(module, joint.before, factor)
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
    top = seen.largest.max() if math.isinf(joint.bound) else seen.largest.new_tensor(joint.bound)
    alive = seen.largest > 0
    most = torch.where(alive, top / (MARGIN * seen.largest.clamp_min(1e-30)), torch.ones_like(seen.largest))
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
