"""From a rewritten graph to a program: its operations in order, and the strides of every value.

Images are channels_last, whatever layout the model used; nothing else about a value depends on it, except where an
operation reads memory by strides (see ``passes.strides``), which gets the layout that the model saw. Reshapes cost
nothing: they are other strides of the same memory.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from sepconv.compile.groups import ComputedGroup, Convolution, Elementwise, RowNorm, writes_channels
from sepconv.compile.joins import Home, homes, parts_of
from sepconv.compile.numbers import NumberType
from sepconv.compile.passes.constants import constant
from sepconv.compile.passes.nodes import as_node, is_call, refused, shape, source, value
from sepconv.compile.passes.strides import as_captured, without_gaps
from sepconv.compile.program import (
    NO_KERNEL,
    Copy,
    Input,
    Operation,
    Output,
    Place,
    Program,
    ProgramStep,
    TensorForm,
    Work,
)
from sepconv.compile.store import Constant
from sepconv.kernels.case import Outline
from sepconv.kernels.halide.conv.elementwise import unreadable
from sepconv.kernels.halide.conv.stem import MAX_CHANNELS
from sepconv.kernels.layout import alike, pixel_step

_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)
# Views of other numbers than lie in the memory: computed instead.
_NOT_IN_PLACE = (_aten.view.dtype, _aten._conj.default, _aten._neg_view.default)


def write_program(graph: fx.Graph, results: Sequence[Tensor]) -> Program:
    """Put a rewritten graph in order; outputs get the strides of ``results``."""
    walk = _Walk(homes(graph))
    for node in graph.nodes:
        walk.visit(node)
    outputs = [
        Output(look.place, _form(torch.empty(like.shape, device="meta") if not _without_gaps(like) else like, like))
        for look, like in zip(walk.outputs, results, strict=True)
    ]
    return Program(
        tuple(walk.steps), tuple(look.place for look in walk.inputs), tuple(walk.given), tuple(outputs),
        tuple(walk.memories), walk.direct,
    )  # fmt: skip


def is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, eq=False)
class _Look:
    """A value: a tensor on the meta device that has its size and strides, and the memory or the constant it lies in."""

    meta: Tensor
    memory: int | Constant

    @property
    def place(self) -> Place:
        return Place(_form(self.meta, self.meta), self.memory, int(self.meta.storage_offset()))


_Several = Mapping[int, _Look] | Sequence[_Look]


class _Walk:
    def __init__(self, homes: Mapping[fx.Node, Home]) -> None:
        self.steps: list[ProgramStep] = []
        self.inputs: list[_Look] = []
        self.given: list[TensorForm] = []
        self.outputs: list[_Look] = []
        self.memories: list[int] = []
        self.direct: int | None = None
        # By node; an operation with several results has one for each of them.
        self._looks: dict[fx.Node, _Look | _Several] = {}
        self._homes = homes
        # By concatenation: the memory of its result.
        self._joined: dict[fx.Node, _Look] = {}

    def visit(self, node: fx.Node) -> None:
        self._visit(node)
        home = self._home(node)
        if home is not None:
            self._looks[node] = self._put(self._look(node), home)

    def _visit(self, node: fx.Node) -> None:
        known = constant(node)
        if known is not None:
            self._looks[node] = _Look(_meta(known.tensor, known.tensor), known)
        elif node.op == "placeholder":
            look = self._new(value(node), _dense(value(node)))
            self.inputs.append(look)
            self.given.append(_form(value(node), value(node)))
            self._looks[node] = look
        elif node.op == "call_function":
            self._looks[node] = self._call(node)
        elif node.op == "output":
            returned = node.args[0]
            if not isinstance(returned, (list, tuple)):
                raise TypeError(f"no list of outputs but {returned!r}")
            self.outputs = [self._look(source) for source in returned]

    def _look(self, argument: object) -> _Look:
        found = self._looks[as_node(argument)]
        if not isinstance(found, _Look):
            raise TypeError(f"{argument} is not one value but several")
        return found

    def _call(self, node: fx.Node) -> _Look | _Several:
        """The look at the result, or several by number."""
        if node.target is operator.getitem:
            return self._part(node)
        if isinstance(node.target, RowNorm):
            return self._row_norm(node.target, value(node), self._look(node.args[0]))
        if isinstance(node.target, ComputedGroup):
            home = self._home(node) if writes_channels(node.target) else None
            read = [self._look(argument) for argument in node.args]
            if isinstance(node.target, Elementwise):
                return self._elementwise(node.target, value(node), read, home)
            out = self._new(value(node), _dense(value(node))) if home is None else home
            return self._group(node.target, out, read)
        if node in self._homes and is_call(node, _aten.cat.default):
            return self._join(node)
        if node.target in (_aten.pixel_shuffle.default, _aten.pixel_unshuffle.default) and value(node).dim() == 4:
            return self._shuffled(node, self._look(node.args[0]), value(node))
        if node.target in (as_captured, without_gaps):
            look = self._look(node.args[0])
            return self._in_layout(look, value(node) if node.target is as_captured else _without_gaps_like(look.meta))
        if not isinstance(node.target, OpOverload):
            raise TypeError(f"{node} calls no operation but {node.target}")
        looks: Callable[[fx.Node], Any] = self._looks.__getitem__
        arguments: Any = fx.node.map_arg((node.args, node.kwargs), looks)
        view = self._view(node, *arguments)
        # A reshape that the strides do not allow copies, as ``contiguous().view()`` of the model did.
        target = _aten.reshape.default if node.target in _VIEWS else node.target
        return self._operation(node, Operation(target, *arguments)) if view is None else view

    def _part(self, node: fx.Node) -> _Look:
        several = self._looks[source(node)]
        if isinstance(several, _Look):
            raise TypeError(f"{node} takes a part of one value")
        return several[_number(node)]

    def _group(self, group: ComputedGroup, out: _Look, args: Sequence[_Look]) -> _Look:
        x, *residual = args
        if isinstance(group, Convolution) and group.dims == 0:
            x = self._in_layout(x, _rows(x.meta))
        elif not self._reads_input(group, x):
            x = self._in_layout(x, _readable(group, x.meta))
        read = [x, *(self._in_layout(look, _readable(group, look.meta)) for look in residual)]
        return self._step(group, read, [out])[0]

    def _home(self, node: fx.Node) -> _Look | None:
        """The place in a concatenation that a value is computed into."""
        home = self._homes.get(node)
        if home is None or home.join is node:
            return None
        whole = self._whole(home.join)
        channels = slice(home.channel, home.channel + shape(node)[1])
        return _Look(whole.meta[:, channels], whole.memory)

    def _whole(self, join: fx.Node) -> _Look:
        """The memory of a concatenation's result, new where it is the first that is heard of it."""
        if join not in self._joined:
            self._joined[join] = self._new(value(join), _dense(value(join)))
        return self._joined[join]

    def _join(self, node: fx.Node) -> _Look:
        """What is not there yet is copied."""
        home = self._home(node) or self._whole(node)
        for part in parts_of(node):
            look = self._look(part.node)
            self._put(look, _Look(home.meta[:, part.channel : part.channel + look.meta.shape[1]], home.memory))
        return home

    def _put(self, look: _Look, home: _Look) -> _Look:
        """The value at its place, copied if it lies elsewhere."""
        there = look.memory == home.memory and look.meta.storage_offset() == home.meta.storage_offset()
        return home if there and alike(look.meta, home.meta) else self._step(Copy(), [look], [home])[0]

    def _elementwise(self, group: Elementwise, result: Tensor, args: Sequence[_Look], home: _Look | None) -> _Look:
        """What the kernel cannot read in rows is copied to the layout of the result."""
        written = home or self._new(result, _strides_for(result, args))
        out = Outline.of(written.meta)
        read = [
            self._in_layout(look, _broadcastable(look.meta, written.meta))
            if unreadable([Outline.of(look.meta)], out)
            else look
            for look in args
        ]
        return self._step(group, read, [written])[0]

    def _shuffled(self, node: fx.Node, look: _Look, result: Tensor) -> _Look:
        """Pixels made of channels or the other way round: the same numbers in other places, which is one copy."""
        new, factor = self._new(result, _dense(result)), _number(node)
        to_pixels = node.target is _aten.pixel_shuffle.default
        of_pixels, of_channels = (new, look) if to_pixels else (look, new)
        n, c, h, w = of_pixels.meta.stride()
        image, deep, row, column = of_channels.meta.stride()
        size = [*of_pixels.meta.shape[:2], of_channels.meta.shape[2], factor, of_channels.meta.shape[3], factor]
        apart = (
            _Look(of_pixels.meta.as_strided(size, [n, c, h * factor, h, w * factor, w]), of_pixels.memory),
            _Look(
                of_channels.meta.as_strided(size, [image, deep * factor**2, row, deep * factor, column, deep]),
                of_channels.memory,
            ),
        )
        written, read = apart if to_pixels else apart[::-1]
        self._step(Copy(), [read], [written])
        return new

    def _row_norm(self, group: RowNorm, result: Tensor, x: _Look) -> _Look:
        out = torch.empty(result.shape, dtype=result.dtype, device="meta")
        side_by_side = x.meta.stride(-1) == 1 or x.meta.shape[-1] == 1
        return self._step(group, [x if side_by_side else self._in_layout(x, out)], [self._new(result, out)])[0]

    def _reads_input(self, group: ComputedGroup, x: _Look) -> bool:
        """Whether a step is the network's first and takes the input as the caller holds it: a kernel for few channels
        in either layout, others channels_last."""
        if self.steps or not isinstance(group, Convolution) or group.kind not in ("normal", "grouped"):
            return False
        if group.epilogue.residual or group.dims != 2:
            return False
        found = next((i for i, look in enumerate(self.inputs) if look is x), None)
        few = group.in_channels <= MAX_CHANNELS and group.groups == 1 and set(group.geometry.dilation) == {1}
        if found is not None and (few or is_channels_last(self.given[found].meta)):
            self.direct = found
        return self.direct is not None

    def _view(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Look | _Several | None:
        """Another look at the same memory, or several, if the operation is one and the strides allow it."""
        target = _aten.view.default if node.target in _VIEWS else node.target
        if not isinstance(target, OpOverload) or not _is_view(target):
            return None
        whole = self._look(node.args[0])
        if target is _aten.as_strided.default:
            args = _relative(whole, value(source(node)), args)
        try:
            metas = target(whole.meta, *args[1:], **kwargs)
        except (RuntimeError, ValueError):
            return None
        looks: _Look | _Several = pytree.tree_map_only(Tensor, lambda meta: _Look(meta, whole.memory), metas)
        return looks

    def _operation(self, node: fx.Node, operation: Operation) -> _Look | _Several:
        read = _looks_in((operation.args, operation.kwargs))
        results = node.meta.get("val")
        several = not isinstance(results, Tensor)
        # The nodes that take several results know their sizes; the others are of no use to anyone.
        taken = {_number(user): value(user) for user in node.users} if several else {0: value(node)}
        home = self._home(node) if torch.Tag.pointwise in operation.target.tags else None
        outs = {i: home or self._new(part, part if several else _strides_for(part, read)) for i, part in taken.items()}
        numbers = iter(range(len(read)))
        args, kwargs = pytree.tree_map_only(
            _Look, lambda look: Input(next(numbers)), (operation.args, operation.kwargs)
        )
        work = Operation(operation.target, args, kwargs, tuple(outs) if several else None, refused(node) or NO_KERNEL)
        self._step(work, read, list(outs.values()))
        return outs if several else outs[0]

    def _new(self, like: Tensor, strides_like: Tensor) -> _Look:
        look = _Look(_meta(like, strides_like), len(self.memories))
        form = look.place.form
        self.memories.append(form.span * form.number.storage.itemsize)
        return look

    def _step(self, work: Work, read: Sequence[_Look], outputs: list[_Look]) -> list[_Look]:
        inputs, written = (tuple(look.place for look in looks) for looks in (read, outputs))
        self.steps.append(ProgramStep(work, inputs, written))
        return outputs

    def _in_layout(self, look: _Look, like: Tensor) -> _Look:
        """The value with the strides of ``like``, copied only where it has others.

        Steps along a size of 1 become those of ``like``: they say nothing, but kernels compare them.
        """
        if alike(look.meta, like):
            meta = look.meta.as_strided(like.shape, like.stride(), look.meta.storage_offset())
            return _Look(meta, look.memory)
        return self._step(Copy(), [look], [self._new(look.meta, like)])[0]


def _number(taker: fx.Node) -> int:
    """Which of several results a node takes."""
    number = taker.args[1]
    if not isinstance(number, int):
        raise TypeError(f"{taker} takes no part of a result")
    return number


def _form(strides_like: Tensor, like: Tensor) -> TensorForm:
    return TensorForm(tuple(like.shape), tuple(strides_like.stride()), NumberType(like.dtype))


def _meta(like: Tensor, strides_like: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, strides_like.stride(), dtype=like.dtype, device="meta")


def _dense(x: Tensor) -> Tensor:
    """A meta tensor of that size in the layout that the kernels read."""
    memory_format = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return torch.empty(x.shape, dtype=x.dtype, device="meta", memory_format=memory_format)


def _without_gaps_like(x: Tensor) -> Tensor:
    """A meta tensor of that size: contiguous where ``x`` can be read so, else as the kernels read images."""
    return torch.empty(x.shape, dtype=x.dtype, device="meta") if x.is_contiguous() else _dense(x)


def _by_pixels(x: Tensor) -> bool:
    """channels_last, or channels of such an image."""
    return is_channels_last(x) or (x.dim() == 4 and not x.is_contiguous() and pixel_step(x.shape, x.stride()) > 0)


def _readable(group: ComputedGroup, x: Tensor) -> Tensor:
    """A meta tensor with the strides of ``x`` where a group reads them, else in the layout that the kernels read."""
    return x if writes_channels(group) and _by_pixels(x) else _dense(x)


def _broadcastable(x: Tensor, out: Tensor) -> Tensor:
    """A meta tensor of that size whose numbers lie in the order of ``out``."""
    missing = out.dim() - x.dim()
    order = sorted(range(x.dim()), key=lambda d: (-out.stride(missing + d), d))
    laid = torch.empty([x.shape[d] for d in order], dtype=x.dtype, device="meta")
    return laid.permute([order.index(d) for d in range(x.dim())])


def _rows(x: Tensor) -> Tensor:
    """Rows of a matrix may lie apart, the numbers of a row may not."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else _dense(x)


def _is_view(target: OpOverload) -> bool:
    schema = target._schema
    if len(schema.returns) != 1 or not schema.arguments or target in _NOT_IN_PLACE:
        return False
    shared, source = schema.returns[0].alias_info, schema.arguments[0].alias_info
    return shared is not None and source is not None and not shared.is_write


def _relative(source: _Look, seen: Tensor, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of ``as_strided``, which counts from the beginning of the memory, for where ``source`` lies."""
    span = 1 + sum((size - 1) * step for size, step in zip(seen.shape, seen.stride(), strict=True))
    if seen.storage_offset() or seen.untyped_storage().nbytes() != span * seen.element_size():
        raise ValueError("as_strided reads the memory around a view")
    _, size, stride, *offset = args
    return source, size, stride, source.meta.storage_offset() + (offset[0] or 0 if offset else 0)


def _looks_in(arguments: Any) -> list[_Look]:
    return [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, _Look)]


def _strides_for(result: Tensor, sources: Sequence[_Look]) -> Tensor:
    """The layout of an operation's result: that of an input of the same size, else channels_last if an input is."""
    for look in sources:
        if look.meta.shape == result.shape and _without_gaps(look.meta):
            return look.meta
    if result.dim() == 4 and any(_by_pixels(look.meta) for look in sources):
        return _dense(result)
    return torch.empty(result.shape, device="meta")


def _without_gaps(x: Tensor) -> bool:
    """Whether every number has a place of its own and no place is left over."""
    expected = 1
    for step, size in sorted((step, size) for size, step in zip(x.shape, x.stride(), strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return x.numel() > 0
