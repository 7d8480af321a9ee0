"""Weights in the order in which the kernels read them, packed once per content.

A packed copy is found by the places in memory of all weights that it was made of *and a hash of all their bytes*.
Neither PyTorch's version counter nor the address alone would do: ``w.data.mul_()`` changes no version, and
``w.data = other`` may bring back an old address. Reading the weights once costs a small part of the product they are
used in; callers whose weights are frozen pack them themselves and skip it.

It goes when the memory of any of them goes. That memory is watched and not the tensor: ``torch.utils.swap_tensors``
refuses tensors to which there are weak references.
"""

from __future__ import annotations

import atexit
import ctypes
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.halide.jit import forks, runtime
from sepconv.kernels.halide.jit.buffers import UINT32, Buffer
from sepconv.kernels.halide.jit.machine_code import Bound, Kernel
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.layout import array

MAX_PACKED = 512

_LANES = 64
_HASH_FROM = 1 << 12  # fewer numbers are compared themselves
_SPLIT_FROM = 1 << 16  # from here on hashing is shared out to threads
_SHARES = 8


class _Entry(NamedTuple):
    watched: list[Any]  # weak references to the weights' memory
    digest: tuple[bytes | int, ...]
    packed: Packed


_cache: OrderedDict[Hashable, _Entry] = OrderedDict()
_lock = threading.RLock()
atexit.register(_cache.clear)  # weights that die with the interpreter would look for what has gone before them


@forks.in_child
def _after_fork() -> None:
    """A lock that another thread held at the fork would stay locked in the child for ever."""
    global _lock
    _lock = threading.RLock()


class _Hashing(threading.local):
    """By kernel and number of numbers: how many it hashes, where it reads, what it writes, and the call."""

    def __init__(self) -> None:
        self.known: dict[tuple[Kernel, int], tuple[int, Buffer, Any, Bound]] = {}


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
    return rows.reshape(-1, panel, depth).transpose(1, 2).clone(memory_format=torch.contiguous_format)


def pack_tiles(weight: Tensor, depth: int, tile: int = 16) -> Tensor:
    """(O, C, 1, ...) of 16 or 8 bits -> (O / tile, C / depth, depth / group, tile, group).

    A group is as many channels as lie in 32 bits. Zeros after the last output channel; ``depth`` channels, a divisor of
    C, are one step of a product of tiles.
    """
    (length, channels), group = weight.shape[:2], 4 // weight.element_size()
    rows = weight.new_zeros(-(-length // tile) * tile, channels)
    rows[:length] = weight.detach().reshape(length, channels)
    return rows.view(-1, tile, channels // depth, depth // group, group).permute(0, 2, 3, 1, 4).contiguous()


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


class _Constant(weakref.ref[Tensor]):
    """A tensor whose numbers never change, and a number that no other tensor ever has, unlike its address."""

    number: int


_constants: dict[int, _Constant] = {}
_numbers = count()


def constant(tensor: Tensor) -> Tensor:
    """The same tensor, whose numbers nobody else can reach and change: they need not be compared."""
    place = id(tensor)
    mark = _Constant(tensor, lambda gone: _constants.pop(place, None) if _constants.get(place) is gone else None)
    mark.number = next(_numbers)
    _constants[place] = mark
    return tensor


def _digest(weight: Tensor) -> bytes | int:
    mark = _constants.get(id(weight))
    return fingerprint(weight) if mark is None or mark() is not weight else mark.number


def remembered(weights: tuple[Tensor | None, ...], variant: Hashable, make: Callable[[], list[Any]]) -> Packed:
    """``make()``, kept for as long as all the weights' memory lives and its bytes stay the same.

    ``make`` must depend on nothing but the weights' values and ``variant``, and must copy what it keeps. The weights
    are tensors of 32 or 16 bits; ``variant`` tells apart those of other sizes.
    """
    given = [weight for weight in weights if weight is not None]
    digest = tuple([_digest(weight) for weight in given])
    key = (variant, *[None if weight is None else weight.data_ptr() for weight in weights])
    with _lock:
        entry = _cache.get(key)
        if entry is not None and entry.digest == digest:
            _cache.move_to_end(key)
            return entry.packed
    result = Packed(make())
    watched = [weakref.ref(weight.untyped_storage(), partial(_forget, key)) for weight in given]
    with _lock:
        gone = [_cache.pop(key, None)]  # what goes may take others with it: not in the midst of a change
        _cache[key] = _Entry(watched, digest, result)
        if len(_cache) > MAX_PACKED:
            gone.append(_cache.popitem(last=False)[1])
    return result


def _forget(key: Hashable, reference: Any) -> None:
    with _lock:
        entry = _cache.get(key)
        gone = None
        if entry is not None and any(watched is reference for watched in entry.watched):
            gone = _cache.pop(key)
    del gone


def cached_weights() -> int:
    """How many packed copies are kept (at most MAX_PACKED)."""
    return len(_cache)


def fingerprint(weight: Tensor) -> bytes:
    """A hash of every bit of a tensor, 64 lanes of 32 bits per share of it; its bytes where they are few.

    Two numbers of 16 bits are one of 32.
    """
    if weight.element_size() == 2:
        flat = weight.detach().reshape(-1)
        pairs = flat[: len(flat) // 2 * 2].view(torch.float32)
        return fingerprint(pairs) + flat[len(flat) // 2 * 2 :].view(torch.int16).numpy().tobytes()
    size = weight.numel()
    if size < _HASH_FROM:
        # The contiguous way is a few times shorter, and a layer has a dozen small tensors.
        return ctypes.string_at(weight.data_ptr(), 4 * size) if weight.is_contiguous() else array(weight).tobytes()
    numbers = array(weight)
    contiguous = numbers.flags.c_contiguous
    flat = numbers.reshape(-1)
    body, read, state, run = _hashing(runtime.compiled(("fingerprint",), _build_fingerprint), size)
    read.move(weight.data_ptr() if contiguous else flat.ctypes.data)
    run()
    return bytes(state) if body == size else bytes(state) + flat[body:].tobytes()


def _hashing(kernel: Kernel, size: int) -> tuple[int, Buffer, Any, Bound]:
    known, key = _hashings.known, (kernel, size)
    if key not in known:
        if len(known) >= MAX_PACKED:
            known.clear()
        shares = _SHARES if size >= _SPLIT_FROM else 1
        rows = size // (_LANES * shares)
        body = rows * _LANES * shares
        state = (ctypes.c_uint32 * (shares * _LANES))()
        read = Buffer((body,), (1,), 0, UINT32)
        written = Buffer((shares, _LANES), (_LANES, 1), ctypes.addressof(state), UINT32)
        known[key] = body, read, state, kernel.bind(rows, read, written)
    return known[key]


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
