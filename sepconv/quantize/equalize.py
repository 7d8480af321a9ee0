"""Channels brought to like ranges: what one layer multiplies a channel by, the next one divides it by.

All channels of a value share one scale. A channel that stays near zero would get a few of the 256 steps: depthwise
filters and batch norms make such channels, since nothing in training holds them together. Between layers a factor
per channel changes nothing (see ``joints``). In front of a ReLU6 factors are at least 1: a channel then ends at 6
divided by its factor, twice its largest value in the calibration, instead of at 6.

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
from sepconv.quantize.joints import Joint
from sepconv.quantize.layers import GraphLayer

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Powers of the factor that would make all channels equal."""

LARGEST_FACTOR = 4096.0

MARGIN = 2.0
"""Room below what a ReLU6 cuts, for values larger than all that were seen. It costs one bit of eight."""


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
