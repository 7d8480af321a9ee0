"""Frozen tensors: evaluated once, found again by how they were made.

A graph is captured anew for every input size, but its weights are the same. Each constant has a key: the name of a
parameter, or the operation and the keys of its arguments. What a key stands for is kept for as long as anything uses
it.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from sepconv.compile.numbers import NumberType

_LITERAL = 16

T = TypeVar("T")


class Constant:
    """A tensor with the key under which the store knows it.

    One that can be made again is not kept for longer than somebody uses it: of weights that a kernel has packed, the
    packed copy is enough until another image size wants another one.
    """

    def __init__(self, tensor: Tensor, key: Hashable, again: Callable[[], Tensor] | None = None) -> None:
        self.key, self.shape, self.number = key, tensor.shape, NumberType(tensor.dtype)
        self._again, self._tensor = again, tensor if again is None else None
        self._seen = weakref.ref(tensor)

    def __repr__(self) -> str:
        return f"Constant({name_of(self.key) or self.key!r}, {tuple(self.shape)})"

    @property
    def tensor(self) -> Tensor:
        if self._tensor is not None:
            return self._tensor
        found = self._seen()
        if found is None:
            assert self._again is not None
            found = self._again()
            self._seen = weakref.ref(found)
        return found


class QuantizedConstant(Constant):
    """A weight that is ``whole * scale``: numbers of int8, and a float32 factor for each output channel."""

    def __init__(self, whole: Constant, scale: Constant, key: Hashable) -> None:
        self.whole, self.scale = whole, scale
        super().__init__(self._multiplied(), key, self._multiplied)

    def _multiplied(self) -> Tensor:
        whole = self.whole.tensor
        return whole * self.scale.tensor.view(-1, *[1] * (whole.dim() - 1))


class Store:
    """Constants by key, shared by all graphs of a model and dropped with the last of them that uses one."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        """``named``: parameters and buffers by name."""
        # The tensors are kept: the id of one that is gone may come back as another's.
        self._named = {id(tensor): (name, tensor) for name, tensor in named.items()}
        self._known: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Constant:
        return self.keep(("constant", key), lambda: Constant(make(), key))

    def derived(self, key: Hashable, make: Callable[[], Tensor]) -> Constant:
        """One that ``make`` can make again: it must hold constants, not their tensors."""
        return self.keep(("constant", key), lambda: Constant(make(), key, make))

    def quantized(self, key: Hashable, whole: Constant, scale: Constant) -> QuantizedConstant:
        return self.keep(("constant", key), lambda: QuantizedConstant(whole, scale, key))

    def keep(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returns, or returned before if that is still in use."""
        known: T | None = self._known.get(key)
        if known is None:
            known = self._known[key] = make()
        return known

    def frozen(self, tensor: Tensor) -> Constant:
        """The constant for a tensor that the model holds; others, such as literals, are known by their contents."""
        known = self._named.get(id(tensor))
        if known is not None:
            return self.get(("parameter", known[0]), lambda: tensor)
        literal = _literal(tensor)
        return self.get(("unnamed", object()) if literal is None else ("literal", *literal), lambda: tensor)


def _literal(tensor: Tensor) -> tuple[Hashable, ...] | None:
    """All that there is to know about a few numbers: bit by bit, and how they lie in memory, which programs rely on."""
    if tensor.numel() > _LITERAL or not tensor.is_cpu or tensor.layout != torch.strided or tensor.is_quantized:
        return None
    if tensor.is_conj() or tensor.is_neg():
        return None
    whole = tensor.detach().contiguous()
    bits = ctypes.string_at(whole.data_ptr(), whole.nbytes) if whole.nbytes else b""
    return str(tensor.dtype), tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), bits


def name_of(key: Hashable) -> str:
    """The name of the first parameter in a key, "" if there is none."""
    if not isinstance(key, tuple):
        return ""
    if len(key) == 2 and key[0] == "parameter":
        return str(key[1])
    return next((name for part in key if (name := name_of(part))), "")
