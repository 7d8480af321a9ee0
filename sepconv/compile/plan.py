"""Everything needed to run a model on inputs of one size: the steps, and memory to run them in.

A plan is made once per size and number of threads. Each of its instances has memory of its own and serves one call at a
time; callers in several Python threads take different instances.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sepconv.compile.capture import first_line
from sepconv.compile.constants import Store
from sepconv.compile.layout import Layout, Place, Root, lay_out
from sepconv.compile.lower import Call, lower, lower_direct
from sepconv.compile.tune import alternatives, fastest
from sepconv.kernels.halide.jit import threads
from sepconv.kernels.halide.jit.machine_code import in_chains
from sepconv.system.timing import seconds


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
            threads.follow_torch()
            try:
                self._choices = self.take().choose()
            except Exception as error:  # whatever goes wrong here is ours: there are the usual kernels
                warnings.warn(f"compile: the usual kernels run, tuning failed ({first_line(error)})", stacklevel=2)
        self.give_back(self.take())

    def take(self) -> Instance:
        try:
            return self._free.pop()
        except IndexError:
            return Instance(self.layout, self._store, self._choices)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The network's outputs, in memory of their own."""
        threads.follow_torch()
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


class Instance:
    """One arena and the calls that are bound to it."""

    def __init__(self, layout: Layout, store: Store, choices: Mapping[int, str]) -> None:
        """``choices``: steps that are not computed in the usual way, as ``tune`` names them."""
        self._arena = torch.empty(layout.bytes, dtype=torch.uint8)
        self._layout, self._store = layout, store
        # By step: one call for each image where the step runs image by image, else one for all of them.
        parts = [range(layout.images) if i < layout.sliced else (None,) for i in range(len(layout.steps))]
        bound = [[self._bind(i, choices.get(i, ""), image) for image in parts[i]] for i in range(len(parts))]
        self.calls = [calls[0] for calls in bound]
        first, rest = bound[: layout.sliced], bound[layout.sliced :]
        in_turn = [(i, calls[image]) for image in range(layout.images) for i, calls in enumerate(first)]
        in_turn += [(i, calls[0]) for i, calls in enumerate(rest, layout.sliced)]
        self._runs = [(i, call.run, self._is_direct(i)) for i, call in in_turn]
        self._chains: list[tuple[Callable[..., None], bool]] = []
        for direct, group in groupby(self._runs, lambda run: run[2]):
            runs = [run for _, run, _ in group]
            self._chains += [(run, direct) for run in (runs if direct else in_chains(runs))]
        self._copied = [(i, self._tensor(layout.inputs[i])) for i in layout.copied]
        self._results = [(self._tensor(place), like) for place, like in layout.outputs]

    def _bind(self, i: int, choice: str, image: int | None = None) -> Call:
        """The call of a step, for one image where the step runs image by image (the first if none is named)."""
        if image is None and i < self._layout.sliced:
            image = 0
        step = self._layout.steps[i]
        outputs = [self._tensor(place, image) for place in step.outputs]
        if self._is_direct(i):
            return self._bind_direct(step.target, outputs[0], choice, image)
        args, kwargs = pytree.tree_map_only(Place, lambda place: self._tensor(place, image), (step.args, step.kwargs))
        return lower(step.target, args, kwargs, outputs, self._store, choice)

    def _bind_direct(self, target: Any, out: Tensor, choice: str, image: int | None) -> Call:
        if image is None:
            return lower_direct(target, self._example(), out, self._store, choice)
        part = slice(image, image + 1)
        call = lower_direct(target, self._example()[part], out, self._store, choice)
        return call._replace(run=lambda given: call.run(given[part]))

    def _is_direct(self, i: int) -> bool:
        return i == 0 and self._layout.direct is not None

    def _example(self) -> Tensor:
        given = self._layout.given[self._layout.direct or 0]
        return torch.empty_strided(given.shape, given.stride(), dtype=given.dtype).normal_()

    def choose(self) -> dict[int, str]:
        """Measure what else could compute each step; the choices that are faster than the usual one."""
        numbers = self._arena[: len(self._arena) // 4 * 4]
        numbers.view(torch.float32).normal_()
        choices = {}
        for i, step in enumerate(self._layout.steps):
            others = alternatives(step.target) if self.calls[i].kernel == "halide" else ()
            if others:
                calls = {"": self.calls[i], **{choice: self._bind(i, choice) for choice in others}}
                choices[i] = fastest(calls, [self._example()] if self._is_direct(i) else [])
        return choices

    def _tensor(self, place: Place, image: int | None = None) -> Tensor:
        """The value that lies there, or one image of it."""
        meta, root = place.meta, place.root
        if not isinstance(root, Root):
            memory = root.tensor
            return memory.as_strided(meta.shape, meta.stride(), memory.storage_offset() + meta.storage_offset())
        memory = self._arena[root.offset : root.offset + root.bytes].view(meta.dtype)
        offset = memory.storage_offset() + meta.storage_offset()
        if image is None and root.images == 1:
            return memory.as_strided(meta.shape, meta.stride(), offset)
        if root.images == 1:
            offset += (image or 0) * meta.stride(0)
        return memory.as_strided((1, *meta.shape[1:]), meta.stride(), offset)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The network's outputs, in memory of their own."""
        for i, place in self._copied:
            place.copy_(inputs[i])
        for run, direct in self._chains:
            if direct:
                run(inputs[self._layout.direct])  # type: ignore[index]
            else:
                run()
        outputs = [torch.empty_strided(like.shape, like.stride(), dtype=like.dtype) for _, like in self._results]
        for out, (tensor, _) in zip(outputs, self._results, strict=True):
            out.copy_(tensor)
        return outputs

    def measure(self, inputs: Sequence[Tensor], repeats: int) -> list[float]:
        """Median seconds of each step, run in the network's order."""
        samples: list[list[float]] = []
        for _ in range(repeats):
            self.run(inputs)
            times = [0.0] * len(self.calls)
            for i, run, direct in self._runs:
                arguments = [inputs[self._layout.direct or 0]] if direct else []
                times[i] += seconds(partial(run, *arguments))
            samples.append(times)
        return [median(times) for times in zip(*samples, strict=True)]
