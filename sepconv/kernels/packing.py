"""Weights of the pointwise product in the order in which the kernels read them, packed once per content.

The packed copy is found by the weight's place in memory *and a hash of all its bytes*. Neither PyTorch's version
counter nor the address alone would do: ``w.data.mul_()`` changes no version, and ``w.data = other`` may bring back an
old address. Reading the weights once costs a small part of the product they are used in; callers whose weights
are frozen call :func:`pack` and skip it.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels import runtime
from sepconv.kernels.runtime import hl

MAX_PACKED = 512

_LANES = 64
_SPLIT_FROM = 1 << 16  # numbers from which hashing is shared out to threads
_SHARES = 8


class _Key(NamedTuple):
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: int
    multiplier: int


class _Entry(NamedTuple):
    owner: Any  # weak reference: the packed copy goes when the weight goes
    digest: bytes
    packed: Tensor


_cache: OrderedDict[_Key, _Entry] = OrderedDict()
_lock = threading.RLock()


def pack(weight: Tensor, block: int, multiplier: int = 1) -> Tensor:
    """(O, C*M, 1, ...) -> (ceil(O / block), M * C, block), zeros after the last output channel.

    Input channel c*M + m of the weight becomes row m*C + c: the separable kernel makes its channels in that order.
    """
    length, depth = weight.shape[:2]
    blocks = -(-length // block)
    rows = weight.detach().reshape(length, depth)
    if multiplier > 1:
        rows = rows.reshape(length, -1, multiplier).transpose(1, 2).reshape(length, depth)
    packed = rows.new_zeros(blocks * block, depth) if length % block else rows
    if length % block:
        packed[:length] = rows
    return packed.reshape(blocks, block, depth).transpose(1, 2).contiguous()


def packed(weight: Tensor, block: int, multiplier: int = 1) -> Tensor:
    """:func:`pack`, remembered for as long as the weight lives and its bytes stay the same."""
    digest = fingerprint(weight)
    key = _Key(weight.data_ptr(), tuple(weight.shape), weight.stride(), block, multiplier)
    with _lock:
        entry = _cache.get(key)
        if entry is not None and entry.digest == digest and entry.owner() is not None:
            _cache.move_to_end(key)
            return entry.packed
    result = pack(weight, block, multiplier)
    base = weight if weight._base is None else weight._base
    with _lock:
        _cache[key] = _Entry(weakref.ref(base, lambda owner: _forget(key, owner)), digest, result)
        if len(_cache) > MAX_PACKED:
            _cache.popitem(last=False)
    return result


def _forget(key: _Key, owner: Any) -> None:
    with _lock:
        entry = _cache.get(key)
        if entry is not None and entry.owner is owner:
            del _cache[key]


def cached_weights() -> int:
    """How many packed copies are kept (at most MAX_PACKED)."""
    return len(_cache)


def fingerprint(weight: Tensor) -> bytes:
    """A hash of every bit of a float32 tensor, 64 lanes of 32 bits per share of it."""
    numbers = weight.detach().contiguous().view(-1)
    count = numbers.numel()
    shares = _SHARES if count >= _SPLIT_FROM else 1
    rows = count // (_LANES * shares)
    bits = numbers.numpy().view("uint32")
    body = rows * _LANES * shares
    state = torch.empty(shares, _LANES, dtype=torch.int32).numpy().view("uint32")
    if rows:
        call = runtime.compiled(("fingerprint",), _build_fingerprint)
        call(rows, hl.Buffer(bits[:body]), hl.Buffer(state))
    return (state.tobytes() if rows else b"") + bits[body:].tobytes()


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
    out.bound(lane, 0, _LANES).vectorize(lane, lanes).parallel(share)
    state.compute_at(out, share).vectorize(lane, lanes).unroll(lane)
    state.update().reorder(lane, row.x).vectorize(lane, lanes).unroll(lane)
    return out, [rows, numbers]
