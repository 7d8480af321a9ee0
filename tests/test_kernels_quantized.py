"""Convolutions of bytes equal their definition in every bit: any size, ties, saturation, views, threads, each way."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantized_checks import LAST, WAYS, Point, bytes_of, constants, exact, truth
from torch import Tensor

from sepconv.kernels import backends, case
from sepconv.kernels.case import Case, Geometry
from sepconv.kernels.halide.jit import amx, llvm, runtime
from sepconv.kernels.halide.quantized import depthwise, epilogue, normal, pointwise, product, separable
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.halide.schedule import quantized as schedule

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing() or "")

ONE = Geometry.of_pixels(2)


@dataclass(frozen=True)
class Asked:
    """One convolution; ``outputs`` of the pointwise one."""

    channels: int
    outputs: int
    size: tuple[int, int]
    batch: int = 1
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1
    activation: str = "relu6"
    residual: str = ""
    reads: str = "uint8"
    out: str = "uint8"
    bias: bool = True
    extreme: bool = False
    beside: int = 0
    point: Point = Point()  # noqa: RUF009

    @property
    def walk(self) -> Geometry:
        return Geometry(self.stride, self.padding, self.dilation)


def added(asked: Asked, shape: tuple[int, ...]) -> Tensor | None:
    if not asked.residual:
        return None
    image = bytes_of(shape, asked.beside)
    return image if asked.residual == "uint8" else (image.float() / 40 - 3).contiguous(memory_format=LAST)


def check_pointwise(asked: Asked, way: str) -> None:
    x = bytes_of((asked.batch, asked.channels, *asked.size), asked.beside, asked.extreme)
    of = constants((asked.outputs, asked.channels, 1, 1), asked.point, asked.bias, asked.extreme)
    residual = added(asked, (asked.batch, asked.outputs, *asked.size))
    known = case.pointwise(x, of.weight, of.bias, residual, asked.activation)
    wanted = truth(x, of, ONE, asked.activation, residual, getattr(torch, asked.out))
    exact(pointwise, known, (x, list(of), residual), wanted, way, asked.beside)


def check_depthwise(asked: Asked, way: str) -> None:
    x = bytes_of((asked.batch, asked.channels, *asked.size), asked.beside, asked.extreme)
    shape = (asked.channels * asked.multiplier, 1, *asked.kernel)
    of = constants(shape, asked.point, asked.bias, asked.extreme)
    wanted = truth(x, of, asked.walk, asked.activation, None, getattr(torch, asked.out))
    known = case.depthwise(x, of.weight, of.bias, asked.walk, asked.activation)
    exact(depthwise, known, (x, list(of), None), wanted, way, asked.beside)


def check_separable(asked: Asked, way: str) -> None:
    x = bytes_of((asked.batch, asked.channels, *asked.size), asked.beside, asked.extreme)
    depth = asked.channels * asked.multiplier
    first = constants((depth, 1, *asked.kernel), asked.point, asked.bias, asked.extreme)
    inner = asked.point._replace(x_zero=asked.point.zero, zero=7)
    second = constants((asked.outputs, depth, 1, 1), inner, asked.bias, asked.extreme)
    hidden = truth(x, first, asked.walk, "relu6")
    residual = added(asked, (asked.batch, asked.outputs, *hidden.shape[2:]))
    wanted = truth(hidden, second, ONE, asked.activation, residual, getattr(torch, asked.out))
    filtered = case.depthwise(x, first.weight, first.bias, asked.walk, "relu6")
    known = case.separable(filtered, case.pointwise(filtered.y, second.weight, second.bias, residual, asked.activation))
    both = [tensor for pair in zip(first, second, strict=True) for tensor in pair]
    exact(separable, known, (x, both, residual), wanted, way, asked.beside)


def check_normal(asked: Asked, way: str) -> None:
    """``multiplier`` is the number of groups here."""
    groups = asked.multiplier
    x: Tensor = bytes_of((asked.batch, asked.channels * groups, *asked.size), asked.beside, asked.extreme)
    if asked.reads != "uint8":
        x = (x.float() / 30 - 4).contiguous(memory_format=LAST if asked.reads == "float32" else torch.contiguous_format)
    of = constants((asked.outputs * groups, asked.channels, *asked.kernel), asked.point, asked.bias, asked.extreme)
    of = of._replace(numbers=torch.cat([of.numbers, torch.tensor([25.0])]))
    size = asked.walk.output_size(asked.size, asked.kernel)
    residual = added(asked, (asked.batch, asked.outputs * groups, *size))
    wanted = truth(x, of, asked.walk, asked.activation, residual, getattr(torch, asked.out))
    known = case.normal(x, of.weight, of.bias, residual, asked.walk, asked.activation)
    exact(normal, known, (x, list(of), residual), wanted, way, asked.beside)


CHECKS = {
    "normal": check_normal,
    "pointwise": check_pointwise,
    "depthwise": check_depthwise,
    "separable": check_separable,
}
TIES = Point(128, 100, 3, power_of_two=True)
CASES = {
    "one_pixel": Asked(7, 5, (1, 1), padding=((1, 1), (1, 1))),
    "channels_of_a_tile": Asked(64, 64, (7, 9)),
    "channels_prime_views": Asked(37, 41, (5, 7), batch=3, residual="uint8", beside=5),
    "many_terms_ties": Asked(184, 23, (6, 6), point=TIES, activation="", residual="uint8"),
    "everything_saturates": Asked(96, 48, (4, 5), extreme=True, activation="relu", point=Point(0, 255, spread=9e6)),
    "float_residual": Asked(40, 24, (5, 4), batch=2, residual="float32", activation="relu", bias=False),
    "float_result": Asked(33, 17, (9, 3), out="float32", activation="leaky_relu", residual="uint8"),
    "stride_2_kernel_5": Asked(24, 130, (11, 13), stride=(2, 2), kernel=(5, 5), padding=((1, 2), (2, 1))),
    "dilation_2_1": Asked(48, 16, (9, 8), stride=(1, 2), dilation=(2, 1), padding=((2, 3), (0, 1)), point=TIES),
    "multiplier_3": Asked(5, 19, (7, 6), multiplier=3, kernel=(2, 3), padding=((0, 0), (0, 0))),
    "kernel_of_one_column": Asked(16, 8, (17, 3), kernel=(9, 1), padding=((4, 4), (0, 0)), activation="clamp"),
    "first_layer": Asked(3, 32, (17, 19), stride=(2, 2), reads="planes of float32"),
    "padding_larger_than_image": Asked(20, 12, (2, 3), kernel=(7, 7), padding=((5, 6), (6, 5)), activation=""),
}


def check(op: str, asked: Asked, way: str) -> None:
    if op == "depthwise":
        asked, way = replace(asked, residual=""), way if way != product.TILES else product.best(9, 0)
    CHECKS[op](asked, way)


@pytest.mark.parametrize(("number", "name"), list(enumerate(CASES)), ids=list(CASES))
@pytest.mark.parametrize("op", CHECKS)
def test_every_bit_is_as_defined(op: str, number: int, name: str) -> None:
    """Each case in another way, to compile less."""
    check(op, CASES[name], WAYS[(number + len(op)) % len(WAYS)])


def convolutions() -> st.SearchStrategy[Asked]:
    pair, zero = st.tuples(st.integers(1, 3), st.integers(1, 3)), st.sampled_from([0, 1, 77, 254, 255])
    low_high = st.tuples(st.integers(0, 3), st.integers(0, 3))
    return st.builds(
        Asked,
        channels=st.integers(1, 200),
        outputs=st.integers(1, 150),
        size=st.tuples(st.integers(7, 19), st.integers(7, 23)),
        batch=st.sampled_from([1, 3]),
        kernel=pair,
        stride=pair,
        padding=st.tuples(low_high, low_high),
        dilation=pair,
        multiplier=st.sampled_from([1, 1, 1, 2]),
        activation=st.sampled_from(["", "relu", "relu6", "clamp"]),
        residual=st.sampled_from(["", "uint8", "float32"]),
        reads=st.sampled_from(["uint8", "uint8", "float32", "planes of float32"]),
        out=st.sampled_from(["uint8", "uint8", "float32"]),
        bias=st.booleans(),
        extreme=st.booleans(),
        beside=st.sampled_from([0, 3]),
        point=st.builds(Point, zero, zero, zero, st.sampled_from([0.01, 64.0, 1e4, 1e12]), power_of_two=st.booleans()),
    )


@settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(asked=convolutions(), op=st.sampled_from(sorted(CHECKS)), way=st.sampled_from(WAYS))
def test_any_convolution_is_as_defined(asked: Asked, op: str, way: str) -> None:
    check(op, asked, way)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(asked=convolutions(), op=st.sampled_from(sorted(CHECKS)), way=st.sampled_from(WAYS))
def test_many_convolutions_are_as_defined(asked: Asked, op: str, way: str) -> None:
    check(op, asked, way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", CHECKS)
def test_threads_share_the_work_out(op: str, way: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        check(op, Asked(32, 40, (23, 17), batch=2), way)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_a_number_becomes_0(way: str) -> None:
    x, of = bytes_of((1, 16, 3, 3)), constants((16, 16, 1, 1), Point())
    residual = torch.zeros(1, 16, 3, 3).contiguous(memory_format=LAST)
    residual[0, 3, 1, 2], residual[0, 4, 1, 2], residual[0, 5, 0, 0] = math.nan, math.inf, -math.inf
    wanted = truth(x, of, ONE, "relu", residual)
    assert wanted[0, 3, 1, 2] == 0
    known = case.pointwise(x, of.weight, of.bias, residual, "relu")
    exact(pointwise, known, (x, list(of), residual), wanted, way)


@pytest.mark.parametrize("activation", ["hardswish", "silu", "gelu"])
def test_curved_activations_are_right_to_their_own_rounding(activation: str) -> None:
    x, of = bytes_of((1, 24, 9, 7)), constants((32, 24, 1, 1), Point())
    out = torch.zeros(1, 32, 9, 7, dtype=torch.uint8).contiguous(memory_format=LAST)
    known = case.pointwise(x, of.weight, of.bias, None, activation).into(out)
    found = pointwise.plan(known)
    pointwise.bind(found, x, pointwise.pack(found, list(of)), None, out)()
    differ = (out.int() - truth(x, of, ONE, activation).int()).abs()
    assert differ.max() <= 1
    assert differ.float().mean() < 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_a_matrix_are_a_linear_layer(way: str) -> None:
    x, of = torch.randint(0, 256, (3, 70), dtype=torch.uint8), constants((11, 70), Point())
    sums = (x.double() - 117) @ of.weight.double().T
    wanted = of.scale * (sums.long() + of.bias).int().float()  # type: ignore[operator]
    out = torch.full((3, 11), math.nan)
    known = case.pointwise(x, of.weight, of.bias).into(out)
    found = pointwise.planned(known, way)
    pointwise.bind(found, x, pointwise.pack(found, list(of)), None, out)()
    assert torch.equal(out, wanted)


@pytest.mark.skipif(sys.platform != "linux", reason="pages are guarded on Linux")
def test_nothing_is_read_beside_an_image() -> None:
    script = Path(__file__).with_name("guarded.py")
    command = [sys.executable, str(script), "3", "37"]
    where = os.pathsep.join([str(script.parent), str(script.parent.parent)])
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": where})
    assert (run.returncode, run.stdout) == (0, "right\n"), run.stderr


def chosen(known: Case) -> Any:
    choice = backends.choose(known)
    assert choice.backend.binder is not None, choice.reasons
    return choice.backend.describe(known)


def test_the_lists_choose_them() -> None:
    x, weight = bytes_of((1, 128, 8, 8)), torch.zeros(64, 128, 1, 1, dtype=torch.int8)
    out = torch.zeros(1, 64, 8, 8, dtype=torch.uint8).contiguous(memory_format=LAST)
    long = chosen(case.pointwise(x, weight).into(out))["product"]
    short = chosen(case.pointwise(x[:, :32], weight[:, :32]).into(out))["product"]
    assert (long, short) == (product.NAMES[WAYS[0]], product.NAMES[product.best(32, 64)])
    filters = torch.zeros(128, 1, 3, 3, dtype=torch.int8)
    first = case.depthwise(x, filters, None, Geometry((1, 1), ((1, 1), (1, 1)), (1, 1)))
    image, stem = torch.zeros(1, 3, 9, 9), torch.zeros(64, 3, 3, 3, dtype=torch.int8)
    assert chosen(case.normal(image, stem, None, None, first.geometry).into(bytes_of((1, 64, 9, 9))))["rows"] == [9]
    assert chosen(first.into(bytes_of((1, 128, 8, 8))))["product"] == short
    assert chosen(case.separable(first, case.pointwise(first.y, weight)).into(out))["product"] == long


def test_without_tiles_and_vnni_there_are_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx, "missing", lambda of: "there are no tiles")
    monkeypatch.setattr(runtime, "multiplies_bytes", lambda: False)
    assert product.ways() == ("pairs",)
    assert product.best(512, 512) == "pairs"
    assert "avx512_zen4" not in str(runtime.old_target())


_ENDINGS = [
    ("pointwise", "everything_saturates"),
    ("separable", "many_terms_ties"),
    ("pointwise", "float_residual"),
    ("normal", "first_layer"),
    ("depthwise", "kernel_of_one_column"),
]


@pytest.mark.parametrize(("op", "name"), _ENDINGS)
def test_bytes_are_packed_or_cut_to_the_same(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is done the other way: with limits of floats and of integers, ties, and far beyond a byte."""
    other = not schedule.packs(machine.host())
    monkeypatch.setattr(schedule, "packs", lambda of: other)
    assert epilogue.Ending.in_the_middle("relu").packs is other
    check(op, CASES[name], product.PAIRS)


def test_not_a_number_is_packed_to_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "packs", lambda of: True)
    test_what_is_not_a_number_becomes_0(product.PAIRS)


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_vectors_of_eight_numbers_are_packed(lanes: int) -> None:
    assert schedule.packs(replace(machine.named("avx2"), lanes=lanes)) == (lanes == 8)


@pytest.mark.parametrize("op", CHECKS)
def test_products_of_signed_bytes_compute_the_same(op: str) -> None:
    """Those of ARM's dot products; this processor needs more instructions for them."""
    check(op, Asked(37, 21, (6, 7), residual="uint8"), product.SIGNED)


@pytest.mark.skipif(not llvm.host_has("avx2"), reason="runs code for older processors of this kind")
@pytest.mark.parametrize("name", ["avx2", "sse41"])
def test_older_processors_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import halide as hl

    older, target = machine.named(name), hl.Target(machine.named(name).target)
    for feature in ("NoRuntime", "NoAsserts", "UserContext"):
        target = target.with_feature(getattr(hl.TargetFeature, feature))
    monkeypatch.setattr(machine, "host", lambda: older)
    monkeypatch.setattr(runtime, "old_target", lambda: target)
    asked = Asked(37, 21, (6, 7), residual="uint8", stride=(2, 1), point=TIES)
    for op in ("normal", "separable"):
        check(op, asked, product.PAIRS)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.zeros(1, 8, 4, 4)}, "reads bytes but got torch.float32"),
        ({"x": torch.zeros(1, 8, 4, 4, dtype=torch.uint8)}, "channels_last"),
        ({"weight": torch.zeros(6, 8, 1, 1)}, "weights of int8 but got torch.float32"),
        ({"bias": torch.zeros(6)}, "got torch.float32"),
    ],
)
def test_what_they_cannot_compute_they_refuse(change: dict[str, Tensor], reason: str) -> None:
    given = {"x": bytes_of((1, 8, 4, 4)), "weight": torch.zeros(6, 8, 1, 1, dtype=torch.int8), "bias": None, **change}
    asked = case.pointwise(given["x"], given["weight"], given["bias"])  # type: ignore[arg-type]
    assert reason in pointwise.supports(asked.into(bytes_of((1, 6, 4, 4))))


def test_they_are_bound_to_memory_only() -> None:
    asked = case.pointwise(bytes_of((1, 8, 4, 4)), torch.zeros(6, 8, 1, 1, dtype=torch.int8))
    assert pointwise.supports(asked) == "the kernel is bound to memory by compile"
    with pytest.raises(TypeError, match="a quantised pointwise convolution is bound to memory, not called"):
        pointwise.prepare(asked)
    with pytest.raises(TypeError, match="has weight, scale and numbers"):
        pointwise.pack(pointwise.planned(asked, WAYS[0]), [asked.weight.meta(), None, None, None])
