"""A model's operations on inputs of given sizes, as a graph of functional ATen operations.

The model runs once on fake tensors (sizes without data) while every operation is recorded. In-place changes become
functional ones first. Real tensors that the model reads are constants. Values that
decide in Python what happens next do not exist on fake tensors, so such a model cannot be captured, and says so.

One size costs a quarter of a second. ``torch.export`` with symbolic sizes gives the same operations for all sizes at
once but takes seconds, and its graph holds for other sizes only under guards; recording again needs none. ``make_fx``
takes longer, and patches ``nn.Module`` for all threads while it runs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class CaptureError(RuntimeError):
    """The model cannot be captured; the message is the reason, in one sentence."""


class _Recorder(TorchDispatchMode):
    """Adds every operation that reaches the dispatcher to a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Tensor] = []

    def node(self, value: Any) -> Any:
        """The node of a tensor; everything else stays as it is."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._nodes:
            if isinstance(value, FakeTensor):
                raise CaptureError("it makes tensors in a way that cannot be recorded")
            constant = self.graph.get_attr(f"constant_{len(self._nodes)}")
            constant.meta["constant"] = value
            self._name(value, constant)
        return self._nodes[id(value)]

    def placeholder(self, name: str, tensor: Tensor) -> None:
        self._name(tensor, self.graph.placeholder(name))

    def _name(self, tensor: Tensor, node: fx.Node) -> None:
        # An id is unique among living objects only.
        self._alive.append(tensor)
        self._nodes[id(tensor)] = node
        node.meta["val"] = tensor

    def __torch_dispatch__(self, op: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op._schema.is_mutable:
            raise CaptureError(f"it changes a parameter, a buffer or another tensor that it keeps ({op})")
        result = op(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            return result
        named = pytree.tree_map(self.node, (args, kwargs))
        node = self.graph.call_function(op, *named)
        if isinstance(result, Tensor):
            self._name(result, node)
        else:
            for i, part in enumerate(result):
                if isinstance(part, Tensor):
                    self._name(part, self.graph.call_function(operator.getitem, (node, i)))
        return result


def capture(function: Callable[..., Any], inputs: Sequence[Any]) -> fx.Graph:
    """Record ``function(*inputs)``, which returns a list; the tensors in it are the graph's outputs.

    Placeholders stand for the tensors among ``inputs``, in order; other values are constants. ``node.meta["val"]`` is
    a fake tensor with the value's shape, strides and dtype, ``node.meta["constant"]`` the tensor of a constant.

    Raises:
        CaptureError: what ``function`` does depends on values, or it changes a tensor that it did not make.
    """
    recorder, mode = _Recorder(), FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), torch.autocast("cpu", enabled=False), mode:
        fakes = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in inputs]
        for i, fake in enumerate(fakes):
            if isinstance(fake, Tensor):
                recorder.placeholder(f"input_{i}", fake)
        try:
            with recorder:
                outputs = _functional(function, fakes)
        except CaptureError:
            raise
        except Exception as error:  # any code of the model may fail on tensors without data, in any way
            raise CaptureError(f"it does not run on tensors without data ({first_line(error)})") from error
    recorder.graph.output([recorder.node(value) for value in outputs if isinstance(value, Tensor)])
    return recorder.graph


def first_line(error: BaseException) -> str:
    """An error in one line, with its kind."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0].rstrip(": ")


def _functional(function: Callable[..., Any], inputs: Sequence[Any]) -> list[Any]:
    """``function(*inputs)`` with no operation that changes a tensor in place.

    ``torch.func.functionalize`` would leave changes of tensors that PyTorch makes itself, such as the first state of a
    recurrent layer.
    """
    wrapped = [torch._to_functional_tensor(value) if isinstance(value, Tensor) else value for value in inputs]
    torch._enable_functionalization(reapply_views=True)
    try:
        outputs = function(*wrapped)
    finally:
        torch._disable_functionalization()
    if any(_unwrapped(now) is not before for now, before in zip(wrapped, inputs, strict=True)):
        raise CaptureError("it changes its input in place")
    return [_unwrapped(value) for value in outputs]


def _unwrapped(value: Any) -> Any:
    if not isinstance(value, Tensor) or not torch._is_functional_tensor(value):
        return value
    torch._sync(value)
    return torch._from_functional_tensor(value)
