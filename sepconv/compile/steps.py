"""From a rewritten graph to a program: its operations in order, the strides and the numbers of every value.

Images are channels_last, whatever layout the model used; nothing else about a value depends on it, except where an
operation reads memory by strides (see ``passes.strides``), which gets the layout that the model saw. Reshapes cost
nothing: they are other strides of the same memory. Numbers are those that a pass named, where there is a kernel for
them (see ``storage``); what PyTorch computes is in float32.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from sepconv.compile.groups import (
    ComputedGroup,
    Convolution,
    Elementwise,
    SeparableGroup,
    conversion,
    keeps_numbers,
    writes_channels,
)
from sepconv.compile.joins import Home, dim_of, homes, parts_of
from sepconv.compile.looks import (
    Several,
    ValueLook,
    broadcastable,
    dense,
    form_of,
    has_no_gaps,
    is_channels_last,
    likes_of,
    looks_in,
    meta_of,
    result_strides,
    strides_for,
    without_gaps_like,
)
from sepconv.compile.moves import layout_of, put_together, reshaped
from sepconv.compile.numbers import BFLOAT16, FLOAT32, NumberType
from sepconv.compile.passes.constants import constant
from sepconv.compile.passes.nodes import as_node, is_call, number_of, refused, shape, source, store_as, stored_as, value
from sepconv.compile.passes.strides import as_captured, without_gaps
from sepconv.compile.program import NO_KERNEL, Input, Operation, Output, Program, TensorForm
from sepconv.compile.storage import storage_for
from sepconv.compile.writer import Writer
from sepconv.kernels.halide.conv.stem import MAX_CHANNELS

_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)
_MOST_TRIES = 8
# Views of other numbers than lie in the memory: computed instead.
_NOT_IN_PLACE = (_aten.view.dtype, _aten._conj.default, _aten._neg_view.default)


def write_program(graph: fx.Graph, results: Sequence[Tensor]) -> Program:
    """Put a rewritten graph in order; outputs get the strides of ``results``."""
    walk = _walked(graph)
    for _ in range(_MOST_TRIES):
        wasted = walk.wasted()
        if not wasted:
            break
        for node in wasted:
            store_as(node, FLOAT32)
        walk = _walked(graph)
    outputs = [Output(look.place, _returned(like)) for look, like in zip(walk.outputs, results, strict=True)]
    return Program(
        tuple(walk.written.steps), tuple(look.place for look in walk.inputs), tuple(walk.given), tuple(outputs),
        tuple(walk.written.memories), walk.direct,
    )  # fmt: skip


def _walked(graph: fx.Graph) -> _Walk:
    walk = _Walk(homes(graph))
    for node in graph.nodes:
        walk.visit(node)
    return walk


def _returned(like: Tensor) -> TensorForm:
    strides = like if has_no_gaps(like) else torch.empty(like.shape, device="meta")
    return form_of(like, strides, NumberType(like.dtype))


class _Wanted(NamedTuple):
    """The result of a group: its size, its numbers, the place in a concatenation where it belongs, and why it is in
    float32."""

    result: Tensor
    number: NumberType
    home: ValueLook | None = None
    reason: str = ""


class _Walk:
    def __init__(self, homes: Mapping[fx.Node, Home]) -> None:
        self.written = Writer()
        self.inputs: list[ValueLook] = []
        self.given: list[TensorForm] = []
        self.outputs: list[ValueLook] = []
        self.direct: int | None = None
        # By node; an operation with several results has one for each of them.
        self._looks: dict[fx.Node, ValueLook | Several] = {}
        self._homes = homes
        # By concatenation: the memory of its result.
        self._joined: dict[fx.Node, ValueLook] = {}

    def visit(self, node: fx.Node) -> None:
        self._visit(node)
        home = self._home(node)
        if home is not None:
            self._looks[node] = self.written.put(self._look(node), home)

    def _visit(self, node: fx.Node) -> None:
        known = constant(node)
        if known is not None:
            self._looks[node] = ValueLook(
                meta_of(known.tensor, known.tensor, known.number.storage), known, known.number
            )
        elif node.op == "placeholder":
            look = self.written.new(value(node), dense(value(node)), number_of(node))
            self.inputs.append(look)
            self.given.append(form_of(value(node), value(node), number_of(node)))
            self._looks[node] = look
        elif node.op == "call_function":
            self._looks[node] = self._call(node)
        elif node.op == "output":
            returned = node.args[0]
            if not isinstance(returned, (list, tuple)):
                raise TypeError(f"no list of outputs but {returned!r}")
            self.outputs = [self._unscaled(self._look(source)) for source in returned]

    def wasted(self) -> list[fx.Node]:
        """The values that are kept in bfloat16 for nobody who computes with them so."""
        looks = {node: look for node, look in self._looks.items() if isinstance(look, ValueLook)}
        used = {place.memory for step in self.written.steps for place in step.inputs if not step.is_conversion}
        kept = {node: look for node, look in looks.items() if stored_as(node) == look.number == BFLOAT16}
        return [node for node, look in kept.items() if look.memory not in used]

    def _look(self, argument: object) -> ValueLook:
        found = self._looks[as_node(argument)]
        if not isinstance(found, ValueLook):
            raise TypeError(f"{argument} is not one value but several")
        return found

    def _unscaled(self, look: ValueLook) -> ValueLook:
        """What is returned is copied out in any case, which makes float32 of what needs no scale."""
        return look if look.number.scale is None else self.written.converted(look, FLOAT32)

    def _call(self, node: fx.Node) -> ValueLook | Several:
        """The look at the result, or several by number."""
        if node.target is operator.getitem:
            return self._part(node)
        if isinstance(node.target, ComputedGroup):
            return self._group(node, node.target, [self._look(argument) for argument in node.args])
        if is_call(node, _aten.cat.default) and (node in self._homes or _moves(node)):
            return self._join(node)
        if node.target in (as_captured, without_gaps):
            look = self._look(node.args[0])
            like = value(node) if node.target is as_captured else without_gaps_like(look.meta)
            return self.written.in_layout(look, like)
        if not isinstance(node.target, OpOverload):
            raise TypeError(f"{node} calls no operation but {node.target}")
        looks: Callable[[fx.Node], Any] = self._looks.__getitem__
        arguments: Any = fx.node.map_arg((node.args, node.kwargs), looks)
        view = self._view(node, *arguments)
        if view is not None:
            return view
        if node.target in _VIEWS:
            return reshaped(self.written, self._look(node.args[0]), layout_of(node))
        computed: Callable[[fx.Node], Any] = self._as_computed
        arguments = fx.node.map_arg((node.args, node.kwargs), computed)
        return self._operation(node, Operation(node.target, *arguments))

    def _part(self, node: fx.Node) -> ValueLook:
        several = self._looks[source(node)]
        if isinstance(several, ValueLook):
            raise TypeError(f"{node} takes a part of one value")
        return several[_number(node)]

    def _group(self, node: fx.Node, group: ComputedGroup, read: list[ValueLook]) -> ValueLook:
        same = all(look.number == read[0].number for look in read)
        number = stored_as(node) or (read[0].number if same and keeps_numbers(group) else number_of(node))
        wanted = _Wanted(value(node), number, self._home(node) if writes_channels(group) else None, refused(node))
        if isinstance(group, Elementwise) and group.is_conversion:
            return self._conversion(group, read[0], wanted)
        return self._computed(group, read, wanted)

    def _computed(self, group: ComputedGroup, read: list[ValueLook], wanted: _Wanted) -> ValueLook:
        """What the kernel cannot read as it lies is copied first; what it cannot read or write in its numbers is
        converted."""
        result, number, home, reason = wanted
        out = result_strides(group, result, read) if home is None else home.meta
        likes, direct = likes_of(group, read, out), self._reads_input(group, read[0])
        forms = [form_of(look.meta, like, look.number) for look, like in zip(read, likes, strict=True)]
        if direct is not None:
            forms[0] = self.given[direct]
        storage = storage_for(group, forms, form_of(result, out, number))
        if storage is None:
            return self._in_turn(group, read, wanted)
        if direct is not None and storage.read[0] == read[0].number:
            self.direct = direct
            inputs = read
        else:
            changed = zip(read, storage.read, likes, strict=True)
            inputs = [self.written.converted(look, kind, like) for look, kind, like in changed]
        later = home is not None and home.number == number
        if home is None or home.number != storage.written:
            home = self.written.new(result, dense(result) if home is not None else out, storage.written)
        [found] = self.written.step(group, inputs, [home], storage.noted(reason))
        # A scale is what the model says; other numbers are only a way to keep the value.
        return found if number.scale is None or later else self.written.converted(found, number, found.meta)

    def _in_turn(self, group: ComputedGroup, read: list[ValueLook], wanted: _Wanted) -> ValueLook:
        """A group that rounds in the middle and has no kernel, as two steps."""
        if isinstance(group, SeparableGroup) and group.between is not None:
            first = group.depthwise
            size = first.geometry.output_size(read[0].meta.shape[2:], first.kernel_size)
            hidden = torch.empty(len(read[0].meta), first.out_channels, *size, device="meta")
            between = self._computed(first, read[:1], _Wanted(hidden, group.between))
            return self._computed(group.pointwise, [between, *read[1:]], wanted)
        if isinstance(group, Convolution) and group.reads is not None:
            x = self._conversion(conversion(), read[0], _Wanted(read[0].meta, group.reads))
            return self._computed(replace(group, reads=None), [x, *read[1:]], wanted)
        raise TypeError(f"{group} is no group that rounds in the middle")

    def _conversion(self, group: Elementwise, x: ValueLook, wanted: _Wanted) -> ValueLook:
        """Of the network's input as the caller holds it, where nothing else was read yet."""
        direct, number, home = self._reads_input(group, x), wanted.number, wanted.home
        if x.number == number or direct is None:
            home = home if home is not None and home.number == number else None
            return self.written.converted(x, number) if home is None else self.written.put(x, home)
        self.direct = direct
        out = self.written.new(x.meta, without_gaps_like(self.given[direct].meta), number)
        return self.written.step(group, [x], [out])[0]

    def _home(self, node: fx.Node) -> ValueLook | None:
        """The place in a concatenation that a value is computed into."""
        home = self._homes.get(node)
        if home is None or home.join is node:
            return None
        whole = self._whole(home.join)
        return whole.seen_as(whole.meta[:, home.channel : home.channel + shape(node)[1]])

    def _whole(self, join: fx.Node) -> ValueLook:
        """The memory of a concatenation's result, new where it is the first that is heard of it."""
        if join not in self._joined:
            number = stored_as(join) or number_of(join)
            self._joined[join] = self.written.new(value(join), dense(value(join)), number)
        return self._joined[join]

    def _join(self, node: fx.Node) -> ValueLook:
        """What is not there yet is copied."""
        looks, dim = [self._look(part) for part in parts_of(node)], dim_of(node)
        if node in self._homes:
            return put_together(self.written, looks, dim, self._home(node) or self._whole(node))
        same = all(look.number == looks[0].number for look in looks)
        number = stored_as(node) or (looks[0].number if same else number_of(node))
        largest = max(looks, key=lambda look: look.meta.numel())
        whole = self.written.new(value(node), broadcastable(value(node), largest.meta), number)
        return put_together(self.written, looks, dim, whole)

    def _reads_input(self, group: ComputedGroup, x: ValueLook) -> int | None:
        """Which input a step takes as the caller holds it, where it is the network's first: a kernel for few channels
        in either layout, others channels_last, and a conversion any."""
        found = next((i for i, look in enumerate(self.inputs) if look is x), None)
        if self.written.steps or found is None:
            return None
        if isinstance(group, Elementwise):
            return found if group.is_conversion else None
        if not isinstance(group, Convolution) or group.kind not in ("normal", "grouped"):
            return None
        if group.epilogue.residual or group.dims != 2:
            return None
        few = group.in_channels <= MAX_CHANNELS and group.groups == 1 and set(group.geometry.dilation) == {1}
        return found if few or is_channels_last(self.given[found].meta) else None

    def _view(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ValueLook | Several | None:
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
        looks: ValueLook | Several = pytree.tree_map_only(Tensor, whole.seen_as, metas)
        return looks

    def _operation(self, node: fx.Node, operation: Operation) -> ValueLook | Several:
        results = node.meta.get("val")
        several = not isinstance(results, Tensor)
        # The nodes that take several results know their sizes; the others are of no use to anyone.
        taken = {_number(user): value(user) for user in node.users} if several else {0: value(node)}
        home = self._home(node) if torch.Tag.pointwise in operation.target.tags else None
        if home is not None and home.number != number_of(node):
            home = None
        read = looks_in((operation.args, operation.kwargs))
        outs = {
            i: home or self.written.new(part, part if several else strides_for(part, read), NumberType(part.dtype))
            for i, part in taken.items()
        }
        numbers = iter(range(len(read)))
        args, kwargs = pytree.tree_map_only(
            ValueLook, lambda look: Input(next(numbers)), (operation.args, operation.kwargs)
        )
        work = Operation(operation.target, args, kwargs, tuple(outs) if several else None, refused(node) or NO_KERNEL)
        self.written.step(work, read, list(outs.values()))
        kept = stored_as(node)
        return outs if several else outs[0] if kept is None else self.written.converted(outs[0], kept)

    def _as_computed(self, node: fx.Node) -> ValueLook | Several:
        """A value in the numbers that the model computes with."""
        look = self._looks[node]
        return self.written.converted(look, number_of(node)) if isinstance(look, ValueLook) else look


def _moves(join: fx.Node) -> bool:
    """Whether a concatenation is copies: of numbers that all are of one kind, which kernels know."""
    parts, rank = parts_of(join), len(shape(join))
    return all(number_of(part) == FLOAT32 and len(shape(part)) == rank for part in (join, *parts))


def _number(taker: fx.Node) -> int:
    """Which of several results a node takes."""
    number = taker.args[1]
    if not isinstance(number, int):
        raise TypeError(f"{taker} takes no part of a result")
    return number


def _is_view(target: OpOverload) -> bool:
    schema = target._schema
    if len(schema.returns) != 1 or not schema.arguments or target in _NOT_IN_PLACE:
        return False
    shared, source = schema.returns[0].alias_info, schema.arguments[0].alias_info
    return shared is not None and source is not None and not shared.is_write


def _relative(source: ValueLook, seen: Tensor, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of ``as_strided``, which counts from the beginning of the memory, for where ``source`` lies."""
    span = 1 + sum((size - 1) * step for size, step in zip(seen.shape, seen.stride(), strict=True))
    if seen.storage_offset() or seen.untyped_storage().nbytes() != span * seen.element_size():
        raise ValueError("as_strided reads the memory around a view")
    _, size, stride, *offset = args
    return source, size, stride, source.meta.storage_offset() + (offset[0] or 0 if offset else 0)
