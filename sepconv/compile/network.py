"""Everything needed to run a model on inputs of one size: the program, its lowering, and memory to run it in.

Made once per size and number of threads. Each of its instances has memory of its own and serves one call at a time;
callers in several Python threads take different instances.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sepconv.compile.ahead import built_ahead
from sepconv.compile.capture import first_line
from sepconv.compile.instance import Instance
from sepconv.compile.layout import lay_out
from sepconv.compile.lower import lower
from sepconv.compile.steps import write_program
from sepconv.compile.store import Store
from sepconv.compile.tune import choose
from sepconv.kernels.halide.jit import threads


class PreparedNetwork:
    """A program for one size of the inputs; ``take`` and ``give_back`` lend memory to run it in.

    ``results`` are the leaves that the model returns, of which tensors serve as examples, and ``spec`` their structure.
    ``note``: why it is not in the numbers that were asked for, "" if it is.
    """

    def __init__(
        self, graph: fx.Graph, store: Store, results: Sequence[Any], spec: pytree.TreeSpec, tune: bool = False
    ) -> None:
        tensors = [result for result in results if isinstance(result, Tensor)]
        self.program = write_program(graph, tensors)
        self.arena = lay_out(self.program)
        self.lowered = lower(self.program, self.arena.slices)
        self._template = [None if isinstance(result, Tensor) else (result,) for result in results]
        self._spec, self._single = spec, spec.is_leaf() and self._template == [None]
        self._store = store
        self.note = ""
        # Appending and popping of a deque are atomic: no lock that a fork could leave locked.
        self._free: deque[Instance] = deque()
        if tune:
            threads.follow_torch()
            try:
                choices = choose(self.program, self.arena.slices, self.take())
            except Exception as error:  # whatever goes wrong here is ours: there are the usual kernels
                warnings.warn(f"compile: the usual kernels run, tuning failed ({first_line(error)})", stacklevel=2)
            else:
                self.lowered = lower(self.program, self.arena.slices, choices)
        with built_ahead(self.program, self.arena, self.lowered, store):
            self.give_back(self.take())

    def take(self) -> Instance:
        try:
            return self._free.pop()
        except IndexError:
            return Instance(self.program, self.arena, self.lowered, self._store)

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
