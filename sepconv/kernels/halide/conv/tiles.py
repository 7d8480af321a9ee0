"""The product of pixels and weights in bfloat16, with what follows it in the same pass.

On the processor's tiles (Intel AMX) where it has them, else in vectors of pairs where these multiply twice as many
numbers as those of float32 (AMD).

``sums[o, p] = sum over k of weight[o, k] * x[k, p]`` in float32; then bias, residual and activation, and one rounding
to the numbers of the result. x has its k side by side: an image of channels_last, or what was made of it in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.activations import ACTIVATIONS
from sepconv.kernels.case import Case, Outline
from sepconv.kernels.halide import numbers
from sepconv.kernels.halide.conv.gemm import dense
from sepconv.kernels.halide.jit import amx, packing, runtime
from sepconv.kernels.halide.jit.buffers import BITS16, Buffer, buffer
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.numbers import KINDS, PAIRS
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.halide.schedule.tiles import TilesSchedule
from sepconv.kernels.layout import pixel_step

KIND = "bfloat16"
DTYPES = (torch.float32, torch.bfloat16)
"""Of images, weights and biases; weights are rounded to bfloat16."""
_DEEPEST = amx.ROW_BYTES // 2
PAIR = 2 * amx.ROWS
"""Outputs in two tiles: where the result is written in pairs, the first of each are in one of them."""
# Activations that make no NaN of their own: what they are given has none with bits in the lower half.
_QUIET = ("", "relu", "relu6")


class Product(NamedTuple):
    """What the code of one product depends on.

    Attributes:
        terms: of each sum.
        steps, depth: the sum is made in so many steps of so many terms, the last ones zeros.
        wide: output channels of one block of sums.
        residual: the kind of its numbers; "" where there is none.
        numbers: the kind of the result's.
        tall: pixels whose sums are in registers at once; 0 on tiles.
    """

    terms: int
    steps: int
    depth: int
    out_channels: int
    wide: int
    activation: str
    residual: str
    numbers: str
    tall: int = 0

    @property
    def whole(self) -> int:
        """Terms with the zeros behind them."""
        return self.steps * self.depth

    @property
    def variant(self) -> tuple[str, int, int, bool, bool]:
        """What packed weights depend on besides their numbers."""
        return "tiles", self.steps, self.depth, self.numbers == PAIRS, self.tall > 0


def unit() -> str:
    """What multiplies: "AMX", else "AVX512-BF16" where that is faster than float32; "" if nothing does."""
    if runtime.missing():
        return ""
    if not amx.missing():
        return "AMX"
    name, target = machine.host().name, machine.host().target
    return "AVX512-BF16" if "avx512_zen4" in target and "Intel" not in name else ""


def missing() -> str:
    """Why nothing multiplies bfloat16 faster than float32 here, in a sentence; the empty string if something does."""
    return runtime.missing() or ("" if unit() else f"{amx.missing()}, and it is not AMD's with AVX512-BF16")


def quiet(activation: str, *kinds: str) -> bool:
    """Whether all numbers come from bfloat16, so that a NaN needs no care when it is rounded."""
    return activation in _QUIET and "float32" not in kinds


def steps_of(terms: int) -> tuple[int, int]:
    """As few equal steps as tiles allow, of an even number of terms each."""
    steps = -(-terms // _DEEPEST)
    return steps, -(-terms // (2 * steps)) * 2


def multiplied(kind: str) -> str:
    """The kind in which what is multiplied lies: vectors take single numbers."""
    return kind if unit() == "AMX" else kind.replace(PAIRS, KIND)


def kind_of(image: Outline, *, pairs: bool = True) -> str:
    """How an image of (N, C, ...) is read or written: in pairs where each pixel has whole ones."""
    kind = KINDS[image.dtype]
    even = image.shape[1] % 2 == 0 and all(step % 2 == 0 for step in _steps(image))
    return PAIRS if kind == KIND and even and pairs else kind


def _steps(image: Outline) -> list[int]:
    return [step for d, (size, step) in enumerate(zip(image.shape, image.stride, strict=True)) if d != 1 and size > 1]


def product(case: Case, terms: int, sizes: TilesSchedule, steps: tuple[int, int] | None = None) -> Product:
    """Of a case whose weights and result are those of the product; ``sizes`` as the schedule has them."""
    kind, residual = _written(case), ""
    if case.residual is not None:
        residual = kind_of(case.residual, pairs=kind == PAIRS)
    count, depth = steps or steps_of(terms)
    after = (case.activation, residual, kind)
    return Product(terms, count, depth, case.weight.shape[0], sizes.wide, *after, sizes.tall)


def together(case: Case) -> int:
    """Output channels that one block must have whole."""
    return PAIR if _written(case) == PAIRS else amx.ROWS


def _written(case: Case) -> str:
    """The kind of the result. The channels of one tile are one vector if they are not in pairs, else two half empty."""
    return kind_of(case.result, pairs=case.result.shape[1] > amx.ROWS)


def unsuitable(case: Case) -> str:
    """Why such tensors cannot be read and written, in a sentence; the empty string if they can."""
    if case.bound and not case.result.elements:
        return "the result is empty"
    if torch.bfloat16 not in case.numbers:
        return "the kernel computes in bfloat16 but no tensor is of it"
    reason = runtime.missing() or runtime.unsuitable(*case.given, case.result, numbers=DTYPES)
    return reason or missing() or runtime.too_large(case.result.shape)


def rows(param: Any, channels: int) -> None:
    """The channels of a pixel side by side, then pixels."""
    for d in range(param.dimensions()):
        param.dim(d).set_min(0)
    param.dim(0).set_extent(channels).set_stride(1)


def view(image: Tensor, kind: str, shape: Sequence[int], strides: Sequence[int], skipped: int = 0) -> Buffer:
    """Of the memory of an image from ``skipped`` numbers on; sizes and strides in numbers, the channels last."""
    parts = numbers.parts(kind)
    sizes, steps = (*shape[:-1], shape[-1] // parts), (*[step // parts for step in strides[:-1]], 1)
    return Buffer(sizes, steps, image.data_ptr() + skipped * image.element_size(), numbers.codes(kind), image)


def pixels(image: Tensor, kind: str) -> Buffer:
    """(N, C, H, W) as (N, H, W, C)."""
    n, c, h, w = image.shape
    by_image, _, by_row, by_column = image.stride()
    return view(image, kind, (n, h, w, c), (by_image, by_row, by_column, 1))


def build(spec: Product, x: Any, at: list[Any]) -> tuple[Any, Any, list[Any]]:
    """The sums over x, a Func or parameter, and what is made of them; ``at``: output, pixel and further dimensions.

    Returns the result, the sums and the parameters besides x: packed weights, bias, [residual].
    """
    bias, parts, out = hl.ImageParam(hl.Float(32), 1, "bias"), numbers.parts(spec.numbers), hl.Func("product")
    bias.dim(0).set_min(0)
    weight, sums = (_sums_in_vectors if spec.tall else _sums_on_tiles)(spec, x, at)
    parameters = [weight, bias]
    if spec.residual:
        residual = hl.ImageParam(numbers.halide_type(spec.residual), len(at), "residual")
        rows(residual, spec.out_channels // numbers.parts(spec.residual))
        parameters.append(residual)
    values = []
    for part in range(parts):
        o = at[0] if parts == 1 else at[0] // amx.ROWS * PAIR + at[0] % amx.ROWS + part * amx.ROWS
        value = sums[[o, *at[1:]]] + bias[o]
        if spec.residual:
            place = at[0] if spec.residual == spec.numbers else parts * at[0] + part
            value += numbers.read(spec.residual, residual[[place, *at[1:]]], part)
        values.append(ACTIVATIONS[spec.activation].expression(hl, value))
    out[at] = numbers.write(spec.numbers, *values, quiet=quiet(spec.activation, spec.residual))
    rows(out.output_buffer(), spec.out_channels // parts)
    return out, sums, parameters


def _sums_on_tiles(spec: Product, x: Any, at: list[Any]) -> tuple[Any, Any]:
    weight, sums = hl.ImageParam(numbers.halide_type(KIND), 1, "weight"), hl.Func("sums")
    weight.dim(0).set_min(0)
    steps = [hl.ExternFuncArgument(hl.Expr(count)) for count in (spec.steps, 2 * spec.depth)]
    given = [hl.ExternFuncArgument(x), hl.ExternFuncArgument(weight), *steps]
    sums.define_extern(amx.BF16.name, given, hl.Float(32), at, hl.NameMangling.C)
    return weight, sums


def _sums_in_vectors(spec: Product, x: Any, at: list[Any]) -> tuple[Any, Any]:
    weight, sums = hl.ImageParam(numbers.halide_type(KIND), 4, "weight"), hl.Func("sums")
    dense(weight, 2, amx.ROWS, spec.whole // 2, -(-spec.out_channels // PAIR) * 2)
    k, o = hl.RDom([hl.Range(0, spec.whole)], "k"), at[0]
    factors = weight[k.x % 2, o % amx.ROWS, k.x // 2, o // amx.ROWS], x[[k.x, *at[1:]]]
    sums[at] = hl.f32(0.0)
    first, second = (hl.cast(hl.Float(32), hl.reinterpret(hl.BFloat(16), factor)) for factor in factors)
    sums[at] += first * second
    return weight, sums


def schedule(spec: Product, out: Any, sums: Any, pixels: Any) -> list[Any]:
    """Parts of so many pixels, in them blocks of outputs; returns the loops over single results, from the inside out,
    over blocks and over parts."""
    o, p = out.args()[:2]
    block, o_in, part, p_in = (hl.Var(name) for name in ("block", "o_in", "part", "p_in"))
    parts = numbers.parts(spec.numbers)
    stored, wide = spec.out_channels // parts, spec.wide // parts
    ragged = stored % wide
    out.bound(o, 0, stored)
    out.split(o, block, o_in, wide, hl.TailStrategy.GuardWithIf if ragged else hl.TailStrategy.RoundUp)
    out.split(p, part, p_in, pixels, hl.TailStrategy.ShiftInwards)
    out.vectorize(o_in, amx.ROWS)
    if not spec.tall:
        sums.compute_at(out, block).align_bounds(o, PAIR if parts > 1 else amx.ROWS)
        return [[o_in, p_in], block, part]
    step, pixel = hl.Var("step"), hl.Var("pixel")
    out.split(p_in, step, pixel, spec.tall, hl.TailStrategy.ShiftInwards).unroll(o_in).unroll(pixel)
    _schedule_vectors(spec, sums.compute_at(out, step))
    return [[o_in, pixel, step], block, part]


def _schedule_vectors(spec: Product, sums: Any) -> None:
    """Sums in registers; a step of them adds the products of two terms to each."""
    o, p = sums.args()[:2]
    outer, pair, lane, vector = hl.RVar("outer"), hl.RVar("pair"), hl.Var("lane"), hl.Var("vector")
    sums.bound_extent(o, spec.wide).bound_extent(p, spec.tall)
    sums.vectorize(o, amx.ROWS).unroll(o).unroll(p)
    update = sums.update()
    update.split(sums.rvars(0)[0], outer, pair, 2).split(o, vector, lane, amx.ROWS)
    update.reorder(pair, lane, vector, p, outer).atomic()
    update.vectorize(pair).vectorize(lane).unroll(vector).unroll(p)


def pack(spec: Product, weight: Tensor, bias: Tensor | None) -> list[Buffer]:
    """``weight``: (O, terms)."""
    length = -(-len(weight) // PAIR) * PAIR
    padded = weight.new_zeros(length, spec.whole, dtype=torch.bfloat16)
    padded[: len(weight), : spec.terms] = weight.detach()
    offset = torch.zeros(length)
    if bias is not None:
        offset[: len(weight)] = bias.detach()
    if spec.numbers == PAIRS:
        padded, offset = (t.unflatten(0, (-1, amx.ROWS, 2)).transpose(1, 2).flatten(0, 2) for t in (padded, offset))
    tiles = packing.pack_tiles(padded, spec.depth).flatten()
    if spec.tall:  # the same numbers in the same order, without steps
        tiles = tiles.view(-1, spec.whole // 2, amx.ROWS, 2)
    return [Buffer(tiles.shape, tiles.stride(), tiles.data_ptr(), BITS16, tiles), buffer(usual(offset))]


def usual(values: Tensor) -> Tensor:
    """In float32, every NaN the usual one, which rounding leaves as it is."""
    given = values.detach().float()
    return torch.where(given.isnan(), math.nan, given).contiguous()


def check(what: str, *images: Tensor) -> None:
    """
    Raises:
        ValueError: the pixels of an image do not lie evenly spaced in memory, each one's channels side by side.
    """
    for image in images:
        if not pixel_step(image.shape, image.stride()):
            raise ValueError(f"{what}: an image must be channels_last, or channels of such, got {image.stride()}")
