"""Passes over an image as rows of channels, pixel after pixel: norms and activations on the way into a product and
back, and the sums that norms need.

Each reads every number once; vectors lie along the channels, those of bfloat16 in pairs. What is summed over pixels is
summed in parts of so many pixels, which sizes alone decide: sums do not depend on threads. Squares are taken around a
number of the part itself, so that nothing cancels however far the mean is from 0, and parts are merged by Chan's
formula.

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
# Half of a step of bfloat16 would be Halide's own rounding, in seven instructions; a little less is one.
_HALF, _HIGH = 0x7FFF, 0xFFFF0000


class PassSpec(NamedTuple):
    """All that the code of one pass depends on.

    ``what``: a key of ``PASSES``; ``vectors``: of so many ``lanes`` are sums kept in registers.
    """

    what: str
    numbers: str
    activation: str
    lanes: int
    vectors: int = 1

    @property
    def halves(self) -> int:
        """Channels in one number that is stored."""
        return numbers.parts(self.numbers)


PASSES = {
    "normalise": ("share", "x", "mean", "scale", "bias", "h"),
    "fill": ("y_share", "added", "y"),
    "deviate": ("y_share", "grad", "y", "y_mean", "offset", "slope", "dz"),
    "gradient": ("share", "dh", "x", "mean", "scale", "bias", "grad_x"),
    "both": ("share", "dh", "x", "mean", "scale", "bias", "grad_x", "h"),
    "sums": ("parts_share", "dh", "x", "mean", "scale", "bias", "parts"),
    "moments": ("parts_share", "y", "parts"),
    "level": ("parts_share", "dz", "y_parts"),
    "total": ("all_parts", "result"),
    "level total": ("all_y_parts", "of_bias"),
    "merge": ("pixels", "all_parts", "result"),
}
"""What each is called with. "normalise" makes h = act((x - mean) * scale + bias), "deviate" dz = grad + offset + slope
* (y - mean), "fill" puts a number for each channel into y. "gradient" is that of x from that of h, "both" this and h.
"sums" and "moments" write two numbers a channel for each part: sum of g, sum of g * (x - mean); mean, sum of squares
around it; "level" the sum of dz, and 0. Totals add parts up, "merge" makes mean and biased variance of them."""


def build(spec: PassSpec) -> tuple[Any, list[Any]]:
    """The pipeline; its arguments are those that ``PASSES`` names, the result last."""
    return _BUILD[spec.what](spec)


def _side_by_side(param: Any) -> None:
    for d in range(param.dimensions()):
        param.dim(d).set_min(0)
    param.dim(0).set_stride(1)


class _Image:
    """Rows of numbers: ``image(c, half, p)`` is one of them in float32."""

    def __init__(self, spec: PassSpec, name: str) -> None:
        self._kind, self.param = spec.numbers, hl.ImageParam(numbers.halide_type(spec.numbers), 2, name)
        _side_by_side(self.param)

    def __call__(self, c: Any, half: Any, p: Any) -> Any:
        return numbers.read(self._kind, self.param[c, p], half)


class _Vectors:
    """A number for each channel, several times: ``vectors[name](c, half)``."""

    def __init__(self, spec: PassSpec, *names: str) -> None:
        self.params = [hl.ImageParam(hl.Float(32), 1, name) for name in names]
        self._halves = [self._apart(spec, param) for param in self.params]

    def __getitem__(self, number: int) -> Any:
        return self._halves[number]

    def _apart(self, spec: PassSpec, param: Any) -> Any:
        """The even channels, then the odd ones, where vectors have these."""
        _side_by_side(param)
        if spec.halves == 1:
            return lambda c, half: param[c]
        found, (c, half) = hl.Func(f"{param.name()}_halves"), hl.vars("c half")
        found[c, half] = param[spec.halves * c + half]
        found.compute_root().vectorize(c, spec.lanes, hl.TailStrategy.GuardWithIf)
        return lambda c, half: found[c, half]


class _Norm:
    """x and its prologue: what is a Func is rounded as it is written here, with products and sums in one step."""

    def __init__(self, spec: PassSpec) -> None:
        self.x, self.vectors = _Image(spec, "x"), _Vectors(spec, "mean", "scale", "bias")
        c, half, p = self.at = hl.vars("c half p")
        mean, scale, bias = (self.vectors[i](c, half) for i in range(3))
        deviation = self.x(c, half, p) - mean
        self.func = hl.Func("argument")
        self.func[c, half, p] = (deviation, deviation * scale + bias)

    def deviation(self, *at: Any) -> Any:
        return self.func[at][0]

    def argument(self, *at: Any) -> Any:
        """Of the activation."""
        return self.func[at][1]

    @property
    def params(self) -> list[Any]:
        return [self.x.param, *self.vectors.params]


def _stored(kind: str, values: list[Any]) -> Any:
    """What is written: the nearest number, of two as near that nearer to 0, which costs a quarter of the even one."""
    if kind == "float32":
        return values[0]
    rounded = [hl.reinterpret(hl.UInt(32), value) + hl.u32(_HALF) for value in values]
    if len(rounded) == 1:
        return hl.cast(hl.UInt(16), rounded[0] >> hl.u32(16))
    return (rounded[0] >> hl.u32(16)) | (rounded[1] & hl.u32(_HIGH))


def _share(name: str = "share") -> Any:
    return hl.Param(hl.Int(32), name)


def _normalise(spec: PassSpec) -> tuple[Any, list[Any]]:
    share, norm, (c, p) = _share(), _Norm(spec), hl.vars("c p")
    activate = ACTIVATIONS[spec.activation].expression
    out = hl.Func("normalise")
    out[c, p] = _stored(spec.numbers, [activate(hl, norm.argument(c, half, p)) for half in range(spec.halves)])
    _schedule_numbers(spec, out, [norm.func], share)
    return out, [share, *norm.params]


def _deviate(spec: PassSpec) -> tuple[Any, list[Any]]:
    share, grad, y, (c, p) = _share(), _Image(spec, "grad"), _Image(spec, "y"), hl.vars("c p")
    vectors, out = _Vectors(spec, "y_mean", "offset", "slope"), hl.Func("deviate")
    values = []
    for half in range(spec.halves):
        mean, offset, factor = (vectors[i](c, half) for i in range(3))
        values.append((y(c, half, p) - mean) * factor + offset + grad(c, half, p))
    out[c, p] = _stored(spec.numbers, values)
    _schedule_numbers(spec, out, [], share)
    return out, [share, grad.param, y.param, *vectors.params]


def _fill(spec: PassSpec) -> tuple[Any, list[Any]]:
    share, added, (c, p) = _share(), _Vectors(spec, "added"), hl.vars("c p")
    out = hl.Func("fill")
    out[c, p] = _stored(spec.numbers, [added[0](c, half) for half in range(spec.halves)])
    _schedule_numbers(spec, out, [], share)
    return out, [share, *added.params]


def _gradient(spec: PassSpec) -> tuple[Any, list[Any]]:
    share, grad, norm, (c, p) = _share(), _Image(spec, "dh"), _Norm(spec), hl.vars("c p")
    out, values, activated = hl.Func(spec.what), [], []
    for half in range(spec.halves):
        argument = norm.argument(c, half, p)
        values.append(backward(spec.activation, grad(c, half, p), argument) * norm.vectors[1](c, half))
        activated.append(ACTIVATIONS[spec.activation].expression(hl, argument))
    gradient = _stored(spec.numbers, values)
    out[c, p] = gradient if spec.what == "gradient" else (gradient, _stored(spec.numbers, activated))
    _schedule_numbers(spec, out, [norm.func], share)
    return out, [share, grad.param, *norm.params]


def _schedule_numbers(spec: PassSpec, out: Any, inner: list[Any], share: Any) -> None:
    """Some pixels together, for which the vectors of the channels stay in registers."""
    c, p = out.args()
    step, pixel, vector, lane = hl.vars("step pixel vector lane")
    out.split(p, step, pixel, TOGETHER, hl.TailStrategy.ShiftInwards)
    out.split(c, vector, lane, spec.lanes, hl.TailStrategy.ShiftInwards)
    out.reorder(lane, pixel, vector, step).vectorize(lane).unroll(pixel)
    runtime.share(out, step, share)
    for func in inner:
        channel, half = func.args()[:2]
        func.compute_at(out, pixel).bound_extent(channel, spec.lanes).vectorize(channel)
        func.bound(half, 0, spec.halves).unroll(half)
    first, *others = out.output_buffers()
    _side_by_side(first)
    for buffer in others:  # that begin and end where the first does
        buffer.dim(0).set_stride(1)


def _part(image: _Image, t: Any) -> tuple[Any, Any]:
    """Of part ``t`` the number of pixels, and the pixel of each term of a sum over it."""
    pixels = image.param.dim(1).extent()
    r = hl.RDom([hl.Range(0, PART)], "r")
    pixel = t * PART + r.x
    r.where(pixel < pixels)
    return hl.min(PART, pixels - t * PART), hl.unsafe_promise_clamped(pixel, 0, pixels - 1)


def _sums(spec: PassSpec) -> tuple[Any, list[Any]]:
    share, grad, norm, (c, half, t) = _share("parts_share"), _Image(spec, "dh"), _Norm(spec), hl.vars("c half t")
    _, pixel = _part(norm.x, t)
    g = backward(spec.activation, grad(c, half, pixel), norm.argument(c, half, pixel))
    sums, at = hl.Func("sums"), (c, half, t)
    sums[at] = (hl.f32(0.0), hl.f32(0.0))
    sums[at] = (sums[at][0] + g, sums[at][1] + g * norm.deviation(c, half, pixel))
    out = _two_rows(spec, sums, (sums[at][0], sums[at][1]), share)
    lane, part = norm.func.args()[:2]
    norm.func.compute_at(sums, sums.rvars(0)[0]).bound_extent(lane, spec.lanes * spec.vectors)
    norm.func.vectorize(lane, spec.lanes).unroll(lane).bound(part, 0, spec.halves).unroll(part)
    return out, [share, grad.param, *norm.params]


def _moments(spec: PassSpec) -> tuple[Any, list[Any]]:
    share, y, (c, half, t) = _share("parts_share"), _Image(spec, "y"), hl.vars("c half t")
    count, pixel = _part(y, t)
    first, sums, at = y(c, half, t * PART), hl.Func("sums"), (c, half, t)
    moved = y(c, half, pixel) - first
    sums[at] = (hl.f32(0.0), hl.f32(0.0))
    sums[at] = (sums[at][0] + moved, sums[at][1] + moved * moved)
    mean = sums[at][0] / hl.cast(hl.Float(32), count)
    out = _two_rows(spec, sums, (first + mean, sums[at][1] - sums[at][0] * mean), share)
    return out, [share, y.param]


def _level(spec: PassSpec) -> tuple[Any, list[Any]]:
    share, dz, (c, half, t) = _share("parts_share"), _Image(spec, "dz"), hl.vars("c half t")
    _, pixel = _part(dz, t)
    sums, at = hl.Func("sums"), (c, half, t)
    sums[at] = hl.f32(0.0)
    sums[at] += dz(c, half, pixel)
    return _two_rows(spec, sums, (sums[at], hl.f32(0.0)), share), [share, dz.param]


def _two_rows(spec: PassSpec, sums: Any, values: tuple[Any, Any], share: Any) -> Any:
    """``values`` of each channel and part, from sums in registers."""
    c, half, t = sums.args()
    out, k, block, inner = hl.Func("rows"), hl.Var("k"), hl.Var("block"), hl.Var("inner")
    wide = spec.lanes * spec.vectors
    out[c, half, k, t] = hl.select(k == 0, values[0], values[1])
    out.bound(k, 0, 2).bound(half, 0, spec.halves)
    out.split(c, block, inner, wide, hl.TailStrategy.ShiftInwards).reorder(inner, half, k, block, t)
    out.vectorize(inner, spec.lanes).unroll(inner).unroll(half).unroll(k)
    runtime.share(out, t, share)
    sums.compute_at(out, block).bound_extent(c, wide).bound(half, 0, spec.halves)
    sums.vectorize(c, spec.lanes).unroll(c).unroll(half)
    sums.update().reorder(c, half, sums.rvars(0)[0]).vectorize(c, spec.lanes).unroll(c).unroll(half)
    _side_by_side(out.output_buffer())
    return out


def _parts() -> tuple[Any, Any]:
    """Those of all parts of an image, and the number of the part."""
    parts = hl.ImageParam(hl.Float(32), 4, "parts")
    _side_by_side(parts)
    return parts, hl.RDom([hl.Range(0, parts.dim(3).extent())], "q")


def _total(spec: PassSpec) -> tuple[Any, list[Any]]:
    (parts, q), (c, half, k, i) = _parts(), hl.vars("c half k i")
    total, out = hl.Func("sum"), hl.Func("total")
    total[c, half, k] = hl.f32(0.0)
    total[c, half, k] += parts[c, half, k, q.x]
    out[i, k] = total[i // spec.halves, i % spec.halves, k]
    _schedule_channels(spec, total, out)
    total.update().reorder(c, half, k, q.x)
    return out, [parts]


def _merge(spec: PassSpec) -> tuple[Any, list[Any]]:
    (parts, q), (c, half, k, i), pixels = _parts(), hl.vars("c half k i"), _share("pixels")
    both, out, at = hl.Func("both"), hl.Func("merge"), (c, half)
    before, more = q.x * PART, hl.min(PART, pixels - q.x * PART)
    share = hl.cast(hl.Float(32), more) / hl.cast(hl.Float(32), before + more)
    both[at] = (hl.f32(0.0), hl.f32(0.0))
    apart = parts[c, half, 0, q.x] - both[at][0]
    between = apart * apart * hl.cast(hl.Float(32), before) * share
    both[at] = (both[at][0] + apart * share, both[at][1] + parts[c, half, 1, q.x] + between)
    mean, squares = (both[i // spec.halves, i % spec.halves][n] for n in range(2))
    rounded = hl.strict_float(hl.select(squares < hl.f32(0.0), hl.f32(0.0), squares))
    out[i, k] = hl.select(k == 0, mean, rounded / hl.cast(hl.Float(32), pixels))
    out.bound(k, 0, 2)
    _schedule_channels(spec, both, out)
    both.update().reorder(c, half, q.x)
    return out, [pixels, parts]


def _schedule_channels(spec: PassSpec, sums: Any, out: Any) -> None:
    """Row by row of the parts, then the channels in their order."""
    guarded = hl.TailStrategy.GuardWithIf
    sums.compute_root().vectorize(sums.args()[0], spec.lanes, guarded)
    sums.update().vectorize(sums.args()[0], spec.lanes, guarded)
    out.vectorize(out.args()[0], spec.lanes, hl.TailStrategy.ShiftInwards)
    _side_by_side(out.output_buffer())


_BUILD = {
    "normalise": _normalise,
    "fill": _fill,
    "deviate": _deviate,
    "gradient": _gradient,
    "both": _gradient,
    "sums": _sums,
    "moments": _moments,
    "level": _level,
    "total": _total,
    "level total": _total,
    "merge": _merge,
}
