"""Nothing is timed that does not agree, and contenders are treated alike. No test looks at how long anything took."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sepconv.compile import CompiledModel, compile
from sepconv.compile.explain import Group, NetworkExplanation
from sepconv.layers import SeparableConv2d
from sepconv.leaves import Inputs
from sepconv.ops import explain
from sepconv.runs import latency as bench


def _network() -> nn.Module:
    return nn.Sequential(SeparableConv2d(3, 8, 3, padding=1, activation="relu"), nn.Conv2d(8, 4, 3)).eval()


def test_contenders_are_torchs_layers_and_the_compiled_network() -> None:
    network, x = _network(), torch.randn(1, 3, 9, 9)
    found = bench.contenders(network, Inputs.of(x))
    assert list(found) == ["torch", "sepconv"]
    assert explain.explain(found["torch"], x) == []
    assert "separable_conv" in [choice.op for choice in explain.explain(network, x)]
    assert isinstance(found["sepconv"], CompiledModel)
    torch.testing.assert_close(found["sepconv"](x), network(x).detach())


def test_torchs_layers_have_the_same_weights_and_leave_the_network_alone() -> None:
    network, x = _network(), torch.randn(2, 3, 9, 9)
    plain = bench.with_torch_layers(network)
    assert type(plain[0].depthwise) is nn.Conv2d
    assert type(network[0].depthwise) is not nn.Conv2d
    torch.testing.assert_close(plain(x), network(x))
    assert plain.state_dict().keys() == network.state_dict().keys()


def test_disagreeing_contender_is_refused_before_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    network = _network()
    other = _network()
    monkeypatch.setattr(bench, "_time", lambda entries, seconds: pytest.fail("was timed"))
    with pytest.raises(ValueError, match=r"latency_ms: b \(contiguous\) differs from a on the network n by"):
        bench.latency_ms({"n": {"a": network, "b": other}}, Inputs.of(torch.randn(2, 3, 9, 9)), threads=1)


def test_nan_is_a_disagreement() -> None:
    class Nan(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float("nan")

    with pytest.raises(ValueError, match="differs"):
        bench.latency_ms({"n": {"a": nn.Identity(), "b": Nan()}}, Inputs.of(torch.randn(2, 3, 9, 9)), threads=1)


def test_latency_of_each_contender_in_its_better_layout() -> None:
    x = Inputs.of(torch.randn(2, 3, 9, 9))
    networks = {"n": bench.contenders(_network(), x), "other": {"torch": nn.Identity()}}
    before = torch.get_num_threads()
    found = bench.latency_ms(networks, x, threads=2, seconds=0.0)
    assert torch.get_num_threads() == before
    assert {name: set(row) for name, row in found.items()} == {"n": {"torch", "sepconv"}, "other": {"torch"}}
    for row in found.values():
        for latency in row.values():
            assert 0 < latency.low_ms <= latency.median_ms <= latency.high_ms
            assert latency.samples == bench.SAMPLES[0]
            assert latency.layout in bench.LAYOUTS


def test_every_contender_is_called_equally_often_with_the_threads_asked_for() -> None:
    calls: dict[str, list[int]] = {"a": [], "b": []}

    class Counts(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls[self.name].append(torch.get_num_threads())
            return x

    bench.latency_ms(
        {"n": {"a": Counts("a"), "b": Counts("b")}}, Inputs.of(torch.randn(1, 1, 2, 2)), threads=2, seconds=0.0
    )
    per_layout = 1 + bench.WARM_UP + bench.SAMPLES[0]
    assert calls["b"] == [2] * (2 * per_layout)
    assert calls["a"] == [2] * (2 * per_layout + 1)


def test_median_and_range_of_known_times() -> None:
    entry = bench._Entry("n", "c", "contiguous", nn.Identity(), torch.empty(0), [3e-3, 1e-3, 4e-3, 2e-3, 5e-3])
    found = bench._summary(entry)
    assert (found.low_ms, found.median_ms, found.high_ms, found.samples) == (2.0, 3.0, 4.0, 5)


def test_times_of_steps_are_given_to_their_layers() -> None:
    def step(name: str, time_us: float) -> Group:
        return Group(name, "separable", (), "halide", "", (1, 8, 5, 5), 100, time_us)

    steps = [step("a.1.depthwise + a.1.pointwise", 2000.0), step("a.10", 300.0), step("", 20.0), step("a.1", 1.0)]
    assert bench._by_layer([*steps, step("head", 4.0)], ["a.1", "a.10", "b"]) == {
        "a.1": 2.001,
        "a.10": 0.3,
        "b": 0.0,
        "": pytest.approx(0.024),
    }
    assert bench._by_layer([], ["a.1"]) == {}


def test_layer_times_are_those_of_the_compiled_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 3, 9, 9)
    network = compile(_network(), x)
    found = bench.layer_ms({"n": network}, ["0", "1"], threads=1, rounds=1)["n"]
    assert set(found) == {"0", "1", ""}
    assert found["0"] > 0
    assert found["1"] > 0
    # The median of the rounds counts: with one unusual round, the usual time.
    times = iter([1000.0, 9000.0, 1000.0])

    def explain(*, measure: bool) -> NetworkExplanation:
        assert measure
        return NetworkExplanation((Group("0", "normal", (), "halide", "", (1,), 1, next(times)),))

    monkeypatch.setattr(network, "explain", explain)
    assert bench.layer_ms({"n": network}, ["0"], threads=1) == {"n": {"0": 1.0, "": 0.0}}
