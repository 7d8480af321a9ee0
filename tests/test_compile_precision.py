"""Networks whose values are kept in 16 bits between layers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from networks import NETWORKS, randomise
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sepconv.compile import CompiledModel, compile
from sepconv.compile.groups import Convolution, Epilogue
from sepconv.compile.network import PreparedNetwork
from sepconv.compile.numbers import BFLOAT16, NumberType
from sepconv.compile.precision import checked_precision
from sepconv.compile.store import Constant
from sepconv.compile.verify import AGREEMENT, MOST_OF_FEW_BITS, InBfloat16, tolerance_of_few_bits
from sepconv.kernels import backends
from sepconv.kernels.backends import Backend, Binder
from sepconv.kernels.case import Case, Geometry, Outline
from sepconv.kernels.halide.conv import tiles
from sepconv.kernels.halide.schedule import machine

prepare: Any = importlib.import_module("sepconv.compile.prepare")
choice: Any = importlib.import_module("sepconv.compile.passes.precision")
HALF = 2.0**-9
"""What rounding to bfloat16 changes at most, relative to the number."""


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    backends.forget()
    yield
    backends.forget()


def _single(outline: Outline | None) -> Any:
    return None if outline is None else outline._replace(dtype=torch.float32)


def _in_float32(case: Case) -> Case:
    then = None if case.then is None else _in_float32(case.then)
    given = {name: _single(getattr(case, name)) for name in ("x", "weight", "y", "bias", "residual")}
    return replace(case, others=tuple(map(_single, case.others)), then=then, **given)


class _Planned(NamedTuple):
    case: Case

    @property
    def variant(self) -> Case:
        return self.case


def _bind(plan: _Planned, x: Tensor, packed: Sequence[Tensor | None], others: Any, out: Tensor) -> Any:
    """PyTorch's kernel in float32, between conversions."""
    case = plan.case
    compute = backends.BACKENDS[case.op][-1].prepare(_in_float32(case))
    more = list(others) if isinstance(others, (list, tuple)) else [] if others is None else [others]

    def run() -> None:
        read = [tensor.float() for tensor in (x, *more)]
        weights = [None if tensor is None else tensor.float() for tensor in packed]
        if case.op == "elementwise":
            given = [*read, *weights]
        elif case.op == "shuffle":
            given = read
        else:
            residual = [read[1] if more else None] if case.op in ("pointwise", "normal", "separable") else []
            given = [read[0], *weights, *residual]
        out.copy_(compute(*given).reshape(out.shape))

    return run


def _refused(case: Case) -> str:
    kinds = {outline.dtype for outline in (*case.given, case.result)}
    known = case.bound and kinds <= {torch.float32, torch.bfloat16}
    return "" if known else "it is for numbers of 16 and 32 bits in given memory"


def _fake(op: str) -> Backend:
    def never(case: Case) -> Any:
        pytest.fail("prepared")

    pack: Any = lambda case, weights: list(weights)  # noqa: E731
    return Backend("fake", never, _refused, binder=Binder(_Planned, pack, _bind, op == "elementwise"))


@pytest.fixture
def of_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that take any mixture of float32 and bfloat16, on any machine, and gain by it however small they are."""
    monkeypatch.setattr(prepare, "missing", lambda name: "")
    monkeypatch.setattr(choice, "_no_gain", lambda node, group: "")
    monkeypatch.setattr(choice, "FEW_NUMBERS", 0)
    for op, known in backends.BACKENDS.items():
        # A normal convolution may read the caller's own image.
        monkeypatch.setitem(backends.BACKENDS, op, known[-1:] if op == "normal" else [_fake(op), known[-1]])


def _network(compiled: CompiledModel) -> PreparedNetwork:
    network = next(iter(compiled._networks.values()))
    assert isinstance(network, PreparedNetwork)
    return network


def _close(got: Any, truth: Any, allowed: float) -> None:
    for ours, models in zip(*map(pytree.tree_leaves, (got, truth)), strict=True):
        if not isinstance(models, Tensor):
            continue
        assert ours.dtype is models.dtype
        assert float((ours - models).abs().max()) <= allowed * float(models.abs().max())


@pytest.mark.usefixtures("of_16_bits")
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_networks_in_bfloat16_equal_the_model(name: str) -> None:
    make, inputs = NETWORKS[name]
    model, given = randomise(make()), inputs()
    fast = compile(model, given, precision="bfloat16")
    explanation = fast.explain()
    unused = "" if explanation.precision == "bfloat16" else "no step of it takes less time in bfloat16"
    assert (explanation.reason, explanation.note) == ("", unused)
    arguments = given if isinstance(given, tuple) else (given,)
    with torch.no_grad():
        _close(fast(*arguments), model(*arguments), 40 * HALF)


@pytest.mark.usefixtures("of_16_bits")
def test_values_between_groups_are_kept_in_16_bits() -> None:
    make, inputs = NETWORKS["mobilenet_v2"]
    fast = compile(randomise(make()), inputs(), precision="bfloat16")
    steps, explanation = _network(fast).program.steps, fast.explain()
    # The stem writes float32, of which nothing is so large that it would be converted; the caller gets float32.
    assert not any(step.is_conversion for step in steps)
    assert {place.form.number for step in steps[2:] for place in step.inputs} == {BFLOAT16}
    assert explanation.precision == "bfloat16"
    assert [group.number for group in explanation.groups] == ["float32", *["bfloat16"] * (len(steps) - 2), "float32"]
    assert str(explanation).splitlines()[-1] == "in bfloat16"
    assert "numbers" in str(explanation).splitlines()[0]


class Between(nn.Module):
    """Values that groups, views, concatenations and PyTorch's operations read."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.first, self.second = what, nn.Conv2d(8, 16, 1), nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(24, 8, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y, z = self.first(x), self.second(x)
        if self.what == "joined":
            return self.last(torch.cat([y, z], 1))
        if self.what == "joined with the input":
            return self.last(torch.cat([y, x], 1))
        if self.what == "views":
            return self.second(y.view(*y.shape[:1], 2, 8, *y.shape[2:])[:, 1]) + y.chunk(2, 1)[0]
        if self.what == "turned":
            return self.second(torch.nn.functional.pixel_shuffle(torch.relu(torch.cat([y, y], 1)), 2))
        if self.what == "pytorch":
            return self.second(z).cumsum(2) + z
        return y, self.second(torch.relu(y[:, :8]))


@pytest.mark.usefixtures("of_16_bits")
@pytest.mark.parametrize("what", ["joined", "joined with the input", "views", "turned", "pytorch", "returned"])
@pytest.mark.parametrize("batch", [1, 3])
def test_numbers_of_16_bits_go_wherever_values_go(what: str, batch: int) -> None:
    model, x = Between(what).eval(), torch.randn(batch, 8, 7, 11)
    fast = compile(model, x, precision="bfloat16")
    assert fast.explain().note == ""
    assert BFLOAT16 in _network(fast).program.numbers
    with torch.no_grad():
        for given in (x, x.contiguous(memory_format=torch.channels_last), torch.randn(2, 8, 5, 3)):
            _close(fast(given), model(given), 4 * HALF)
    if what == "joined":
        kinds = [group.kind for group in fast.explain().groups]
        assert kinds == ["pointwise", "pointwise", "pointwise"]


class Both(nn.Module):
    """Two layers that read the same."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


@pytest.mark.usefixtures("of_16_bits")
def test_a_step_that_takes_no_16_bits_stands_between_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(case: Case) -> str:
        return "it is Tuesday" if case.given[0].dtype is torch.bfloat16 else _refused(case)

    monkeypatch.setitem(
        backends.BACKENDS, "window", [replace(_fake("window"), supports=refuse), backends.BACKENDS["window"][-1]]
    )
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.MaxPool2d(3), nn.Conv2d(8, 8, 1)).eval()
    x = torch.randn(2, 8, 11, 13)
    fast = compile(model, x, precision="bfloat16")
    groups = fast.explain().groups
    # What only the pool reads need not be converted for it.
    assert [(group.kind, group.number) for group in groups] == [
        ("pointwise", "float32"), ("max_pool", "bfloat16"), ("pointwise", "float32")
    ]  # fmt: skip
    model = nn.Sequential(nn.Conv2d(8, 8, 1), Both(nn.MaxPool2d(3), nn.Conv2d(8, 8, 1))).eval()
    fast = compile(model, x, precision="bfloat16")
    groups = {group.kind: group for group in fast.explain().groups}
    assert [group.number for group in fast.explain().groups][:2] == ["bfloat16", "float32"]
    assert groups["convert"].shape == (2, 8, 11, 13)
    assert groups["max_pool"].reason == "reads float32: it is Tuesday"
    with torch.no_grad():
        _close(fast(x), model(x), 4 * HALF)


_no_gain = choice._no_gain


@pytest.mark.usefixtures("of_16_bits")
def test_small_steps_stay_in_float32_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [nn.Conv2d(*channels, 1) for channels in ((4, 8), (8, 16), (16, 4), (4, 8), (8, 4))]
    model, x = nn.Sequential(*layers, nn.MaxPool2d(3)).eval(), torch.randn(1, 4, 9, 9)
    few = "in float32: 2,592 multiply-adds gain nothing in bfloat16"
    monkeypatch.setattr(choice, "_no_gain", _no_gain)
    monkeypatch.setattr(tiles, "unit", lambda: "AVX512-BF16")
    monkeypatch.setitem(choice.FEW_MACS, "pointwise", 5000)
    *groups, pool = compile(model, x, precision="bfloat16").explain().groups
    assert [group.macs for group in groups] == [2592, 10368, 5184, 2592, 2592]
    assert [group.number for group in groups] == ["bfloat16", "bfloat16", "float32", "float32", "bfloat16"]
    assert [group.reason for group in (*groups, pool)] == ["", "", "", few, "", ""]
    shared = nn.Sequential(layers[0], Both(layers[4], nn.Conv2d(8, 64, 1))).eval()
    assert compile(shared, x, precision="bfloat16").explain().groups[0].number == "bfloat16"  # one of two gains
    monkeypatch.setitem(choice.FEW_MACS, "pointwise", 10368)
    monkeypatch.setattr(choice, "FEW_NUMBERS", 4 * 81)
    fast, usual = compile(model, x, precision="bfloat16"), compile(model, x)
    explanation = fast.explain()
    assert (explanation.precision, explanation.note) == ("float32", "no step of it takes less time in bfloat16")
    assert str(explanation).endswith("in float32: no step of it takes less time in bfloat16")
    assert [group.reason == few for group in explanation.groups] == [True, False, False, True, True, False]
    assert torch.equal(fast(x), usual(x))


def _reason(channels: int, outputs: int, size: int, kernel: int = 1, groups: int = 1) -> str:
    model = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2, groups=groups).eval()
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(1, channels, size, size, device="meta")
    weight, walk = Constant(model.weight.detach(), "weight"), Geometry((1, 1), ((kernel // 2,) * 2,) * 2, (1, 1))
    group = Convolution(weight, Epilogue(), walk, groups)
    node = graph.create_node("call_function", group, (x,), {}, "conv")
    node.meta["val"] = model.to("meta")(x.meta["val"])
    return _no_gain(node, group)


def test_what_gains_nothing_depends_on_its_kind_and_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "unit", lambda: "AMX")
    monkeypatch.setattr(machine, "host", lambda: replace(machine.named("avx512"), l2_bytes=1 << 20))
    assert _reason(16, 96, 17) == "16 channels fill no tile"
    assert _reason(16, 96, 56) == ""  # beyond the caches
    assert _reason(32, 32, 3) == "9,216 multiply-adds gain nothing in bfloat16"
    assert _reason(32, 32, 4) == ""
    assert _reason(16, 16, 5, 3) == "57,600 multiply-adds gain nothing in bfloat16"
    assert _reason(64, 64, 1, 3) == ""  # its weights do not lie in the nearest cache
    assert _reason(32, 32, 8, 3, 32) == "18,432 multiply-adds gain nothing in bfloat16"
    assert _reason(64, 64, 8, 3, 64) == ""
    monkeypatch.setattr(tiles, "unit", lambda: "AVX512-BF16")
    assert _reason(16, 96, 17) == ""


def test_a_machine_without_products_of_bfloat16_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "missing", lambda name: "no products of bfloat16 here: it is Tuesday")
    make, inputs = NETWORKS["same_padded"]
    model, x = randomise(make()), inputs()
    fast, usual = compile(model, x, precision="bfloat16"), compile(model, x)
    explanation = fast.explain()
    assert (explanation.precision, explanation.note) == ("float32", "no products of bfloat16 here: it is Tuesday")
    assert str(explanation).endswith("in float32: no products of bfloat16 here: it is Tuesday")
    assert explanation.groups == usual.explain().groups
    torch.testing.assert_close(fast(*x), usual(*x), rtol=0, atol=0)


@pytest.mark.usefixtures("of_16_bits")
def test_a_network_that_16_bits_would_change_too_much_stays_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AGREEMENT, torch.bfloat16, 1e-6)
    monkeypatch.setattr(prepare, "tolerance_of_few_bits", lambda usual, moved, expected: 1e-6)
    model, x = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval(), torch.randn(2, 8, 5, 7)
    fast = compile(model, x, precision="bfloat16")
    explanation = fast.explain()
    assert (explanation.reason, explanation.precision) == ("", "float32")
    assert "other results than the model" in explanation.note
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


def test_the_bound_of_bfloat16_follows_from_the_model() -> None:
    one = torch.ones(3)
    floor = AGREEMENT[torch.bfloat16]
    assert floor == 2 * HALF
    assert tolerance_of_few_bits(floor, [[one], [one]], [one]) == floor
    assert tolerance_of_few_bits(floor, [[one], [one + 0.01]], [one]) == pytest.approx(0.04, rel=1e-3)
    assert tolerance_of_few_bits(floor, [[one + 9]], [one]) == MOST_OF_FEW_BITS


def test_rounding_of_a_model_reaches_weights_and_values() -> None:
    model, x = nn.Linear(1, 1, bias=False).eval(), torch.tensor([[1 + HALF / 2]])
    with torch.no_grad():
        model.weight.fill_(1 + HALF / 2)
        with InBfloat16():
            assert model(x).item() == 1.0
            kept = torch.empty(1, 1).copy_(x)  # what is written into is left as it is
        assert kept.item() == 1 + HALF / 2


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (torch.bfloat16, TypeError, "compile: precision must be a name or None, got dtype"),
        ("half", ValueError, "compile: precision must be one of float32, bfloat16 or None, got 'half'"),
        ("int8", ValueError, "compile: int8 is not asked for by precision; give the model that sepconv.quantize"),
    ],
)
def test_other_precisions_are_refused(given: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        compile(nn.Linear(2, 2).eval(), torch.randn(1, 2), precision=given)


def test_precision_none_is_float32() -> None:
    assert checked_precision(None) == checked_precision("float32") == "float32"


def test_scaled_numbers_are_the_nearest_steps() -> None:
    number = NumberType(torch.uint8, 0.5, 3)
    values = torch.tensor([0.0, 0.25, 0.75, -1.5, -2.0, 126.0, 127.0, float("nan"), float("inf"), -float("inf")])
    stored = number.encode(values)
    assert stored.tolist() == [3, 3, 5, 0, 0, 255, 255, 0, 255, 0]
    assert number.decode(stored)[:4].tolist() == [0.0, 0.0, 1.0, -1.5]
    assert NumberType(torch.uint8, 0.1, 0).inverse == float(torch.tensor(1.0) / torch.tensor(0.1))
    halves = torch.tensor([1.0, 1 + HALF, 1 + 3 * HALF, float("nan")])
    assert BFLOAT16.decode(BFLOAT16.encode(halves))[:3].tolist() == [1.0, 1.0, 1 + 4 * HALF]
