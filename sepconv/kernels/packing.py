"""Weights in the order in which the kernels read them, packed once per content.

A packed copy is found by the weights' places in memory *and a hash of all their bytes*. Neither PyTorch's version
counter nor the address alone would do: ``w.data.mul_()`` changes no version, and ``w.data = other`` may bring back an
old address. Reading the weights once costs a small part of the product they are used in; callers whose weights
are frozen pack them themselves and skip it.
"""

from __future__ import annotations

import atexit
import ctypes
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels import runtime
from sepconv.kernels.buffers import UINT32, Arguments, Buffer, arguments
from sepconv.kernels.layout import array
from sepconv.kernels.runtime import hl

MAX_PACKED = 512

_LANES = 64
_HASH_FROM = 1 << 12  # fewer numbers are compared themselves
_SPLIT_FROM = 1 << 16  # from here on hashing is shared out to threads
_SHARES = 8


class _Entry(NamedTuple):
    owner: Any  # weak reference: the packed copy goes when the weight goes
    digest: tuple[bytes, ...]
    packed: Packed


_cache: OrderedDict[Hashable, _Entry] = OrderedDict()
_lock = threading.RLock()
atexit.register(_cache.clear)  # weights that die with the interpreter would look for what has gone before them


class _Hashing(threading.local):
    """By number of numbers: how many the kernel hashes, where it reads, what it writes, and its arguments."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[int, Buffer, Any, Arguments]] = {}


_hashings = _Hashing()


def pack(weight: Tensor, panel: int, block: int, multiplier: int = 1) -> Tensor:
    """(O, C*M, 1, ...) -> (panels, M * C, panel): whole blocks of panels, zeros after the last output channel.

    Input channel c*M + m of the weight becomes row m*C + c: the separable kernel makes its channels in that order.
    """
    length, depth = weight.shape[:2]
    blocks = -(-length // block)
    rows = weight.detach().reshape(length, depth)
    if multiplier > 1:
        rows = rows.reshape(length, -1, multiplier).transpose(1, 2).reshape(length, depth)
    if length % block:
        padded = rows.new_zeros(blocks * block, depth)
        padded[:length] = rows
        rows = padded
    return rows.reshape(-1, panel, depth).transpose(1, 2).contiguous()


def pack_bias(bias: Tensor | None, weight: Tensor) -> Tensor:
    """A copy of the bias; zeros where there is none."""
    return (
        weight.new_zeros(weight.shape[0])
        if bias is None
        else bias.detach().clone(memory_format=torch.contiguous_format)
    )


class Packed(list[Any]):
    """Packed weights, and the calls that were prepared with them, which go when they go."""

    def __init__(self, buffers: list[Any]) -> None:
        super().__init__(buffers)
        self.calls: dict[int, Any] = {}


_constants: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def constant(tensor: Tensor) -> Tensor:
    """The same tensor, whose numbers nobody else can reach and change: they need not be compared."""
    _constants[id(tensor)] = tensor
    return tensor


def remembered(weights: tuple[Tensor | None, ...], variant: Hashable, make: Callable[[], list[Any]]) -> Packed:
    """``make()``, kept for as long as the first weight lives and the bytes of all of them stay the same.

    ``make`` must depend on nothing but the weights' values and ``variant``, and must copy what it keeps.
    """
    given = [weight for weight in weights if weight is not None]
    digest = tuple([b"" if _constants.get(id(weight)) is weight else fingerprint(weight) for weight in given])
    key = (variant, *[None if weight is None else weight.data_ptr() for weight in weights])
    with _lock:
        entry = _cache.get(key)
        if entry is not None and entry.digest == digest:
            _cache.move_to_end(key)
            return entry.packed
    result = Packed(make())
    owner = given[0] if given[0]._base is None else given[0]._base
    with _lock:
        _cache[key] = _Entry(weakref.ref(owner, lambda reference: _forget(key, reference)), digest, result)
        if len(_cache) > MAX_PACKED:
            _cache.popitem(last=False)
    return result


def _forget(key: Hashable, reference: Any) -> None:
    with _lock:
        entry = _cache.get(key)
        if entry is not None and entry.owner is reference:
            del _cache[key]


def cached_weights() -> int:
    """How many packed copies are kept (at most MAX_PACKED)."""
    return len(_cache)


def fingerprint(weight: Tensor) -> bytes:
    """A hash of every bit of a float32 tensor, 64 lanes of 32 bits per share of it; its bytes where they are few."""
    count = weight.numel()
    if count < _HASH_FROM:
        # The contiguous way is a few times shorter, and a layer has a dozen small tensors.
        return ctypes.string_at(weight.data_ptr(), 4 * count) if weight.is_contiguous() else array(weight).tobytes()
    numbers = array(weight)
    contiguous = numbers.flags.c_contiguous
    flat = numbers.reshape(-1)
    body, read, state, prepared = _hashing(count)
    read.move(weight.data_ptr() if contiguous else flat.ctypes.data)
    runtime.compiled(("fingerprint",), _build_fingerprint).run(prepared)
    return bytes(state) if body == count else bytes(state) + flat[body:].tobytes()


def _hashing(count: int) -> tuple[int, Buffer, Any, Arguments]:
    known = _hashings.known
    if count not in known:
        if len(known) >= MAX_PACKED:
            known.clear()
        shares = _SHARES if count >= _SPLIT_FROM else 1
        rows = count // (_LANES * shares)
        body = rows * _LANES * shares
        state = (ctypes.c_uint32 * (shares * _LANES))()
        read = Buffer((body,), (1,), 0, UINT32)
        written = Buffer((shares, _LANES), (_LANES, 1), ctypes.addressof(state), UINT32)
        prepared = arguments(rows, read, written)
        runtime.compiled(("fingerprint",), _build_fingerprint).check(prepared)
        known[count] = body, read, state, prepared
    return known[count]


def _build_fingerprint() -> tuple[Any, list[Any]]:
    """Each lane: state = (state xor number) * odd, then folded right. Every step can be undone, so that a change of
    one number always changes the hash; the fold keeps changes of high bits (signs, powers of two) from cancelling."""
    rows, numbers = hl.Param(hl.Int(32), "rows"), hl.ImageParam(hl.UInt(32), 1, "numbers")
    lane, share = hl.Var("lane"), hl.Var("share")
    row = hl.RDom([hl.Range(0, rows)], "row")
    state, out = hl.Func("state"), hl.Func("fingerprint")
    state[lane, share] = hl.u32(2166136261) + hl.cast(hl.UInt(32), lane) * hl.u32(2654435769)
    mixed = (state[lane, share] ^ numbers[lane + _LANES * (row.x + rows * share)]) * hl.u32(16777619)
    state[lane, share] = mixed ^ (mixed >> hl.u32(15))
    out[lane, share] = state[lane, share]

    lanes = runtime.target().natural_vector_size(hl.UInt(32))
    runtime.parallel(out.bound(lane, 0, _LANES).vectorize(lane, lanes), share)
    state.compute_at(out, share).vectorize(lane, lanes).unroll(lane)
    state.update().reorder(lane, row.x).vectorize(lane, lanes).unroll(lane)
    return out, [rows, numbers]
