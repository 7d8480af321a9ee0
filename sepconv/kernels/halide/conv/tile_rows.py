"""Kernels that make rows of an image ready in the cache and multiply them there on tiles: what they have in common.

A task is a tile of a few output rows of one image. What is multiplied lies in a scratch array, pixel after pixel, each
with all terms of its sums side by side. Image size, rows in a task and batch are not compiled in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from sepconv.kernels.case import Case
from sepconv.kernels.halide import numbers
from sepconv.kernels.halide.conv import tiles
from sepconv.kernels.halide.conv.tiles import Product
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import Buffer
from sepconv.kernels.halide.jit.machine_code import Bound, Chain
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.halide.schedule.tiles import TilesSchedule, TilesShape, in_vectors, tiles_schedule
from sepconv.kernels.layout import pixel_step


class RowsSpec(Protocol):
    """``numbers``: the kind of x; ``hidden``: that of the scratch array; ``parallel``: what threads share out, rows or
    output channels."""

    @property
    def parallel(self) -> str: ...
    @property
    def numbers(self) -> str: ...
    @property
    def hidden(self) -> str: ...
    @property
    def product(self) -> Product: ...


class RowsPlan(NamedTuple):
    """The kernel for one input, and what each call of it computes: (rows per tile, first row, number of tiles).

    ``before``: padding above and to the left; ``share``: tiles, or blocks of output channels, of one thread in each of
    the calls; ``pixels``: in one part of the sums.
    """

    spec: Any
    size: tuple[int, int]
    before: tuple[int, int]
    calls: tuple[tuple[int, int, int], ...]
    share: tuple[int, ...]
    pixels: int

    @property
    def variant(self) -> tuple[Any, ...]:
        """What packed weights depend on besides their numbers."""
        return (*self.spec.product.variant, self.spec.hidden)


def plan(case: Case, terms: int, spec_of: Callable[[TilesSchedule], RowsSpec]) -> RowsPlan:
    """``case``: of the whole convolution; ``terms``: of a sum. ``spec_of`` takes the schedule of the product."""
    last = case.then or case
    images, channels, _, columns_in = case.x.shape
    (height, width), (top, left) = case.y.shape[2:], [low for low, _ in case.geometry.padding]
    under = case.x.dtype.itemsize * channels * columns_in * case.geometry.stride[0]
    shape = TilesShape(
        max(images, 1), height, width, 2 * terms * width + under, 2 * last.weight.elements, last.weight.shape[0],
        tiles.together(last),
    )  # fmt: skip
    found = tiles_schedule(machine.host(), shape, case.threads)
    count, rest = divmod(height, found.rows)
    calls = [(found.rows, 0, count)] + [(rest, count * found.rows, 1)] * (rest > 0)
    if tiles.unit() != "AMX":
        fewest = min(rows * width for rows, _, _ in calls)
        found = in_vectors(found, last.weight.shape[0], tiles.together(last), min(fewest, found.pixels))
    blocks = -(-last.weight.shape[0] // found.wide)
    passes = [images * tasks if found.parallel == "rows" else blocks for _, _, tasks in calls]
    share = tuple(runtime.per_thread(count, case.threads) for count in passes)
    return RowsPlan(spec_of(found), (height, width), (top, left), tuple(calls), share, found.pixels)


class Walk:
    """The numbers that a kernel takes, in this order, the image, and where it lies in the padded one."""

    def __init__(self, kind: str, channels: int) -> None:
        names = ("width", "rows", "first_row", "share", "pixels", "top", "left")
        self.width, self.rows, self.first_row, self.share, self.pixels, self.top, self.left = self.numbers = [
            hl.Param(hl.Int(32), name) for name in names
        ]
        self.x = hl.ImageParam(numbers.halide_type(kind), 4, "x")  # channel, column, row, image
        tiles.rows(self.x, channels // numbers.parts(kind))
        self.o, self.q, self.t, self.n = (hl.Var(name) for name in ("o", "q", "t", "n"))

    def row(self, row_in: Any) -> Any:
        """The output row of a row of the tile."""
        return self.first_row + self.t * self.rows + row_in


def finish(spec: RowsSpec, walk: Walk, hidden: Any) -> tuple[Any, list[Any]]:
    """The product of what is in ``hidden[k, q, t, n]``, where q numbers the pixels of a tile; scheduled, but for the
    updates of ``hidden``. Returns the result and the arguments behind x and what the scratch array is made with."""
    out, sums, parameters = tiles.build(spec.product, hidden, [walk.o, walk.q, walk.t, walk.n])
    inner, block, part = tiles.schedule(spec.product, out, sums, walk.pixels)
    if spec.parallel == "channels":
        task = walk.t
        runtime.share(out.reorder(*inner, part, block, walk.t, walk.n), block, walk.share)
        out.never_partition([walk.t, walk.n, part, block, *inner[1:]])
    else:
        task = hl.Var("task")
        out.reorder(*inner, block, part, walk.t, walk.n).fuse(walk.t, walk.n, task)
        runtime.share(out.never_partition([task, part, block, *inner[1:]]), task, walk.share)
    hidden.compute_at(out, task).bound_extent(hidden.args()[0], spec.product.whole // numbers.parts(spec.hidden))
    return out, parameters


def fill_in_parallel(spec: RowsSpec, fill: Any, row: Any) -> None:
    """Where threads share out output channels, they make the scratch array together: a row each."""
    if spec.parallel == "channels":
        runtime.parallel(fill, row)


def zeros_behind(spec: RowsSpec, hidden: Any) -> None:
    """Terms that fill the last step up."""
    parts = numbers.parts(spec.hidden)
    terms, whole = (-(-count // parts) for count in (spec.product.terms, spec.product.whole))
    if whole > terms:
        behind, (_, *place) = hl.RDom([hl.Range(0, whole - terms)], "behind"), hidden.args()
        hidden[[terms + behind.x, *place]] = numbers.zero(spec.hidden)
        hidden.update(hidden.num_update_definitions() - 1).unscheduled()


def bind(
    name: str,
    build: Callable[[Any], tuple[Any, list[Any]]],
    found: RowsPlan,
    tensors: tuple[Tensor, Tensor | None, Tensor],
    packed: list[Buffer],
) -> Bound | Chain:
    """The call that fills the last of ``tensors`` from x, the first, and the residual: of a kernel ``name``."""
    x, residual, out = tensors
    spec = found.spec
    tiles.check(f"{name}.bind", out, *([] if residual is None else [residual]))
    images = [(out, spec.product.numbers)]
    if residual is not None:
        images.insert(0, (residual, spec.product.residual))
    kernel = runtime.compiled((name, spec), lambda: build(spec))
    calls = []
    for call, share in zip(found.calls, found.share, strict=True):
        rows, first, _ = call
        views = [_tiles(image, kind, call) for image, kind in images]
        pixels = min(found.pixels, rows * found.size[1])
        walk = (found.size[1], rows, first, share, pixels, *found.before)
        calls.append(kernel.bind(*walk, tiles.pixels(x, spec.numbers), *packed, *views))
    return calls[0] if len(calls) == 1 else Chain(calls)


def _tiles(image: Tensor, kind: str, call: tuple[int, int, int]) -> Buffer:
    """(N, O, Ho, Wo) from a row on as (N, tile, pixel in tile, O)."""
    images, channels, height, width = image.shape
    (rows, first, count), step = call, pixel_step(image.shape, image.stride())
    row = width * step
    return tiles.view(
        image, kind, (images, count, rows * width, channels), (height * row, rows * row, step, 1), first * row
    )
