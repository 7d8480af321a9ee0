"""The graph once through, operation by operation, with all calibration images at once and in two networks.

One is the original, the other computes with integers as far as it has come. So a layer is rounded for the inputs that
the integers before it let through, and its mean error is taken away before the next layer sees it. What a value reaches
is measured where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from sepconv.leaves import Inputs
from sepconv.quantize.fake import quantizer_at
from sepconv.quantize.layers import GraphLayer
from sepconv.quantize.moments import input_moments
from sepconv.quantize.operations import argument, name_of
from sepconv.quantize.ranges import value_range
from sepconv.quantize.rounding import round_weight

LARGEST_VALUE = 192 << 20
"""Bytes of one value of one network; of more images only the first are looked at."""


@dataclass(frozen=True)
class Options:
    """What is done beside rounding; each can be left out to see what it is worth."""

    equalize: bool = True
    bias_correction: bool = True
    ranges: str = "mse"
    rounding: str = "moments"


@dataclass
class LayerErrors:
    """Squared errors of a layer's output, relative to its variance.

    Attributes:
        weight: what rounding its weights adds.
        input: what rounding its input adds.
        output: all that has come together up to here.
    """

    weight: float = 0.0
    input: float = 0.0
    output: float = 0.0

    @property
    def own(self) -> float:
        return self.weight + self.input


class Both(NamedTuple):
    """A value in the network of integers and in the original, batch by batch."""

    given: list[Any]
    wanted: list[Any]


@dataclass
class Sweep:
    """One passage.

    Args:
        module: with quantizers on it; they get their ranges, and weights and biases their numbers.
        layers: those that :func:`sepconv.quantize.placement.place` returned.
    """

    module: fx.GraphModule
    layers: Sequence[GraphLayer]
    options: Options
    on_layer: Callable[[], None] = lambda: None
    errors: dict[str, LayerErrors] = field(default_factory=dict)
    noise: dict[fx.Node, Tensor] = field(default_factory=dict)
    """Mean squared error of the rounding of a value, by its channels."""

    @torch.no_grad()
    def run(self, batches: Sequence[Inputs]) -> None:
        of_call = {call: layer for layer in self.layers if not layer.reason for call in layer.calls}
        weights = {self._weight_quantizer(layer): layer for layer in of_call.values()}
        last_use = _last_uses(self.module.graph)
        env: dict[fx.Node, Both] = {}
        inputs = [[*batch.args, *batch.kwargs.values()] for batch in batches]
        place = 0
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                values = [one[place] for one in inputs]
                env[node] = Both(values, values)
                place += 1
            elif node in of_call:
                env[node] = self._layer(of_call[node], node, env)
            elif node in weights:
                original = env[node.args[0]].wanted[0]
                env[node] = Both([original], [original])  # rounded when its layer is
            elif node.op == "get_attr":
                env[node] = self._constant(node)
            elif node.op == "call_module":
                env[node] = self._quantizer(node, env)
            elif node.op == "call_function":
                env[node] = Both(*(self._compute(node, env, which) for which in (0, 1)))
            for done in last_use.get(node, ()):
                env.pop(done, None)

    def _weight_quantizer(self, layer: GraphLayer) -> fx.Node:
        node = argument(layer.calls[0], "weight")
        assert isinstance(node, fx.Node)
        return node

    def _constant(self, node: fx.Node) -> Both:
        owner, _, last = str(node.target).rpartition(".")
        value = getattr(self.module.get_submodule(owner), last)
        # The numbers of a layer change under way; the original keeps its own.
        return Both([value], [value.clone()])

    def _compute(self, node: fx.Node, env: dict[fx.Node, Both], which: int) -> list[Any]:
        """In one of the networks, batch after batch; what does not depend on images is there once."""
        sources = {one: env[one][which] for one in node.all_input_nodes}
        batches = max((len(found) for found in sources.values()), default=1)
        results = []
        for i in range(batches):
            taken = {one: found[i if len(found) > 1 else 0] for one, found in sources.items()}
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), taken.__getitem__)
            results.append(node.target(*args, **kwargs))  # type: ignore[operator]
        return results

    def _quantizer(self, node: fx.Node, env: dict[fx.Node, Both]) -> Both:
        quantizer = quantizer_at(self.module, node)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        before = env[source]
        if node.target not in {other.target for other in self.noise}:
            quantizer.set_range(*value_range(before.given, self.options.ranges))
        given = [quantizer(x) for x in before.given]
        lost = [(x - y).square() for x, y in zip(before.given, given, strict=True)]
        self.noise[node] = _mean(lost, _channel_dim(node, lost[0].dim()))
        return Both(given, before.wanted)

    def _layer(self, layer: GraphLayer, call: fx.Node, env: dict[fx.Node, Both]) -> Both:
        source = call.args[0]
        assert isinstance(source, fx.Node)
        if layer.name in self.errors:  # called once more
            return Both(*(self._compute(call, env, which) for which in (0, 1)))
        lost = self._round(layer, env[source], env)
        both = Both(*(self._compute(call, env, which) for which in (0, 1)))
        dim = -1 if layer.kind == "linear" else both.given[0].dim() - layer.tensor(self.module).dim() + 1
        if self.options.bias_correction:
            self._move(layer, both, dim, _mean(both.wanted, dim) - _mean(both.given, dim))
        if (bias := layer.bias(self.module)) is not None:
            self._move(layer, both, dim, self._in_units(layer, call) - bias.double())
        self.errors[layer.name] = self._errors(layer, both, dim, lost, self._noise_of(source))
        self.on_layer()
        return both

    def _round(self, layer: GraphLayer, x: Both, env: dict[fx.Node, Both]) -> float:
        """Give the layer its weights; returns the squared error of an output that this makes."""
        weight, node = layer.tensor(self.module), self._weight_quantizer(layer)
        moments = input_moments(layer, self.module, x.given)
        rounded = round_weight(weight, moments, self.options.ranges, self.options.rounding)
        quantizer = quantizer_at(self.module, node)
        quantizer.scale.copy_(rounded.scale)
        if self.options.rounding != "nearest":
            weight.copy_(rounded.weight)
        env[node] = Both([quantizer(weight)], env[node].wanted)
        return rounded.lost

    def _move(self, layer: GraphLayer, both: Both, dim: int, amount: Tensor) -> None:
        """Add to the bias, and to the outputs that are there already."""
        bias = layer.bias(self.module)
        if bias is None:
            return
        amount = amount.to(bias.dtype)
        bias.add_(amount)
        for have in both.given:
            have.add_(_along(amount, dim, have.dim()))

    def _in_units(self, layer: GraphLayer, call: fx.Node) -> Tensor:
        """The bias in whole units of the sums that it is added to: those of an input step times a weight step."""
        bias = layer.bias(self.module)
        assert bias is not None
        node = self._rounded_at(call.args[0])
        if node is None:
            return bias.double()
        unit = quantizer_at(self.module, node).scale * quantizer_at(self.module, self._weight_quantizer(layer)).scale
        return (bias.double() / unit.double()).round() * unit.double()

    def _errors(self, layer: GraphLayer, both: Both, dim: int, lost: float, noise: Tensor) -> LayerErrors:
        means = _mean(both.wanted, dim)
        spread = _mean_square([want - _along(means, dim, want.dim()) for want in both.wanted]) or 1.0
        everything = _mean_square([have - want for have, want in zip(*both, strict=True)])
        return LayerErrors(lost / spread, self._let_through(layer, noise) / spread, everything / spread)

    def _let_through(self, layer: GraphLayer, noise: Tensor) -> float:
        """The squared error of an output that independent errors of the inputs make."""
        weight = layer.tensor(self.module).double()
        by_group = weight.reshape(layer.groups, -1, *weight.shape[1:], 1)
        gain = by_group.square().flatten(3).sum(3)  # (groups, O/groups, C/groups)
        per_input = gain.sum(1).flatten()
        noise = noise if len(noise) == len(per_input) else noise.mean().expand_as(per_input)
        return float((per_input * noise).sum()) / weight.shape[0]

    def _noise_of(self, node: fx.Node) -> Tensor:
        rounded = self._rounded_at(node)
        return torch.zeros(1, dtype=torch.float64) if rounded is None else self.noise[rounded]

    def _rounded_at(self, node: Any) -> fx.Node | None:
        """Where a value became integers, if it did."""
        while node not in self.noise and node.op == "call_function" and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return node if node in self.noise else None


def _channel_dim(node: fx.Node, dims: int) -> int:
    """Of an image the first after the batch; of what linear layers read the last."""
    return dims - 1 if dims == 3 and any(name_of(user) == "linear" for user in node.users) else min(1, dims - 1)


def _mean(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Over everything but the channels."""
    rows = [part.double().movedim(dim, 0).flatten(1) for part in parts]
    total = torch.stack([row.sum(1) for row in rows]).sum(0)
    return total / sum(row.shape[1] for row in rows)


def _along(numbers: Tensor, dim: int, dims: int) -> Tensor:
    return numbers.float().reshape([-1 if i == dim % dims else 1 for i in range(dims)])


def _mean_square(parts: Sequence[Tensor]) -> float:
    return sum(float(part.double().square().sum()) for part in parts) / max(1, sum(part.numel() for part in parts))


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node the values that nothing needs after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            last[source] = node
    found: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        found.setdefault(node, []).append(source)
    return found
