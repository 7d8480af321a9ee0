"""From a case to what is launched: views, the specialization of a program, and how many programs there are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod

from sepconv.activations import ACTIVATIONS
from sepconv.kernels.case import Case, Outline
from sepconv.kernels.triton import tiles
from sepconv.kernels.triton.forms import FilterSteps, Schedule, Shares, Specialization, Triple, View
from sepconv.kernels.triton.tiles import Extent

MOST = 2**31 - 1
"""Programs of a launch, tiles, and numbers up to which an offset has 32 bits."""
BYTES_AT_ONCE = 16
_MOST_SHARES = 1024


def triple(values: tuple[int, ...], missing: int) -> Triple:
    """One value for depth, rows and columns each; ``missing`` for those that a tensor lacks."""
    full = (missing,) * (3 - len(values)) + tuple(values)
    return full[0], full[1], full[2]


def view(image: Outline) -> View:
    """Steps along a size of 1 say nothing, and are none here."""
    steps = tuple(step if size > 1 else 0 for size, step in zip(image.shape, image.stride, strict=True))
    # A single channel lies beside itself.
    beside = steps[1] if image.shape[1] > 1 else 1
    return View(image.shape[1], *triple(image.shape[2:], 1), steps[0], beside, *triple(steps[2:], 0))


def _span(image: Outline) -> int:
    return sum((size - 1) * step for size, step in zip(image.shape, image.stride, strict=True))


def _unit(views: tuple[View, View], itemsize: int) -> int:
    """So many channels lie side by side at a place that a multiple of their size divides, in both."""
    if any(v.of_channel != 1 for v in views):
        return 1
    steps = [s for v in views for s in (v.channels, v.of_image, v.of_depth, v.of_row, v.of_column)]
    return gcd(BYTES_AT_ONCE // itemsize, *steps)


def reads_together(case: Case) -> bool:
    """Whether several numbers are read at once."""
    return _unit((view(case.x), view(case.y)), case.x.dtype.itemsize) > 1


def pixelwise(case: Case) -> bool:
    """Whether the channels of a pixel lie side by side in what is written, or of a gradient of filters in both read."""
    if case.which == "grad_weight":
        return view(case.y).of_channel == view(case.x).of_channel == 1 and case.x.shape[1] > 1
    return view(case.result).of_channel == 1 and case.result.shape[1] > 1


@lru_cache(maxsize=1024)
def schedules(case: Case) -> tuple[Schedule, ...]:
    """What is tried, the likeliest first."""
    # A gradient of the input is written phase by phase of the stride.
    phases = triple(case.geometry.stride if case.which == "grad_input" else (1,) * case.x.dims, 1)
    over = view(case.y if case.which == "grad_weight" else case.result)
    kernel = triple(case.kernel_size, 1)
    vector = BYTES_AT_ONCE // case.x.dtype.itemsize if pixelwise(case) else 0
    if case.weight.shape[0] > case.x.shape[1]:
        # Each channel of several filters is read by itself, and its address takes as much room as what it holds.
        vector = -(-vector // 4)
    rows, columns = -(-over.rows // phases[1]), -(-over.columns // phases[2])
    extent = Extent(over.channels, rows, columns, kernel[1], kernel[2], vector)
    make = tiles.of_filters if case.which == "grad_weight" else tiles.gathering
    return tuple(make(extent, tiles.gpu(case.x.device).lanes))


def specialization(case: Case, schedule: Schedule) -> Specialization:
    geometry, transposed = case.geometry, case.which == "grad_input"
    stride, dilation = triple(geometry.stride, 1), triple(geometry.dilation, 1)
    low = triple(tuple(first for first, _ in geometry.padding), 0)
    skip, advance = (1, 1, 1), dilation
    if transposed:
        common = [gcd(s, d) for s, d in zip(stride, dilation, strict=True)]
        skip = triple(tuple(s // n for s, n in zip(stride, common, strict=True)), 1)
        advance = triple(tuple(-d // n for d, n in zip(dilation, common, strict=True)), 1)
    both = view(case.x), view(case.y)
    return Specialization(
        triple(case.kernel_size, 1), stride, low, dilation, case.weight.shape[0] // case.x.shape[1], transposed,
        skip, advance, *_activation(case.activation), case.bias is not None,
        pixelwise(case), _unit(both, case.x.dtype.itemsize), max(_span(case.x), _span(case.y)) > MOST, *schedule,
    )  # fmt: skip


def _activation(name: str) -> tuple[str, tuple[float, float]]:
    """The family of an activation, and its parameters where it has some."""
    given: tuple[float, ...] = getattr(ACTIVATIONS[name].expression, "args", ())
    first, second, *_ = (*given, 0.0, 0.0)
    return name.partition("(")[0], (first, second)


@dataclass(frozen=True)
class Launch:
    """One program for a case.

    Attributes:
        read, written: the views of what is gathered from and to; of a gradient of filters those of grad_output and x.
        programs: so many run.
        shares: of a gradient of filters.
    """

    form: Specialization
    read: View
    written: View
    programs: int
    shares: Shares | None = None

    @property
    def steps(self) -> FilterSteps:
        """Where channels lie side by side, so do filters: a copy of them, tap by tap."""
        planes = -(-self.form.kernel[0] // self.form.skip[0])
        if self.written.of_channel == 1:
            return FilterSteps(1, self.filters, planes)
        return FilterSteps(prod(self.form.kernel), 1, planes)

    @property
    def tiles(self) -> int:
        """So many are computed, or of a gradient of filters walked over."""
        return self.programs if self.shares is None else max(self.programs, self.shares.shares * self.shares.tiles)

    @property
    def filters(self) -> int:
        return self.written.channels * (self.form.multiplier if self.form.transposed else 1)


def launch(case: Case, schedule: Schedule) -> Launch:
    form = specialization(case, schedule)
    tile, images = form.tile, case.x.shape[0]
    if case.which == "grad_weight":
        return _filter_gradient(case, form)
    read, written = (case.y, case.x) if form.transposed else (case.x, case.y)
    to = view(written)
    phases = form.stride if form.transposed else (1, 1, 1)
    sizes = [-(-size // phase) for size, phase in zip((to.depth, to.rows, to.columns), phases, strict=True)]
    down, across = tile.places // tile.columns * tile.deep, tile.columns
    tiled = sizes[0] * -(-sizes[1] // down) * -(-sizes[2] // across)
    return Launch(form, view(read), to, images * prod(phases) * tiled * -(-to.channels // tile.channels))


def _filter_gradient(case: Case, form: Specialization) -> Launch:
    tile, given = form.tile, view(case.y)
    down = -(-given.rows // (tile.places // tile.columns * tile.deep))
    tiled = case.x.shape[0] * given.depth * down * -(-given.columns // tile.columns)
    groups = form.kernel[0] * -(-form.kernel[1] // form.taps.rows) * -(-form.kernel[2] // form.taps.columns)
    alone = groups * -(-given.channels // tile.channels)
    wanted = min(_MOST_SHARES, max(1, 8 * tiles.gpu(case.x.device).processors // alone), tiled)
    each = -(-tiled // wanted)
    shares = -(-tiled // each)
    return Launch(form, given, view(case.x), alone * shares, Shares(case.x.shape[0], shares, each))
