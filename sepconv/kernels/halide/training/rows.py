"""Passes over an image as rows of channels, pixel after pixel: norms and activations on the way into a product and
back, and the sums that norms need.

Each reads every number once; vectors lie along the channels. What is summed over pixels is summed in parts of so many
pixels, which sizes alone decide: sums do not depend on threads. Sums of squares are taken around a number of the part
itself, so that nothing cancels however far the mean is from 0, and parts are merged by Chan's formula.

Reference: Chan, Golub, LeVeque, "Algorithms for computing the sample variance" (1983).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sepconv.activations import ACTIVATIONS
from sepconv.kernels.halide import numbers
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.training.slopes import backward

PART = 128
"""Pixels in one part of a sum."""
TOGETHER = 4
"""Pixels for which the vectors of the channels are read once; no image may have fewer."""


class PassSpec(NamedTuple):
    """All that the code of one pass depends on.

    ``what``: a key of ``PASSES``; ``vectors``: of so many ``lanes`` are sums kept in registers.
    """

    what: str
    numbers: str
    activation: str
    lanes: int
    vectors: int = 1


def build(spec: PassSpec) -> tuple[Any, list[Any]]:
    """The pipeline; its arguments are those that ``PASSES`` names, the result last."""
    return _BUILD[spec.what](spec)


PASSES = {
    "normalise": ("share", "x", "mean", "scale", "bias", "h"),
    "deviate": ("y_share", "grad", "y", "y_mean", "offset", "slope", "dz"),
    "gradient": ("share", "dh", "x", "mean", "scale", "bias", "grad_x"),
    "sums": ("parts_share", "dh", "x", "mean", "scale", "bias", "parts"),
    "moments": ("parts_share", "y", "parts"),
    "total": ("all_parts", "result"),
    "merge": ("pixels", "all_parts", "result"),
}
"""What each is called with. "normalise" makes h = act((x - mean) * scale + bias), "deviate" dz = grad + offset + slope
* (y - mean), "gradient" that of x from that of h; "sums" and "moments" write two numbers a channel for each part:
sum of g, sum of g * (x - mean); mean, sum of squares around it. "total" adds parts up, "merge" makes mean and biased
variance of them."""


def _image(spec: PassSpec, name: str) -> Any:
    param = hl.ImageParam(numbers.halide_type(spec.numbers), 2, name)
    _side_by_side(param)
    return param


def _side_by_side(param: Any) -> None:
    for d in range(param.dimensions()):
        param.dim(d).set_min(0)
    param.dim(0).set_stride(1)


def _vectors(*names: str) -> list[Any]:
    params = [hl.ImageParam(hl.Float(32), 1, name) for name in names]
    for param in params:
        _side_by_side(param)
    return params


def _share(name: str = "share") -> Any:
    return hl.Param(hl.Int(32), name)


class _Norm:
    """x and its prologue."""

    def __init__(self, spec: PassSpec) -> None:
        self.spec, self.x, self.vectors = spec, _image(spec, "x"), _vectors("mean", "scale", "bias")

    def deviation(self, c: Any, p: Any) -> Any:
        return numbers.read(self.spec.numbers, self.x[c, p]) - self.vectors[0][c]

    def argument(self, c: Any, p: Any) -> Any:
        """Of the activation."""
        return self.deviation(c, p) * self.vectors[1][c] + self.vectors[2][c]

    def backward(self, grad: Any, c: Any, p: Any) -> Any:
        """The gradient of the argument, from that of h."""
        return backward(self.spec.activation, numbers.read(self.spec.numbers, grad[c, p]), self.argument(c, p))


def _normalise(spec: PassSpec) -> tuple[Any, list[Any]]:
    share, norm, (c, p) = _share(), _Norm(spec), hl.vars("c p")
    out = hl.Func("normalise")
    value = ACTIVATIONS[spec.activation].expression(hl, norm.argument(c, p))
    out[c, p] = numbers.write(spec.numbers, value, quiet=True)
    _schedule_numbers(spec, out, c, p, share)
    return out, [share, norm.x, *norm.vectors]


def _deviate(spec: PassSpec) -> tuple[Any, list[Any]]:
    share, grad, y, (c, p) = _share(), _image(spec, "grad"), _image(spec, "y"), hl.vars("c p")
    mean, offset, factor = _vectors("y_mean", "offset", "slope")
    out, kind = hl.Func("deviate"), spec.numbers
    moved = (numbers.read(kind, y[c, p]) - mean[c]) * factor[c] + offset[c]
    out[c, p] = numbers.write(kind, moved + numbers.read(kind, grad[c, p]), quiet=True)
    _schedule_numbers(spec, out, c, p, share)
    return out, [share, grad, y, mean, offset, factor]


def _gradient(spec: PassSpec) -> tuple[Any, list[Any]]:
    share, grad, norm, (c, p) = _share(), _image(spec, "dh"), _Norm(spec), hl.vars("c p")
    out = hl.Func("gradient")
    value = norm.backward(grad, c, p) * norm.vectors[1][c]
    out[c, p] = numbers.write(spec.numbers, value, quiet=True)
    _schedule_numbers(spec, out, c, p, share)
    return out, [share, grad, norm.x, *norm.vectors]


def _schedule_numbers(spec: PassSpec, out: Any, c: Any, p: Any, share: Any) -> None:
    """Some pixels together, for which the vectors of the channels stay in registers."""
    step, inner = hl.Var("step"), hl.Var("inner")
    out.split(p, step, inner, TOGETHER, hl.TailStrategy.ShiftInwards).reorder(inner, c, step).unroll(inner)
    out.vectorize(c, spec.lanes, hl.TailStrategy.ShiftInwards)
    runtime.share(out, step, share)
    _side_by_side(out.output_buffer())


def _part(image: Any, t: Any) -> tuple[Any, Any, Any]:
    """The pixels of part ``t``: how many, over which a sum goes, and the pixel of each."""
    pixels = image.dim(1).extent()
    r = hl.RDom([hl.Range(0, PART)], "r")
    pixel = t * PART + r.x
    r.where(pixel < pixels)
    return hl.min(PART, pixels - t * PART), r, hl.unsafe_promise_clamped(pixel, 0, pixels - 1)


def _sums(spec: PassSpec) -> tuple[Any, list[Any]]:
    share, grad, norm, (c, t) = _share("parts_share"), _image(spec, "dh"), _Norm(spec), hl.vars("c t")
    _, _, pixel = _part(norm.x, t)
    sums = hl.Func("sums")
    g = norm.backward(grad, c, pixel)
    sums[c, t] = (hl.f32(0.0), hl.f32(0.0))
    sums[c, t] = (sums[c, t][0] + g, sums[c, t][1] + g * norm.deviation(c, pixel))
    out = _two_rows(spec, sums, (sums[c, t][0], sums[c, t][1]), c, t, share)
    return out, [share, grad, norm.x, *norm.vectors]


def _moments(spec: PassSpec) -> tuple[Any, list[Any]]:
    share, y, (c, t) = _share("parts_share"), _image(spec, "y"), hl.vars("c t")
    count, _, pixel = _part(y, t)
    first, sums = numbers.read(spec.numbers, y[c, t * PART]), hl.Func("sums")
    moved = numbers.read(spec.numbers, y[c, pixel]) - first
    sums[c, t] = (hl.f32(0.0), hl.f32(0.0))
    sums[c, t] = (sums[c, t][0] + moved, sums[c, t][1] + moved * moved)
    mean = sums[c, t][0] / hl.cast(hl.Float(32), count)
    out = _two_rows(spec, sums, (first + mean, sums[c, t][1] - sums[c, t][0] * mean), c, t, share)
    return out, [share, y]


def _two_rows(spec: PassSpec, sums: Any, values: tuple[Any, Any], c: Any, t: Any, share: Any) -> Any:
    """``values`` of each channel and part, from sums in registers."""
    out, k, block, inner = hl.Func("rows"), hl.Var("k"), hl.Var("block"), hl.Var("inner")
    wide = spec.lanes * spec.vectors
    out[c, k, t] = hl.select(k == 0, values[0], values[1])
    out.bound(k, 0, 2).split(c, block, inner, wide, hl.TailStrategy.ShiftInwards).reorder(inner, k, block, t)
    out.vectorize(inner, spec.lanes).unroll(inner).unroll(k)
    runtime.share(out, t, share)
    sums.compute_at(out, block).bound_extent(c, wide).vectorize(c, spec.lanes).unroll(c)
    sums.update().reorder(c, sums.rvars(0)[0]).vectorize(c, spec.lanes).unroll(c)
    _side_by_side(out.output_buffer())
    return out


def _parts() -> tuple[Any, Any]:
    """Those of all parts of an image, and the number of the part."""
    parts = hl.ImageParam(hl.Float(32), 3, "parts")
    _side_by_side(parts)
    return parts, hl.RDom([hl.Range(0, parts.dim(2).extent())], "q")


def _total(spec: PassSpec) -> tuple[Any, list[Any]]:
    (parts, q), (c, k) = _parts(), hl.vars("c k")
    total, out = hl.Func("sum"), hl.Func("total")
    total[c, k] = hl.f32(0.0)
    total[c, k] += parts[c, k, q.x]
    out[c, k] = total[c, k]
    out.vectorize(c, spec.lanes, hl.TailStrategy.ShiftInwards)
    total.compute_at(out, c).vectorize(c, spec.lanes).update().vectorize(c, spec.lanes)
    _side_by_side(out.output_buffer())
    return out, [parts]


def _merge(spec: PassSpec) -> tuple[Any, list[Any]]:
    (parts, q), (c, k), pixels = _parts(), hl.vars("c k"), _share("pixels")
    both, out = hl.Func("both"), hl.Func("merge")
    before, more = q.x * PART, hl.min(PART, pixels - q.x * PART)
    share = hl.cast(hl.Float(32), more) / hl.cast(hl.Float(32), before + more)
    both[c] = (hl.f32(0.0), hl.f32(0.0))
    apart = parts[c, 0, q.x] - both[c][0]
    between = apart * apart * hl.cast(hl.Float(32), before) * share
    both[c] = (both[c][0] + apart * share, both[c][1] + parts[c, 1, q.x] + between)
    squares = hl.strict_float(hl.select(both[c][1] < hl.f32(0.0), hl.f32(0.0), both[c][1]))
    out[c, k] = hl.select(k == 0, both[c][0], squares / hl.cast(hl.Float(32), pixels))
    out.bound(k, 0, 2).reorder(k, c).unroll(k).vectorize(c, spec.lanes, hl.TailStrategy.ShiftInwards)
    both.compute_at(out, c).vectorize(c, spec.lanes).update().vectorize(c, spec.lanes)
    _side_by_side(out.output_buffer())
    return out, [pixels, parts]


_BUILD = {
    "normalise": _normalise,
    "deviate": _deviate,
    "gradient": _gradient,
    "sums": _sums,
    "moments": _moments,
    "total": _total,
    "merge": _merge,
}
