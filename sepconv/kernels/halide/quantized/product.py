"""The product of rows of bytes and weights: ``sums[o, p] = sum over k of weight[o, k] * x[k, p]``, exact in 32 bits.

x is unsigned, the weights are signed. Four ways: the processor's tiles (AMX), its product of four bytes at a time
(VNNI), that of four signed bytes (ARM's dot product), for which x is read as 128 less, or of two numbers of 16 bits,
which every processor has. (The old product of two bytes at a time rounds off what is beyond 16 bits.)
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.halide.jit import amx, packing, runtime
from sepconv.kernels.halide.jit.buffers import Buffer, buffer
from sepconv.kernels.halide.jit.machine_code import Kernel
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.halide.schedule import quantized as schedule

TILES, QUADS, SIGNED, PAIRS = "tiles", "quads", "signed", "pairs"
NAMES = {TILES: "AMX tiles", QUADS: "VNNI", SIGNED: "dot products", PAIRS: "pairs of 16 bits"}
_LESS = 128


def ways() -> tuple[str, ...]:
    """How this machine can multiply, the fastest first."""
    if runtime.multiplies_signed_bytes():
        return SIGNED, PAIRS
    found = (QUADS, PAIRS) if runtime.multiplies_bytes() else (PAIRS,)
    return found if amx.missing(amx.BYTES) else (TILES, *found)


def best(terms: int, pixels: int) -> str:
    """How sums of so many terms are made for so many pixels; of the depthwise ones, which are short, never by tiles."""
    return next(way for way in ways() if way != TILES or schedule.worth_tiles(terms, pixels))


def row_type(way: str) -> Any:
    """Of what is multiplied by weights."""
    return {PAIRS: hl.Int(16), SIGNED: hl.Int(8)}.get(way, hl.UInt(8))


def in_row(kind: Any, byte: Any) -> Any:
    """A byte of x as it is multiplied: of a signed one ``less`` than it was."""
    if kind == hl.Int(8):
        return hl.reinterpret(kind, byte ^ hl.cast(hl.UInt(8), _LESS))
    return hl.cast(kind, byte)


def less(way: str) -> int:
    """By how much what is multiplied is less than x."""
    return _LESS if way == SIGNED else 0


class ByteProduct(NamedTuple):
    """What the code of one product depends on.

    Attributes:
        terms: of each sum.
        steps, depth: the sum is made in so many steps of so many terms, the last ones zeros.
        wide: output channels of one block of sums.
        tall: pixels of one block of sums.
        lanes: output channels that lie side by side in the packed weights.
        groups: so many products of this kind have their weights one after the other.
    """

    way: str
    terms: int
    outputs: int
    steps: int
    depth: int
    wide: int
    tall: int
    lanes: int
    groups: int = 1

    @property
    def whole(self) -> int:
        """Terms with the zeros behind them."""
        return self.steps * self.depth

    @property
    def in_place(self) -> bool:
        """Whether rows of bytes can be read where they are; else they are copied, with zeros behind them."""
        return self.way in (TILES, QUADS) and self.whole == self.terms

    @property
    def group(self) -> int:
        """Terms that one instruction adds up."""
        return 2 if self.way == PAIRS else 4

    @property
    def row_type(self) -> Any:
        return row_type(self.way)

    @property
    def padded_outputs(self) -> int:
        unit = self.lanes if self.way == TILES else self.wide
        return -(-self.outputs // unit) * unit


def product(way: str, terms: int, outputs: int, pixels: int) -> ByteProduct:
    """For sums of so many terms; ``pixels`` is how many there are at most."""
    if way == TILES:
        steps, tile = -(-terms // amx.ROW_BYTES), schedule.on_tiles(outputs, pixels, amx.ROWS)
        depth = -(-terms // (4 * steps)) * 4
    else:
        tile, depth = schedule.in_registers(machine.host(), outputs, pixels), 2 if way == PAIRS else 4
        steps = -(-terms // depth)
    return ByteProduct(way, terms, outputs, steps, depth, tile.wide, tile.scalars, tile.lanes)


def describe(spec: ByteProduct) -> dict[str, Any]:
    """The product in words and numbers."""
    return {"product": NAMES[spec.way], "steps": spec.steps, "wide": spec.wide, "tall": spec.tall}


def compiled(spec: ByteProduct, key: Hashable, build: runtime.Build) -> Kernel:
    """``runtime.compiled`` for the processors that the product is for."""
    return runtime.compiled(key, build, old=spec.way == PAIRS)


def stored_together(spec: ByteProduct, kind: str) -> int:
    """Output channels that are finished and stored at a time."""
    most = spec.lanes * (4 if kind == "uint8" else 1)
    return next(lanes for lanes in (most, most // 2, most // 4) if spec.wide % lanes == 0)


def weight_param(spec: ByteProduct, name: str = "weight") -> Any:
    if spec.way == TILES:
        weight = hl.ImageParam(hl.Int(8), 1, name)
        weight.dim(0).set_min(0)
        return weight
    weight = hl.ImageParam(hl.Int(16) if spec.way == PAIRS else hl.Int(8), 4, name)
    stride = 1
    for d, extent in enumerate((spec.group, spec.lanes, spec.steps, spec.groups * spec.padded_outputs // spec.lanes)):
        weight.dim(d).set_min(0).set_extent(extent).set_stride(stride)
        stride *= extent
    return weight


def sums_of(spec: ByteProduct, rows: Any, weight: Any, at: list[Any], bias: Any = None) -> tuple[Any, Any]:
    """The sums over ``rows[k, pixel, ...]``, and their reduction over k; ``at``: output, pixel and further dimensions.

    Those of registers begin with the bias, where it has no more outputs than whole blocks.
    """
    sums = hl.Func("sums")
    if spec.way == TILES:
        steps = [hl.ExternFuncArgument(hl.Expr(count)) for count in (spec.steps, spec.depth)]
        given = [hl.ExternFuncArgument(rows), hl.ExternFuncArgument(weight), *steps]
        sums.define_extern(amx.BYTES.name, given, hl.Int(32), at, hl.NameMangling.C)
        return sums, None
    k = hl.RDom([hl.Range(0, spec.whole)], "k")
    o, lanes = at[0], spec.lanes
    sums[at] = hl.i32(0) if bias is None or spec.outputs != spec.padded_outputs else bias[o]
    packed = weight[k.x % spec.group, o % lanes, k.x / spec.group, o / lanes]
    sums[at] += hl.cast(hl.Int(32), rows[[k.x, *at[1:]]]) * hl.cast(hl.Int(32), packed)
    return sums, k


def whole_sums(spec: ByteProduct, sums: Any, at: list[Any], bias: Any) -> Any:
    """The sums with the bias."""
    begun = spec.way != TILES and spec.outputs == spec.padded_outputs
    return sums[at] if begun else sums[at] + bias[at[0]]


def arrange(spec: ByteProduct, sums: Any, k: Any, at: list[Any]) -> None:
    """What lies inside of one block of sums, after compute_at."""
    o, p = at[:2]
    if spec.way == TILES:
        sums.align_bounds(o, amx.ROWS)
        return
    sums.bound_extent(o, spec.wide).bound_extent(p, spec.tall)
    sums.vectorize(o, spec.lanes).unroll(o).unroll(p)
    outer, inner, vector, lane = hl.RVar("outer"), hl.RVar("inner"), hl.Var("vector"), hl.Var("lane")
    update = sums.update().split(k.x, outer, inner, spec.group).split(o, vector, lane, spec.lanes)
    update.reorder(inner, lane, vector, p, outer).atomic().vectorize(inner).vectorize(lane).unroll(vector).unroll(p)


def pack(spec: ByteProduct, weight: Tensor) -> Buffer:
    """``weight``: (O, terms) or (O, terms, 1, ...), int8."""
    kind = torch.int16 if spec.way == PAIRS else torch.int8
    groups = weight.new_zeros(spec.groups, spec.padded_outputs, spec.whole, dtype=kind)
    groups[:, : spec.outputs, : spec.terms] = weight.detach().reshape(spec.groups, spec.outputs, spec.terms)
    padded = groups.flatten(0, 1)
    depth = spec.depth if spec.way == TILES else spec.whole
    found = packing.pack_tiles(padded, depth, spec.lanes)
    return buffer(found.flatten() if spec.way == TILES else found.squeeze(1))
