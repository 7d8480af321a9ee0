"""``torch.compile(model, backend="sepconv")``: the same for the graphs that TorchDynamo finds.

Around what cannot be captured, such as a decision on values, TorchDynamo splits the model, so parts of it still run
fast. Found through the entry point ``torch_dynamo_backends``; nothing of TorchDynamo is imported here.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sepconv.compile.explain import NetworkExplanation
from sepconv.compile.model import CompiledModel
from sepconv.compile.precision import FLOAT32, checked_precision

_graphs: weakref.WeakSet[Graph] = weakref.WeakSet()


def backend(
    module: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile one graph for inference; where gradients are needed PyTorch runs it, and a warning says so.

    Args:
        options: "precision", as for :func:`compile`.

    Raises:
        TypeError, ValueError: an option is unknown, or its value is.
    """
    precision = _precision(options or {})
    needs_grad = any(isinstance(value, Tensor) and value.requires_grad for value in example_inputs)
    if torch.is_grad_enabled() and needs_grad:
        warnings.warn("sepconv: a graph needs gradients and runs through PyTorch; use torch.no_grad()", stacklevel=2)
        return module.forward
    graph = Graph(module, example_inputs, precision)
    _graphs.add(graph)
    return graph


def _precision(options: Mapping[str, Any]) -> str:
    unknown = sorted(set(options) - {"precision"})
    if unknown:
        raise ValueError(f'sepconv: the only option is "precision", got {unknown}')
    return checked_precision(options.get("precision"), "sepconv")


def explain_graphs(*, measure: bool = False) -> list[NetworkExplanation]:
    """How the graphs compiled so far are computed, as ``CompiledModel.explain`` says it."""
    return [graph.compiled.explain(measure=measure) for graph in _graphs if graph.compiled is not None]


class _Frozen(nn.Module):
    """A graph with its weights in their places; called with what is left."""

    def __init__(self, module: fx.GraphModule, weights: dict[int, Tensor], names: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self._places = list(weights)
        for i, tensor in weights.items():
            self.register_buffer(names[i], tensor.detach().contiguous())
        self._names = [names[i] for i in weights]

    def forward(self, *others: Any) -> Any:
        values = list(others)
        for i, name in zip(self._places, self._names, strict=True):
            values.insert(i, getattr(self, name))
        return self.module(*values)


class Graph:
    """A graph of TorchDynamo, compiled at its first call and again when a weight has changed since.

    Changes are seen by the tensors' version counters, as far as PyTorch keeps them: not those through ``weight.data``
    or by fused optimizers, nor of tensors made under ``torch.inference_mode``.
    """

    def __init__(self, module: fx.GraphModule, example_inputs: Sequence[Any], precision: str = FLOAT32) -> None:
        nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
        self._module, self._names, self._precision = module, [node.name for node in nodes], precision
        static = ["_dynamo_static_input_type" in node.meta.get("tensor_dict", ()) for node in nodes]
        self._static = [i for i, fixed in enumerate(static) if fixed]
        self._free = [i for i, fixed in enumerate(static) if not fixed]
        self._state: list[tuple[int, int]] = []
        # Kept together with their memory, so that no other weight comes to lie there.
        self._seen: list[tuple[Tensor, Tensor]] = []
        self.compiled: CompiledModel | None = None

    def __call__(self, *inputs: Any) -> Any:
        weights = [inputs[i] for i in self._static]
        state = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]
        others = [inputs[i] for i in self._free]
        same = state == self._state and all(
            [now is before for now, (before, _) in zip(weights, self._seen, strict=True)]
        )
        if self.compiled is None or not same:
            self._seen = [(weight, weight.detach()) for weight in weights]
            frozen = _Frozen(self._module, dict(zip(self._static, weights, strict=True)), self._names)
            self.compiled = CompiledModel(
                frozen, precision=self._precision, same_channels=False, what="sepconv: a graph"
            )
            self._state = state
            self.compiled.prepare(*others)
        return self.compiled(*others)
