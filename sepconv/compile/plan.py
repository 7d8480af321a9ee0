"""Everything needed to run a model on inputs of one size: the steps, and memory to run them in.

A plan is made once per size and number of threads. Each of its instances has memory of its own and serves one call at a
time; callers in several Python threads take different instances.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sepconv.compile.constants import Store
from sepconv.compile.layout import Layout, Place, Root, lay_out
from sepconv.compile.lower import Call, lower, lower_direct
from sepconv.compile.tune import alternatives, fastest
from sepconv.kernels import runtime
from sepconv.kernels.layout import array


class Plan:
    """Steps and places for one size of the inputs; ``take`` and ``give_back`` lend memory to run them in.

    ``results`` are the leaves that the model returns, of which tensors serve as examples, and ``spec`` their structure.
    """

    def __init__(self, graph: fx.Graph, store: Store, results: Sequence[Any], spec: Any, tune: bool = False) -> None:
        tensors = [result for result in results if isinstance(result, Tensor)]
        self.layout: Layout = lay_out(graph, tensors)
        self._template = [None if isinstance(result, Tensor) else (result,) for result in results]
        self._spec, self._single = spec, spec.is_leaf() and self._template == [None]
        self._store = store
        # Appending and popping of a deque are atomic: no lock that a fork could leave locked.
        self._free: deque[Instance] = deque()
        self._choices: dict[int, str] = {}
        if tune:
            runtime.follow_torch_threads()
            self._choices = self.take().choose()
        self.give_back(self.take())

    def take(self) -> Instance:
        try:
            return self._free.pop()
        except IndexError:
            return Instance(self.layout, self._store, self._choices)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The network's outputs, in memory of their own."""
        runtime.follow_torch_threads()
        instance = self.take()
        try:
            return instance.run(inputs)
        finally:
            self.give_back(instance)

    def leaves(self, tensors: Sequence[Tensor]) -> list[Any]:
        """The leaves of the model's result, tensors taken from ``tensors``."""
        remaining = iter(tensors)
        return [next(remaining) if other is None else other[0] for other in self._template]

    def restore(self, tensors: Sequence[Tensor]) -> Any:
        """The model's result, in its structure."""
        return tensors[0] if self._single else pytree.tree_unflatten(self.leaves(tensors), self._spec)

    def give_back(self, instance: Instance) -> None:
        self._free.append(instance)


def _copy(target: Tensor, source: Tensor) -> None:
    """Without PyTorch's thread pool, whose workers spin for a while afterwards and take the cores from Halide's."""
    if target.dtype == source.dtype == torch.float32 and target.stride() == source.stride() and source.is_cpu:
        np.copyto(array(target), array(source))
    else:
        target.copy_(source)


class Instance:
    """One arena and the calls that are bound to it."""

    def __init__(self, layout: Layout, store: Store, choices: Mapping[int, str]) -> None:
        """``choices``: steps that are not computed in the usual way, as ``tune`` names them."""
        self._arena = torch.empty(layout.bytes, dtype=torch.uint8)
        self._layout, self._store = layout, store
        self.calls = [self._bind(i, choices.get(i, "")) for i in range(len(layout.steps))]
        direct = layout.direct is not None
        self._head = self.calls[0].run if direct else None
        self._runs = [call.run for call in self.calls[direct:]]
        self._copied = [(i, self._tensor(layout.inputs[i])) for i in layout.copied]
        self._results = [(self._tensor(place), like) for place, like in layout.outputs]

    def _bind(self, i: int, choice: str) -> Call:
        step = self._layout.steps[i]
        outputs = [self._tensor(place) for place in step.outputs]
        if self._is_direct(i):
            return lower_direct(step.target, self._example(), outputs[0], self._store, choice)
        args, kwargs = pytree.tree_map_only(Place, self._tensor, (step.args, step.kwargs))
        return lower(step.target, args, kwargs, outputs, self._store, choice)

    def _is_direct(self, i: int) -> bool:
        return i == 0 and self._layout.direct is not None

    def _example(self) -> Tensor:
        given = self._layout.given[self._layout.direct or 0]
        return torch.empty_strided(given.shape, given.stride(), dtype=given.dtype).normal_()

    def choose(self) -> dict[int, str]:
        """Measure what else could compute each step; the choices that are faster than the usual one."""
        choices = {}
        for i, step in enumerate(self._layout.steps):
            others = alternatives(step.target) if self.calls[i].kernel == "halide" else ()
            if others:
                for place in step.args:
                    self._tensor(place).normal_()
                calls = {"": self.calls[i], **{choice: self._bind(i, choice) for choice in others}}
                choices[i] = fastest(calls, [self._example()] if self._is_direct(i) else [])
        return choices

    def _tensor(self, place: Place) -> Tensor:
        meta, root = place.meta, place.root
        if isinstance(root, Root):
            memory = self._arena[root.offset : root.offset + root.bytes].view(meta.dtype)
        else:
            memory = root.tensor
        return memory.as_strided(meta.shape, meta.stride(), memory.storage_offset() + meta.storage_offset())

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The network's outputs, in memory of their own."""
        for i, place in self._copied:
            _copy(place, inputs[i])
        if self._head is not None:
            self._head(inputs[self._layout.direct])  # type: ignore[index]
        for run in self._runs:
            run()
        outputs = [torch.empty_strided(like.shape, like.stride(), dtype=like.dtype) for _, like in self._results]
        for out, (tensor, _) in zip(outputs, self._results, strict=True):
            _copy(out, tensor)
        return outputs

    def measure(self, inputs: Sequence[Tensor], repeats: int) -> list[float]:
        """Median seconds of each step, run in the network's order."""
        samples: list[list[float]] = []
        for _ in range(repeats):
            self.run(inputs)
            times = []
            for i, call in enumerate(self.calls):
                arguments = [inputs[self._layout.direct or 0]] if self._is_direct(i) else []
                start = time.perf_counter()
                call.run(*arguments)
                times.append(time.perf_counter() - start)
            samples.append(times)
        return [median(times) for times in zip(*samples, strict=True)]
