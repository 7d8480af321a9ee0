"""What images give under filters: the forward pass, and the gradient of the input.

A tile is places x channels; every place is some rows of one column. All loads have the shape of a tile, also those of
filters, so that what a thread needs is in that thread: in channels_last no shared memory and no barrier. Sums are in
float32. Constants of a program are in capitals; what depends on them alone leaves no trace in it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sepconv.kernels.triton.compiled.curves import apply
from sepconv.kernels.triton.compiled.rows import met, reads


@triton.jit
def _start(phase, STRIDE: tl.constexpr, LOW: tl.constexpr, DILATION: tl.constexpr, SKIP: tl.constexpr):
    """Of a gradient of the input: the first tap that meets pixels ``phase + STRIDE * q``, and what it reads for q = 0.

    Where no tap meets them the first is far beyond all that there are.
    """
    first = phase * 0 + 1024
    for k in tl.static_range(SKIP - 1, -1, -1):
        first = tl.where((phase + LOW + DILATION * STRIDE - k * DILATION) % STRIDE == 0, k, first)
    base = (phase + LOW + 1024 * DILATION * STRIDE - first * DILATION) // STRIDE - 1024 * DILATION
    return first, base


@triton.jit
def _column(sums, source, filters, at, row_tap, j, FORM: tl.constexpr, ROWS: tl.constexpr):
    """One column of taps, ``ROWS`` of them from ``row_tap`` on."""
    DEEP: tl.constexpr = FORM.tile.deep
    STEP: tl.constexpr = 1 if FORM.transposed else FORM.stride[1]
    KH: tl.constexpr = FORM.kernel[1]
    KW: tl.constexpr = FORM.kernel[2]
    SKIP: tl.constexpr = FORM.skip
    ADVANCE: tl.constexpr = FORM.advance
    UNIT: tl.constexpr = FORM.unit
    BY_PHASES: tl.constexpr = FORM.transposed and FORM.stride[1] > 1
    READS: tl.constexpr = reads(DEEP, STEP, ROWS, ADVANCE[1])
    image, view, row, column, inside = source
    weight, of_tap, there = filters
    first_row, first_column = at

    kw = first_column + j * SKIP[2]
    taps = ()
    for i in tl.static_range(ROWS):
        kh = first_row + (row_tap + i) * SKIP[1]
        # All taps are there but for phases that some of them do not meet.
        known = there & (kh < KH) & (kw < KW)
        taps = taps + (tl.load(weight + (kh * KW + kw) * of_tap, known, 0.0).to(tl.float32),)
    x = column + j * ADVANCE[2]
    inside = inside & (x >= 0) & (x < view.columns) & (kw < KW)
    start = image + x * (view.of_column // UNIT * UNIT)
    of_row = view.of_row // UNIT * UNIT
    for n in tl.static_range(len(READS)):
        y = row + row_tap * ADVANCE[1] + READS[n]
        pixels = tl.load(start + y * of_row, inside & (y >= 0) & (y < view.rows), 0.0)
        pixels = pixels.to(tl.float32)
        added = ()
        for r in tl.static_range(DEEP):
            if met(r, READS[n], STEP, ROWS, ADVANCE[1]) >= 0:
                value = pixels
                if BY_PHASES:
                    # Zero times what is no number would be none.
                    row_of_taps = row_tap + met(r, READS[n], STEP, ROWS, ADVANCE[1])
                    value = tl.where(first_row + row_of_taps * SKIP[1] < KH, pixels, 0.0)
                added = added + (sums[r] + value * taps[met(r, READS[n], STEP, ROWS, ADVANCE[1])],)
            else:
                added = added + (sums[r],)
        sums = added
    return sums


@triton.jit
def _rows(sums, source, filters, at, row_tap, FORM: tl.constexpr, ROWS: tl.constexpr):
    """``ROWS`` rows of taps, from ``row_tap`` on."""
    SKIP: tl.constexpr = FORM.skip
    COLUMNS: tl.constexpr = (FORM.kernel[2] + SKIP[2] - 1) // SKIP[2]
    if FORM.taps.columns >= COLUMNS:
        for j in tl.static_range(COLUMNS):
            sums = _column(sums, source, filters, at, row_tap, j, FORM, ROWS)
    else:
        for j in range(COLUMNS):
            sums = _column(sums, source, filters, at, row_tap, j, FORM, ROWS)
    return sums


@triton.jit
def _plane(sums, source, filters, at, FORM: tl.constexpr):
    """All taps of one depth."""
    SKIP: tl.constexpr = FORM.skip
    ROWS: tl.constexpr = (FORM.kernel[1] + SKIP[1] - 1) // SKIP[1]
    AT_ONCE: tl.constexpr = FORM.taps.rows if FORM.taps.rows < ROWS else ROWS
    WHOLE: tl.constexpr = ROWS // AT_ONCE
    if WHOLE == 1:
        sums = _rows(sums, source, filters, at, 0, FORM, AT_ONCE)
    else:
        for i in range(WHOLE):
            sums = _rows(sums, source, filters, at, i * AT_ONCE, FORM, AT_ONCE)
    if ROWS % AT_ONCE > 0:
        sums = _rows(sums, source, filters, at, WHOLE * AT_ONCE, FORM, ROWS % AT_ONCE)
    return sums


@triton.jit
def gather(image, weight, bias, out, read, written, steps, FORM: tl.constexpr):
    """What images give under filters: one program per tile of the result.

    ``read`` and ``written``: the views of ``image`` and ``out``; ``steps``: of the filters.
    """
    CHANNELS: tl.constexpr = FORM.tile.channels
    PLACES: tl.constexpr = FORM.tile.places
    ACROSS: tl.constexpr = FORM.tile.columns
    DEEP: tl.constexpr = FORM.tile.deep
    M: tl.constexpr = FORM.multiplier
    ACTIVATION: tl.constexpr = FORM.activation
    FIRST: tl.constexpr = FORM.parameters[0]
    SECOND: tl.constexpr = FORM.parameters[1]
    UNIT: tl.constexpr = FORM.unit
    SKIP: tl.constexpr = FORM.skip
    ADVANCE: tl.constexpr = FORM.advance
    PD: tl.constexpr = FORM.stride[0] if FORM.transposed else 1
    PH: tl.constexpr = FORM.stride[1] if FORM.transposed else 1
    PW: tl.constexpr = FORM.stride[2] if FORM.transposed else 1

    # Channels come first, then phases: programs side by side write to memory side by side.
    program = tl.program_id(0)
    blocks = tl.cdiv(written.channels, CHANNELS)
    block = program % blocks
    program = program // blocks
    phase_w = program % PW
    program = program // PW
    phase_h = program % PH
    program = program // PH
    phase_d = program % PD
    program = program // PD
    across = tl.cdiv(tl.cdiv(written.columns, PW), ACROSS)
    tile_w = program % across
    program = program // across
    down = tl.cdiv(tl.cdiv(written.rows, PH), PLACES // ACROSS * DEEP)
    tile_h = program % down
    program = program // down
    deep = tl.cdiv(written.depth, PD)
    plane = program % deep
    picture = program // deep
    if FORM.wide:
        plane = plane.to(tl.int64)
        picture = picture.to(tl.int64)

    # What lies side by side is the last dimension: the compiler takes that for numbers of which it does not know, taps,
    # and would bring them into the order of the pixels through shared memory.
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    place = tl.arange(0, PLACES)
    if FORM.pixelwise:
        c = c[None, :]
        place = place[:, None]
    else:
        c = c[:, None]
        place = place[None, :]
    if FORM.wide:
        c = c.to(tl.int64)
        place = place.to(tl.int64)
    row = (tile_h * (PLACES // ACROSS) + place // ACROSS) * DEEP
    column = tile_w * ACROSS + place % ACROSS

    if FORM.transposed:
        first_d, base_d = _start(phase_d, PD, FORM.low[0], FORM.dilation[0], SKIP[0])
        first_h, base_h = _start(phase_h, PH, FORM.low[1], FORM.dilation[1], SKIP[1])
        first_w, base_w = _start(phase_w, PW, FORM.low[2], FORM.dilation[2], SKIP[2])
        step_d, step_h, step_w = 1, 1, 1
    else:
        first_d, first_h, first_w = 0, 0, 0
        base_d, base_h, base_w = -FORM.low[0], -FORM.low[1], -FORM.low[2]
        step_d, step_h, step_w = FORM.stride[0], FORM.stride[1], FORM.stride[2]

    channels = written.channels // UNIT * UNIT
    view = read
    near = (c < channels) & (place >= 0)
    nowhere = place * 0 + c * 0
    of_tap = steps.of_tap // UNIT * UNIT
    sums = ()
    for _ in tl.static_range(DEEP):
        sums = sums + (nowhere.to(tl.float32),)

    for m in range(M if FORM.transposed else 1):
        # Of a gradient each channel reads from M, else M filters read from one.
        f = c * M + m if FORM.transposed else c
        of = f if FORM.transposed else c // M
        start = image + picture * (read.of_image // UNIT * UNIT) + of * read.of_channel
        for kd in range(steps.planes):
            z = plane * step_d + base_d + kd * ADVANCE[0]
            tap_d = first_d + kd * SKIP[0]
            known = (z >= 0) & (z < read.depth) & (tap_d < FORM.kernel[0])
            source = (
                start + z * (read.of_depth // UNIT * UNIT),
                view,
                row * step_h + base_h,
                column * step_w + base_w,
                near & known,
            )
            filters = (
                weight + nowhere + f * steps.of_filter + tap_d * (FORM.kernel[1] * FORM.kernel[2]) * of_tap,
                of_tap,
                near & known,
            )
            sums = _plane(sums, source, filters, (first_h, first_w), FORM)

    added = 0.0
    if FORM.has_bias:
        added = tl.load(bias + nowhere + c, near, 0.0).to(tl.float32)
    to = out + picture * (written.of_image // UNIT * UNIT) + c * written.of_channel
    to = to + (phase_d + plane * PD) * (written.of_depth // UNIT * UNIT)
    x = phase_w + column * PW
    for r in tl.static_range(DEEP):
        y = phase_h + (row + r) * PH
        value = apply(sums[r] + added, ACTIVATION, FIRST, SECOND)
        there = near & (y < written.rows) & (x < written.columns) & (phase_d + plane * PD < written.depth)
        place_of = y * (written.of_row // UNIT * UNIT) + x * (written.of_column // UNIT * UNIT)
        tl.store(to + place_of, value.to(out.dtype.element_ty), there)
