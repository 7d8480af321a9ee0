"""The gradient of filters: shares of the images, each walked over once for some taps, then the sum over the shares.

Threads keep the sums of their places in registers, in float32; only at the end of a share are they added up. The order
is always the same, and so are the numbers. Constants of a program are in capitals.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sepconv.kernels.triton.compiled.rows import met, reads


@triton.jit
def _products(sums, given, image, view, near, place, FORM: tl.constexpr):
    """Add the products of some rows of ``given`` with what their taps read.

    place: the first row and column that are read, and per place whether there is anything.
    """
    DEEP: tl.constexpr = FORM.tile.deep
    ROWS: tl.constexpr = FORM.taps.rows
    COLUMNS: tl.constexpr = FORM.taps.columns
    STEP: tl.constexpr = FORM.stride[1]
    UNIT: tl.constexpr = FORM.unit
    READS: tl.constexpr = reads(DEEP, STEP, ROWS, FORM.dilation[1])
    row, column = place
    of_row = view.of_row // UNIT * UNIT
    for j in tl.static_range(COLUMNS):
        x = column + j * FORM.dilation[2]
        inside = near & (x >= 0) & (x < view.columns)
        start = image + x * (view.of_column // UNIT * UNIT)
        for n in tl.static_range(len(READS)):
            y = row + READS[n]
            pixels = tl.load(start + y * of_row, inside & (y >= 0) & (y < view.rows), 0.0)
            pixels = pixels.to(tl.float32)
            added = ()
            for s in tl.static_range(ROWS * COLUMNS):
                value = sums[s]
                for r in tl.static_range(DEEP):
                    if s % COLUMNS == j and met(r, READS[n], STEP, ROWS, FORM.dilation[1]) == s // COLUMNS:
                        value = value + pixels * given[r]
                added = added + (value,)
            sums = added
    return sums


@triton.jit
def filter_gradient(grad, image, partial, given, read, work, FORM: tl.constexpr):
    """The gradient of some taps of some filters over a share of the images: to (share, tap, filter) of ``partial``.

    ``given`` and ``read``: the views of ``grad`` and ``image``.
    """
    CHANNELS: tl.constexpr = FORM.tile.channels
    PLACES: tl.constexpr = FORM.tile.places
    ACROSS: tl.constexpr = FORM.tile.columns
    DEEP: tl.constexpr = FORM.tile.deep
    M: tl.constexpr = FORM.multiplier
    UNIT: tl.constexpr = FORM.unit
    ROWS: tl.constexpr = FORM.taps.rows
    COLUMNS: tl.constexpr = FORM.taps.columns
    KH: tl.constexpr = FORM.kernel[1]
    KW: tl.constexpr = FORM.kernel[2]
    GROUPS_H: tl.constexpr = (KH + ROWS - 1) // ROWS
    GROUPS_W: tl.constexpr = (KW + COLUMNS - 1) // COLUMNS

    program = tl.program_id(0)
    blocks = tl.cdiv(given.channels, CHANNELS)
    block = program % blocks
    program = program // blocks
    kw = program % GROUPS_W * COLUMNS
    program = program // GROUPS_W
    kh = program % GROUPS_H * ROWS
    program = program // GROUPS_H
    kd = program % FORM.kernel[0]
    share = program // FORM.kernel[0]

    f = block * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    place = tl.arange(0, PLACES)[:, None]
    if FORM.wide:
        f = f.to(tl.int64)
        place = place.to(tl.int64)
    channels = given.channels // UNIT * UNIT
    view = read
    across = tl.cdiv(given.columns, ACROSS)
    down = tl.cdiv(given.rows, PLACES // ACROSS * DEEP)
    sums = ()
    for _ in tl.static_range(ROWS * COLUMNS):
        sums = sums + (tl.zeros([PLACES, CHANNELS], tl.float32),)

    last = tl.minimum((share + 1) * work.tiles, work.images * given.depth * down * across)
    for tile in range(share * work.tiles, last):
        column = tile % across * ACROSS + place % ACROSS
        rest = tile // across
        row = (rest % down * (PLACES // ACROSS) + place // ACROSS) * DEEP
        rest = rest // down
        plane = rest % given.depth
        picture = rest // given.depth
        if FORM.wide:
            plane = plane.to(tl.int64)
            picture = picture.to(tl.int64)
        z = plane * FORM.stride[0] - FORM.low[0] + kd * FORM.dilation[0]
        # Rows that one place has are all there or none: what is read for one of them is not masked for another.
        near = (f < channels) & (row < given.rows) & (column < given.columns) & (z >= 0) & (z < read.depth)
        source = grad + picture * (given.of_image // UNIT * UNIT) + plane * (given.of_depth // UNIT * UNIT)
        source = source + f * given.of_channel + column * (given.of_column // UNIT * UNIT)
        rows = ()
        for r in tl.static_range(DEEP):
            value = tl.load(source + (row + r) * (given.of_row // UNIT * UNIT), near, 0.0)
            rows = rows + (value.to(tl.float32),)
        start = image + picture * (read.of_image // UNIT * UNIT) + z * (read.of_depth // UNIT * UNIT)
        start = start + f // M * read.of_channel
        first = (
            row * FORM.stride[1] - FORM.low[1] + kh * FORM.dilation[1],
            column * FORM.stride[2] - FORM.low[2] + kw * FORM.dilation[2],
        )
        sums = _products(sums, rows, start, view, near, first, FORM)

    filters = block * CHANNELS + tl.arange(0, CHANNELS)
    for s in tl.static_range(ROWS * COLUMNS):
        row_tap = kh + s // COLUMNS
        column_tap = kw + s % COLUMNS
        tap = (kd * KH + row_tap) * KW + column_tap
        place_of = (share * FORM.kernel[0] * KH * KW + tap).to(tl.int64) * given.channels + filters
        kept = (filters < given.channels) & (row_tap < KH) & (column_tap < KW)
        tl.store(partial + place_of, tl.sum(sums[s], axis=0), kept)


@triton.jit
def add_shares(partial, out, shares, filters, taps, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr):
    """The sum over the shares: (share, tap, filter) -> (filter, tap).

    Few programs have much to add: ``AT_ONCE`` shares are read before any of them is waited for.
    """
    tap = tl.program_id(0) % taps
    f = tl.program_id(0) // taps * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([AT_ONCE, BLOCK], tl.float32)
    for first in range(0, shares, AT_ONCE):
        share = first + tl.arange(0, AT_ONCE)[:, None]
        place = (share * taps + tap).to(tl.int64) * filters + f[None, :]
        total += tl.load(partial + place, (share < shares) & (f < filters)[None, :], 0.0)
    value = tl.sum(total, axis=0).to(out.dtype.element_ty)
    tl.store(out + f.to(tl.int64) * taps + tap, value, f < filters)
