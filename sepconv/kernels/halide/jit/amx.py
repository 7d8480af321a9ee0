"""Products of matrices on the processor's tiles (Intel AMX), as a stage of Halide's pipelines.

A tile is a register of up to 16 rows of 64 bytes. One instruction adds the product of two of them to a third: 16 rows
of 32 bfloat16 numbers, or of 64 whole ones, times 16 columns. Halide 21 has no tiles for Python, so the stage is
written in LLVM's language; Halide calls it for each part of the sums that it needs.

Reference: Intel, "Architecture Instruction Set Extensions Programming Reference", chapter 3 (palette 1).
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from itertools import product
from platform import machine
from typing import NamedTuple

from sepconv.kernels.halide.jit import llvm
from sepconv.kernels.halide.schedule.machine import targeted


class TileProduct(NamedTuple):
    """One kind of product: ``(x, weight, steps, step bytes, sums)`` -> ``sums[o, p] = sum of weight[o, k] * x[k, p]``.

    x has its channels side by side, weight is laid out by :func:`sepconv.kernels.halide.jit.packing.pack_tiles`. The
    sums, of 32 bits, are asked for 16 outputs at a time, and for any number of pixels. Further dimensions of x and of
    the sums are one step long.

    Attributes:
        name: by which pipelines call it.
        multiply: the instruction.
        feature: what LLVM calls the processor's ability.
        numbers: what people call them.
    """

    name: str
    multiply: str
    feature: str
    numbers: str


BF16 = TileProduct("sepconv_tiles_bf16", "tdpbf16ps", "amx-bf16", "bfloat16")
BYTES = TileProduct("sepconv_tiles_bytes", "tdpbusd", "amx-int8", "bytes")
"""x unsigned, weight signed, sums of whole numbers."""
STAGES = (BF16, BYTES)
ROWS, ROW_BYTES = 16, 64

_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA = 158, 0x1023, 18

_HEAD = """
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8 immarg)
declare void @llvm.x86.tileloadd64(i8 immarg, ptr, i64)
declare void @llvm.x86.tilestored64(i8 immarg, ptr, i64)
declare void @llvm.x86.{multiply}(i8 immarg, i8 immarg, i8 immarg)
%dimension = type {{ i32, i32, i32, i32 }}
%buffer = type {{ i64, ptr, ptr, i64, i32, i32, ptr, ptr }}
%sizes = type <{{ i8, [15 x i8], [8 x i16], [8 x i16], [8 x i8], [8 x i8] }}>
@sizes = internal constant %sizes <{{ i8 1, [15 x i8] zeroinitializer,
  [8 x i16] [i16 64, i16 64, i16 64, i16 64, i16 64, i16 64, i16 64, i16 64], [8 x i16] zeroinitializer,
  [8 x i8] [i8 16, i8 16, i8 16, i8 16, i8 16, i8 16, i8 16, i8 16], [8 x i8] zeroinitializer }}>
attributes #0 = {{ "target-features"="+amx-tile,+{feature}" }}
"""

# Sums of {pixels} x {outputs} tiles in registers 0 to 3; x passes through 4 and 5, weights through 6 and 7.
_BLOCK = """
define internal void @block_{pixels}_{outputs}(
    ptr %x, i64 %xs, ptr %w, i64 %ws, ptr %y, i64 %ys, i64 %steps, i64 %xk, i64 %wk) #0 {{
  %x16 = mul i64 %xs, 16
  %y16 = mul i64 %ys, 16
  %y1 = getelementptr i8, ptr %y, i64 %y16
{zero}
  br label %loop
loop:
  %k = phi i64 [ 0, %0 ], [ %next, %loop ]
  %xo = mul i64 %k, %xk
  %wo = mul i64 %k, %wk
  %x.0 = getelementptr i8, ptr %x, i64 %xo
  %x.1 = getelementptr i8, ptr %x.0, i64 %x16
  %w.0 = getelementptr i8, ptr %w, i64 %wo
  %w.1 = getelementptr i8, ptr %w.0, i64 %ws
{body}
  %next = add i64 %k, 1
  %more = icmp slt i64 %next, %steps
  br i1 %more, label %loop, label %end
end:
{store}
  ret void
}}
"""

# What is asked for lies in the head of the buffer of sums: from, extent and step of outputs and of pixels. A question
# about sizes comes without memory: the answer is the same pixels, with all their channels.
_STAGE = """
define i32 @{name}(ptr %x, ptr %w, i32 %steps.32, i32 %xk.32, ptr %out) #0 {{
  %x.host.at = getelementptr %buffer, ptr %x, i32 0, i32 2
  %w.host.at = getelementptr %buffer, ptr %w, i32 0, i32 2
  %y.host.at = getelementptr %buffer, ptr %out, i32 0, i32 2
  %x.dims.at = getelementptr %buffer, ptr %x, i32 0, i32 6
  %y.dims.at = getelementptr %buffer, ptr %out, i32 0, i32 6
  %x.host = load ptr, ptr %x.host.at
  %w.host = load ptr, ptr %w.host.at
  %y.host = load ptr, ptr %y.host.at
  %x.dims = load ptr, ptr %x.dims.at
  %y.dims = load ptr, ptr %y.dims.at
  %x.kind.at = getelementptr %buffer, ptr %x, i32 0, i32 4
  %x.kind = load i32, ptr %x.kind.at
  %x.kind.bits = lshr i32 %x.kind, 8
  %x.bits = and i32 %x.kind.bits, 255
  %x.bytes = lshr i32 %x.bits, 3
  %x.none = icmp eq ptr %x.host, null
  br i1 %x.none, label %answer, label %given
answer:
  %channels.bytes = mul i32 %steps.32, %xk.32
  %channels = sdiv i32 %channels.bytes, %x.bytes
  %c.extent.at = getelementptr %dimension, ptr %x.dims, i32 0, i32 1
  store i32 0, ptr %x.dims
  store i32 %channels, ptr %c.extent.at
  %count.at = getelementptr %buffer, ptr %x, i32 0, i32 5
  %count = load i32, ptr %count.at
  br label %same
same:
  %d = phi i32 [ 1, %answer ], [ %d.next, %same ]
  %x.min.to = getelementptr %dimension, ptr %x.dims, i32 %d, i32 0
  %x.extent.to = getelementptr %dimension, ptr %x.dims, i32 %d, i32 1
  %y.min.of = getelementptr %dimension, ptr %y.dims, i32 %d, i32 0
  %y.extent.of = getelementptr %dimension, ptr %y.dims, i32 %d, i32 1
  %asked.min = load i32, ptr %y.min.of
  %asked.extent = load i32, ptr %y.extent.of
  store i32 %asked.min, ptr %x.min.to
  store i32 %asked.extent, ptr %x.extent.to
  %d.next = add i32 %d, 1
  %d.more = icmp slt i32 %d.next, %count
  br i1 %d.more, label %same, label %leave
given:
  %w.none = icmp eq ptr %w.host, null
  %y.none = icmp eq ptr %y.host, null
  %question = or i1 %w.none, %y.none
  br i1 %question, label %leave, label %go
leave:
  ret i32 0
go:
{loads}
  %steps = sext i32 %steps.32 to i64
  %xk = sext i32 %xk.32 to i64
  %x.bytes.64 = zext i32 %x.bytes to i64
  %xs = mul i64 %x.stride, %x.bytes.64
  %ys = mul i64 %p.stride, 4
  %p.from = sub i64 %p.min, %x.min
  %x.skip = mul i64 %p.from, %xs
  %x.first = getelementptr i8, ptr %x.host, i64 %x.skip
  %rows.16 = sdiv i64 %xk, 4
  %wk = mul i64 %rows.16, 64
  %ws = mul i64 %wk, %steps
  %o.first = sdiv i64 %o.min, 16
  %w.skip = mul i64 %o.first, %ws
  %w.first = getelementptr i8, ptr %w.host, i64 %w.skip
  %xk.16 = trunc i64 %xk to i16
  %wrows.8 = trunc i64 %rows.16 to i8
  %config = alloca [64 x i8], align 64
  call void @llvm.memcpy.p0.p0.i64(ptr %config, ptr @sizes, i64 64, i1 false)
{config}
  %p.whole = and i64 %p.extent, -32
  %p.rest = and i64 %p.extent, 31
  %some.whole = icmp sgt i64 %p.whole, 0
  br i1 %some.whole, label %whole, label %rest
whole:
  call void @llvm.x86.ldtilecfg(ptr %config)
  call void @span({whole})
  %some.rest = icmp sgt i64 %p.rest, 0
  br i1 %some.rest, label %rest, label %done
rest:
  %high.least = call i64 @llvm.smin.i64(i64 %p.rest, i64 16)
  %low.least = sub i64 %p.rest, %high.least
  %none.low = icmp eq i64 %low.least, 0
  %low = select i1 %none.low, i64 1, i64 %low.least
  %high.8 = trunc i64 %high.least to i8
  %low.8 = trunc i64 %low to i8
{rows}
  call void @llvm.x86.ldtilecfg(ptr %config)
  %x.more = mul i64 %p.whole, %xs
  %x.rest = getelementptr i8, ptr %x.first, i64 %x.more
  %y.more = mul i64 %p.whole, %ys
  %y.rest = getelementptr i8, ptr %y.host, i64 %y.more
  call void @span({rest})
  br label %done
done:
  call void @llvm.x86.tilerelease()
  ret i32 0
}}
declare i64 @llvm.smin.i64(i64, i64)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1 immarg)
"""
# All outputs of multiples of 32 pixels, or of fewer, which the sizes of the tiles say.
_SPAN = """
define internal void @span(ptr %x.first, i64 %xs, ptr %w.first, i64 %ws, ptr %y.host, i64 %ys,
    i64 %steps, i64 %xk, i64 %wk, i64 %p.extent, i64 %o.extent) #0 {{
  br label %outputs
outputs:
  %o = phi i64 [ 0, %0 ], [ %o.next, %outputs.end ]
  %o.left = sub i64 %o.extent, %o
  %o.two = icmp sge i64 %o.left, 32
  %o.tile = sdiv i64 %o, 16
  %w.at = mul i64 %o.tile, %ws
  %w.here = getelementptr i8, ptr %w.first, i64 %w.at
  %y.at = mul i64 %o, 4
  %y.column = getelementptr i8, ptr %y.host, i64 %y.at
  br label %pixels
pixels:
  %p = phi i64 [ 0, %outputs ], [ %p.next, %pixels.end ]
  %p.left = sub i64 %p.extent, %p
  %p.two = icmp sgt i64 %p.left, 16
  %x.at = mul i64 %p, %xs
  %x.here = getelementptr i8, ptr %x.first, i64 %x.at
  %y.row = mul i64 %p, %ys
  %y.here = getelementptr i8, ptr %y.column, i64 %y.row
  br i1 %p.two, label %two, label %one
two:
  br i1 %o.two, label %call_2_2, label %call_2_1
one:
  br i1 %o.two, label %call_1_2, label %call_1_1
{calls}
pixels.end:
  %p.next = add i64 %p, 32
  %p.more = icmp slt i64 %p.next, %p.extent
  br i1 %p.more, label %pixels, label %outputs.end
outputs.end:
  %o.step = select i1 %o.two, i64 32, i64 16
  %o.next = add i64 %o, %o.step
  %o.more = icmp slt i64 %o.next, %o.extent
  br i1 %o.more, label %outputs, label %end
end:
  ret void
}}
"""
# Of dimension 0 (outputs) and 1 (pixels) of the sums, and of the pixels of x.
_FIELDS = (
    ("o.min", "y", 0, 0), ("o.extent", "y", 0, 1), ("p.min", "y", 1, 0), ("p.extent", "y", 1, 1),
    ("p.stride", "y", 1, 2), ("x.min", "x", 1, 0), ("x.stride", "x", 1, 2),
)  # fmt: skip


def _block(stage: TileProduct, pixels: int, outputs: int) -> str:
    zero, body, store = [], [], []
    for p, o in product(range(pixels), range(outputs)):
        zero.append(f"  call void @llvm.x86.tilezero(i8 {2 * p + o})")
        if o == 0:
            body.append(f"  call void @llvm.x86.tileloadd64(i8 {4 + p}, ptr %x.{p}, i64 %xs)")
        if p == 0:
            body.append(f"  call void @llvm.x86.tileloadd64(i8 {6 + o}, ptr %w.{o}, i64 64)")
        body.append(f"  call void @llvm.x86.{stage.multiply}(i8 {2 * p + o}, i8 {4 + p}, i8 {6 + o})")
        row = "%y1" if p else "%y"
        store.append(f"  %y.{p}.{o} = getelementptr i8, ptr {row}, i64 {ROW_BYTES * o}")
        store.append(f"  call void @llvm.x86.tilestored64(i8 {2 * p + o}, ptr %y.{p}.{o}, i64 %ys)")
    parts = {name: "\n".join(lines) for name, lines in (("zero", zero), ("body", body), ("store", store))}
    return _BLOCK.format(pixels=pixels, outputs=outputs, **parts)


def _code(stage: TileProduct) -> str:
    loads, config, rows, calls = [], [], [], []
    for name, of, dimension, field in _FIELDS:
        loads.append(f"  %{name}.at = getelementptr %dimension, ptr %{of}.dims, i32 {dimension}, i32 {field}")
        loads.append(f"  %{name}.32 = load i32, ptr %{name}.at")
        loads.append(f"  %{name} = sext i32 %{name}.32 to i64")
    for tile in range(8):
        config.append(f"  %rows.{tile} = getelementptr i8, ptr %config, i64 {48 + tile}")
        if tile >= 6:
            config.append(f"  store i8 %wrows.8, ptr %rows.{tile}")
        else:
            rows.append(f"  store i8 {'%high.8' if tile in (0, 1, 4) else '%low.8'}, ptr %rows.{tile}")
    for tile in (4, 5):
        config.append(f"  %bytes.{tile} = getelementptr i8, ptr %config, i64 {16 + 2 * tile}")
        config.append(f"  store i16 %xk.16, ptr %bytes.{tile}")
    given = "ptr %x.{0}, i64 %xs, ptr %w.{1}, i64 %ws, ptr %y.{2}, i64 %ys, i64 %steps, i64 %xk, i64 %wk"
    for p, o in product((1, 2), (1, 2)):
        block = given.format("here", "here", "here")
        calls.append(f"call_{p}_{o}:\n  call void @block_{p}_{o}({block})\n  br label %pixels.end")
    spans = {
        "whole": given.format("first", "first", "host") + ", i64 %p.whole, i64 %o.extent",
        "rest": given.format("rest", "first", "rest") + ", i64 %p.rest, i64 %o.extent",
    }
    parts = {name: "\n".join(lines) for name, lines in (("loads", loads), ("config", config), ("rows", rows))}
    blocks, kind = "".join(_block(stage, p, o) for p, o in product((1, 2), (1, 2))), stage._asdict()
    span = _SPAN.format(calls="\n".join(calls))
    return _HEAD.format(**kind) + blocks + span + _STAGE.format(**kind, **parts, **spans)


def missing(stage: TileProduct = BF16) -> str:
    """Why there are no tiles to compute with, in a sentence; the empty string if there are."""
    return "kernels for another machine use no tiles" if targeted() else _missing(stage)


@lru_cache(maxsize=len(STAGES))
def _missing(stage: TileProduct) -> str:
    """A process must ask Linux for them, once for all its threads."""
    if llvm.missing():
        return llvm.missing()
    if sys.platform != "linux" or machine() != "x86_64":
        return f"tiles of {stage.numbers} (AMX) are used on Linux on x86-64"
    if not llvm.host_has(stage.feature):
        return f"the processor has no tiles of {stage.numbers} (AMX)"
    refused = ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA)
    return "Linux does not let this process use the processor's tiles (AMX)" if refused else ""


@lru_cache(maxsize=len(STAGES))
def define(stage: TileProduct) -> None:
    """Let object code that is loaded from now on call the stage."""
    llvm.define(stage.name, llvm.assemble(_code(stage), stage.name)[0])
