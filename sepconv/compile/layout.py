"""Where every value of a graph lies: its root in the arena, its strides, and when the memory is free again.

Images are channels_last, whatever layout the model used; nothing else about a value depends on it, except where an
operation reads memory by strides (see ``strides``), which gets the layout that the model saw. Reshapes cost nothing:
they are other strides of the same root.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sepconv.compile.constants import constant
from sepconv.compile.groups import Convolution, Pool, Separable
from sepconv.compile.places import Layout as Layout
from sepconv.compile.places import Place as Place
from sepconv.compile.places import Root as Root
from sepconv.compile.places import Step as Step
from sepconv.compile.places import is_channels_last
from sepconv.compile.slices import slice_batch
from sepconv.compile.strides import as_captured, without_gaps
from sepconv.kernels.layout import alike

_aten = torch.ops.aten
_GROUPS = (Convolution, Separable, Pool)
_VIEWS = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)
# Views of other numbers than lie in the memory: computed instead.
_NOT_IN_PLACE = (_aten.view.dtype, _aten._conj.default, _aten._neg_view.default)
_ALIGNMENT = 64
# Keyword under which a step keeps which results of an operation with several are used.
RESULTS = "_results"


def lay_out(graph: fx.Graph, results: Sequence[Tensor]) -> Layout:
    """Choose places and steps for all nodes of a matched graph; outputs get the strides of ``results``."""
    walk = _Walk()
    for node in graph.nodes:
        walk.visit(node)
    for place, like in zip(walk.outputs, results, strict=True):
        dense = like if _without_gaps(like) else torch.empty(like.shape, device="meta")
        meta = torch.empty_strided(like.shape, dense.stride(), dtype=like.dtype, device="meta")
        walk.layout.outputs.append((place, meta))
    _find_copied(walk.layout)
    slice_batch(walk.layout)
    _assign(walk.layout)
    return walk.layout


class _Walk:
    def __init__(self) -> None:
        self.layout = Layout()
        self.outputs: list[Place] = []
        self._places: dict[fx.Node, Any] = {}

    def visit(self, node: fx.Node) -> None:
        known = constant(node)
        if known is not None:
            tensor = known.tensor
            meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            self._places[node] = Place(meta, known)
        elif node.op == "placeholder":
            place = self._new(node.meta["val"], _dense(node.meta["val"]))
            assert isinstance(place.root, Root)
            place.root.first = -1
            self.layout.inputs.append(place)
            self.layout.given.append(node.meta["val"])
            self._places[node] = place
        elif node.op == "call_function":
            self._call(node)
        elif node.op == "output":
            for source in node.args[0]:  # type: ignore[union-attr]
                place = self._places[source]  # type: ignore[index]
                self._read(place, len(self.layout.steps))
                self.outputs.append(place)

    def _call(self, node: fx.Node) -> None:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: self._places[source])
        if node.target is operator.getitem:
            self._places[node] = args[0][args[1]]
            return
        if isinstance(node.target, _GROUPS):
            self._places[node] = self._group(node, args)
            return
        if node.target in (as_captured, without_gaps):
            source, seen = args[0], node.meta["val"]
            like = seen if node.target is as_captured else _without_gaps_like(source.meta)
            self._places[node] = self._in_layout(source, like)
            return
        view = self._view(node, args, kwargs)
        # A reshape that the strides do not allow copies, as ``contiguous().view()`` of the model did.
        target = _aten.reshape.default if node.target in _VIEWS else node.target
        self._places[node] = self._operation(node, target, args, kwargs) if view is None else view

    def _group(self, node: fx.Node, args: tuple[Place, ...]) -> Place:
        out = _dense(node.meta["val"])
        x, *residual = args
        if isinstance(node.target, Convolution) and node.target.dims == 0:
            x = self._in_layout(x, _rows(x.meta))
        elif not self._reads_input(node.target, x):
            x = self._in_layout(x, _dense(x.meta))
        read = [x, *(self._in_layout(place, out) for place in residual)]
        return self._step(node.target, read, {}, [self._new(node.meta["val"], out)])[0]

    def _reads_input(self, target: Any, x: Place) -> bool:
        """Whether a step is the network's first and takes the input as the caller holds it, in either layout."""
        if self.layout.steps or target.kind != "normal" or target.residual or target.dims != 2:
            return False
        direct = next((i for i, place in enumerate(self.layout.inputs) if place is x), None)
        self.layout.direct = direct
        return direct is not None

    def _view(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Another look at the same memory, or several, if the operation is one and the strides allow it."""
        target: Any = node.target
        if target in _VIEWS:
            target = _aten.view.default
        elif not _is_view(target):
            return None
        source: Place = args[0]
        if target is _aten.as_strided.default:
            args = _relative(source, node.args[0].meta["val"], args)  # type: ignore[union-attr]
        try:
            looks = target(source.meta, *args[1:], **kwargs)
        except (RuntimeError, ValueError):
            return None
        return pytree.tree_map_only(Tensor, lambda meta: Place(meta, source.root), looks)

    def _operation(self, node: fx.Node, target: Any, args: Any, kwargs: Any) -> Any:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            out = self._new(value, _strides_for(value, _places_in((args, kwargs))))
            return self._step(target, args, kwargs, [out])[0]
        # Several results: the nodes that take them know their sizes; the others are of no use to anyone.
        taken = {user.args[1]: user.meta["val"] for user in node.users}
        outs = {i: self._new(value, value) for i, value in taken.items()}
        step = self._step(target, args, kwargs, list(outs.values()))
        self.layout.steps[-1].kwargs = {**kwargs, RESULTS: tuple(outs)}
        return dict(zip(outs, step, strict=True))

    def _new(self, value: Tensor, strides_like: Tensor) -> Place:
        meta = torch.empty_strided(value.shape, strides_like.stride(), dtype=value.dtype, device="meta")
        span = 1 + sum((size - 1) * step for size, step in zip(meta.shape, meta.stride(), strict=True))
        index = len(self.layout.steps)
        root = Root(span * meta.element_size() if meta.numel() else 0, index, index)
        self.layout.roots.append(root)
        return Place(meta, root)

    def _step(self, target: Any, args: Any, kwargs: Any, outputs: list[Place]) -> list[Place]:
        index = len(self.layout.steps)
        for place in _places_in((args, kwargs)):
            self._read(place, index)
        for place in outputs:
            assert isinstance(place.root, Root)
            place.root.first = place.root.last = index
        self.layout.steps.append(Step(target, args, kwargs, outputs))
        return outputs

    @staticmethod
    def _read(place: Place, index: int) -> None:
        if isinstance(place.root, Root):
            place.root.last = max(place.root.last, index)

    def _in_layout(self, place: Place, like: Tensor) -> Place:
        """The value with the strides of ``like``, copied only where it has others.

        Steps along a size of 1 become those of ``like``: they say nothing, but kernels compare them.
        """
        if alike(place.meta, like):
            meta = place.meta.as_strided(like.shape, like.stride(), place.meta.storage_offset())
            return Place(meta, place.root)
        return self._step(None, [place], {}, [self._new(place.meta, like)])[0]


def _dense(x: Tensor) -> Tensor:
    """A meta tensor of that size in the layout that the kernels read."""
    memory_format = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return torch.empty(x.shape, dtype=x.dtype, device="meta", memory_format=memory_format)


def _without_gaps_like(x: Tensor) -> Tensor:
    """A meta tensor of that size: contiguous where ``x`` can be read so, else as the kernels read images."""
    return torch.empty(x.shape, dtype=x.dtype, device="meta") if x.is_contiguous() else _dense(x)


def _rows(x: Tensor) -> Tensor:
    """Rows of a matrix may lie apart, the numbers of a row may not."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else _dense(x)


def _is_view(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    if schema is None or len(schema.returns) != 1 or not schema.arguments or target in _NOT_IN_PLACE:
        return False
    shared, source = schema.returns[0].alias_info, schema.arguments[0].alias_info
    return shared is not None and source is not None and not shared.is_write


def _relative(source: Place, seen: Tensor, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of ``as_strided``, which counts from the beginning of the memory, for where ``source`` lies."""
    span = 1 + sum((size - 1) * step for size, step in zip(seen.shape, seen.stride(), strict=True))
    if seen.storage_offset() or seen.untyped_storage().nbytes() != span * seen.element_size():
        raise ValueError("as_strided reads the memory around a view")
    _, size, stride, *offset = args
    return source, size, stride, source.meta.storage_offset() + (offset[0] or 0 if offset else 0)


def _places_in(value: Any) -> list[Place]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Place)]


def _strides_for(value: Tensor, sources: Sequence[Place]) -> Tensor:
    """The layout of an operation's result: that of an input of the same size, else channels_last if an input is."""
    for place in sources:
        meta = place.meta
        if meta.shape == value.shape and _without_gaps(meta):
            return meta
    if value.dim() == 4 and any(is_channels_last(place.meta) for place in sources):
        return _dense(value)
    return torch.empty(value.shape, device="meta")


def _without_gaps(x: Tensor) -> bool:
    """Whether every number has a place of its own and no place is left over."""
    expected = 1
    for step, size in sorted((step, size) for size, step in zip(x.shape, x.stride(), strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return x.numel() > 0


def _find_copied(layout: Layout) -> None:
    """Inputs that any step but the direct one reads; the others need no memory."""
    steps = layout.steps if layout.direct is None else layout.steps[1:]
    read = {id(place.root) for step in steps for place in _places_in((step.args, step.kwargs))}
    read |= {id(place.root) for place, _ in layout.outputs}
    for i, place in enumerate(layout.inputs):
        if id(place.root) in read:
            layout.copied.append(i)
        elif isinstance(place.root, Root):
            place.root.bytes = 0


def _assign(layout: Layout) -> None:
    """Offsets in one arena: large roots first, each at the lowest place that is free while it lives."""
    placed: list[Root] = []
    for root in sorted(layout.roots, key=lambda root: -root.bytes):
        rivals = sorted(
            (other for other in placed if other.first <= root.last and root.first <= other.last),
            key=lambda other: other.offset,
        )
        offset = 0
        for other in rivals:
            if offset + root.bytes <= other.offset:
                break
            offset = max(offset, -(-(other.offset + other.bytes) // _ALIGNMENT) * _ALIGNMENT)
        root.offset = offset
        placed.append(root)
        layout.bytes = max(layout.bytes, offset + root.bytes)
