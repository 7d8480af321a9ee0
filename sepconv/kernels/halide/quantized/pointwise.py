"""Pointwise convolution of bytes, or a linear layer: a product with packed weights, and all that follows in one pass.

Only for images whose pixels lie one after the other (channels_last, or rows of a matrix). The number of pixels is not
compiled in where there are enough of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from sepconv.kernels.case import Case, Outline
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import CODES, Buffer
from sepconv.kernels.halide.jit.machine_code import Bound
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.quantized import epilogue, product
from sepconv.kernels.halide.quantized.epilogue import Constants, Ending
from sepconv.kernels.halide.quantized.product import ByteProduct
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.halide.schedule.quantized import blocks_together
from sepconv.kernels.layout import pixel_step


class PointwiseSpec8(NamedTuple):
    """All that the code of one kernel depends on. ``chunk``: blocks of pixels that are multiplied by the same weights
    before the next ones are read."""

    product: ByteProduct
    epilogue: Ending
    chunk: int


class PointwisePlan8(NamedTuple):
    """The kernel for one input; ``share``: groups of pixels for one thread."""

    spec: PointwiseSpec8
    share: int
    pixels: int

    @property
    def variant(self) -> tuple[ByteProduct, Ending]:
        """What packed weights depend on besides their numbers."""
        return self.spec.product, self.spec.epilogue


def build(spec: PointwiseSpec8) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: share, x, packed weights, bias, scale, numbers, [residual]."""
    multiply, share = spec.product, hl.Param(hl.Int(32), "share")
    x, weight, given = _rows("x", "uint8", multiply.terms), product.weight_param(multiply), Constants(multiply.outputs)
    o, p = hl.Var("o"), hl.Var("p")
    rows = x if multiply.in_place else _copied(multiply, x)
    sums, k = product.sums_of(multiply, rows, weight, [o, p], given.bias)
    arguments, residual = [share, x, weight, *given.parameters], None
    if spec.epilogue.residual:
        added = _rows("residual", spec.epilogue.residual, multiply.outputs)
        residual = added[o, p]
        arguments.append(added)
    out = hl.Func("pointwise8")
    whole = product.whole_sums(multiply, sums, [o, p], given.bias)
    out[o, p] = epilogue.finished(spec.epilogue, whole, o, given, residual)

    block, o_in, group, step, p_in = (hl.Var(name) for name in ("block", "o_in", "group", "step", "p_in"))
    ragged = multiply.outputs % multiply.wide
    out.bound(o, 0, multiply.outputs)
    out.split(o, block, o_in, multiply.wide, hl.TailStrategy.GuardWithIf if ragged else hl.TailStrategy.RoundUp)
    out.split(p, step, p_in, multiply.tall, hl.TailStrategy.ShiftInwards)
    out.split(step, group, step, spec.chunk, hl.TailStrategy.GuardWithIf)
    runtime.share(out.reorder(o_in, p_in, step, block, group), group, share)
    out.vectorize(o_in, product.stored_together(multiply, spec.epilogue.out))
    product.arrange(multiply, sums.compute_at(out, step), k, [o, p])
    if rows is not x:
        _schedule_copied(multiply, rows.compute_at(out, group))
    fix_rows(out.output_buffer(), multiply.outputs)
    return out, arguments


def _rows(name: str, kind: str, channels: int) -> Any:
    param = hl.ImageParam(epilogue.halide_type(kind), 2, name)
    fix_rows(param, channels)
    return param


def fix_rows(param: Any, channels: int) -> None:
    """The channels of a pixel lie side by side."""
    param.dim(0).set_min(0).set_extent(channels).set_stride(1)
    param.dim(1).set_min(0)


def _copied(multiply: ByteProduct, x: Any) -> Any:
    """The rows as the product reads them. What is behind them is multiplied by weights that are 0."""
    k, p, lanes = hl.Var("k"), hl.Var("p"), _copied_together(multiply)
    rows, place = hl.Func("rows"), hl.RDom([hl.Range(0, lanes), hl.Range(0, -(-multiply.terms // lanes))], "place")
    # The last part overlaps the one before.
    channel = hl.min(place.y * lanes, multiply.terms - lanes) + place.x
    rows[k, p] = hl.undef(multiply.row_type)
    rows[channel, p] = product.in_row(multiply.row_type, x[channel, p])
    return rows


def _copied_together(multiply: ByteProduct) -> int:
    most = 4 * multiply.lanes // (2 if multiply.way == product.PAIRS else 1)
    return min(most, 1 << (multiply.terms.bit_length() - 1))


def _schedule_copied(multiply: ByteProduct, rows: Any) -> None:
    lane, part = rows.rvars(0)
    rows.bound_extent(rows.args()[0], multiply.whole)
    rows.update().allow_race_conditions().reorder(lane, part, rows.args()[1]).vectorize(lane)


def plan(case: Case) -> PointwisePlan8:
    """The kernel for such tensors."""
    channels = case.x.shape[1]
    return planned(case, product.best(channels, case.x.elements // channels))


def planned(case: Case, way: str) -> PointwisePlan8:
    """The kernel that multiplies in one of ``product.ways()``."""
    channels, outputs = case.x.shape[1], case.weight.shape[0]
    count = case.x.elements // channels
    multiply = product.product(way, channels, outputs, count)
    chunk = 1 if way == product.TILES else blocks_together(machine.host(), multiply.tall * multiply.whole)
    groups = -(-count // (multiply.tall * chunk))
    spec = PointwiseSpec8(multiply, Ending.of(case), chunk)
    return PointwisePlan8(spec, runtime.per_thread(groups, case.threads), count)


def step_of(image: Outline) -> int:
    """Numbers from one pixel to the next; 0 where they do not lie evenly spaced, channels side by side."""
    shape, stride = image.shape, image.stride
    if len(shape) > 4:
        return shape[1] if image.channels_last and Outline.dense(shape, image).stride == stride else 0
    missing = 4 - len(shape)
    return pixel_step((*shape, *(1,) * missing), (*stride, *(1,) * missing))


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    reason = epilogue.unsuitable(case)
    if reason:
        return reason
    images = (case.x, case.result) if case.residual is None else (case.x, case.result, case.residual)
    return "" if all(map(step_of, images)) else "the kernel reads and writes images in channels_last"


def slower(case: Case) -> str:
    """Never: PyTorch computes such layers in float32."""
    return ""


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    spec = plan(case).spec
    return {"layout": "channels_last", **product.describe(spec.product), "chunk": spec.chunk}


def pack(found: PointwisePlan8, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """Copies of weight, bias, scale and numbers as the kernel takes them."""
    given = epilogue.constants(weights)
    multiply, ending = found.spec.product, found.spec.epilogue
    return [product.pack(multiply, given.weight), *epilogue.pack(ending, given, product.less(multiply.way))]


def bind(found: PointwisePlan8, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound:
    """The call that fills ``out`` from what is then in ``x`` and ``residual``: for repeated use of the same memory."""
    images = [x, out] if residual is None else [x, residual, out]
    views = [_view(found, image) for image in images]
    kernel = product.compiled(found.spec.product, ("pointwise8", found.spec), lambda: build(found.spec))
    return kernel.bind(found.share, views[0], *packed, *views[1:])


def _view(found: PointwisePlan8, image: Tensor) -> Buffer:
    step = step_of(Outline.of(image))
    if not step:
        raise ValueError(f"pointwise.bind: an image must be channels_last, got strides {image.stride()}")
    return Buffer((found.pixels, image.shape[1]), (step, 1), image.data_ptr(), CODES[image.dtype], image)


prepare = epilogue.prepare
