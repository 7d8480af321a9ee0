"""``sepconv bench zoo``: a process a network, verified before it is timed; what fails is told and the rest goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sepconv.bench import tables, zoo, zoo_network
from sepconv.bench.zoo import Failure
from sepconv.bench.zoo_network import Measured, measure
from sepconv.system.timing import Timing


class Small(nn.Module):
    """What fresh networks have that has no effect: batch norms of ones and zeros, and a layer scale of 1e-6."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.scale = nn.Parameter(1e-6 * torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y + self.scale * y.sin()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo_network, "create", lambda name: Small())
    monkeypatch.setattr(zoo_network, "_SIDES", {"small": 17})


@pytest.mark.usefixtures("small")
def test_nothing_in_a_network_is_without_effect() -> None:
    model: Any = zoo_network.network_of("small")
    assert not model.training
    assert 0.01 < model.scale.abs().max() < 0.3
    assert model.norm.weight.std() > 0.1
    assert model.norm.running_mean.std() > 0
    again: Any = zoo_network.network_of("small")
    assert torch.equal(again.scale, model.scale)


@pytest.mark.usefixtures("small")
def test_contenders_are_verified_and_timed() -> None:
    found = measure("small", 1, 0.001, False)
    assert list(found.timings) == ["sepconv", "torch-nchw", "torch-nhwc", "torch-folded-nhwc"]
    assert all(0 <= error <= 1 for error in found.errors.values())
    assert found.macs == 8 * 27 * 81
    assert (found.reason, found.absent) == ("", {})
    assert [(row.contender, row.layout, row.kernel) for row in found.rows()][1:3] == [
        ("torch-nchw", "nchw", "torch-nchw"),
        ("torch-nhwc", "nhwc", "torch-nhwc"),
    ]


@pytest.mark.usefixtures("small")
def test_wrong_results_are_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(name: str, model: nn.Module, x: Tensor, absent: dict[str, str]) -> dict[str, Any]:
        return {"wrong": lambda: model(x) * 1.001}

    monkeypatch.setattr(zoo_network, "_eager", wrong)
    with pytest.raises(ValueError, match=r"bench zoo: wrong on small differs from float64 by [\d.]+ times 0\.0001"):
        measure("small", 1, 0.001, False)


def test_the_results_of_a_detector_are_all_compared() -> None:
    result = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}]
    assert [tuple(leaf.shape) for leaf in zoo_network._leaves(result)] == [(0, 4), (0,)]
    assert zoo_network._error(torch.tensor([1.0, 2.2]), torch.tensor([1.0, 2.0]).double()) == pytest.approx(0.1)


def _measured(network: str, threads: int, ours: float) -> Measured:
    times = {"sepconv": ours, "torch-nchw": 3.0, "torch-nhwc": 2.0, "torch-folded-nhwc": 1.5}
    times |= {"openvino": 1.2} if network in zoo.SEPARABLE else {}
    timings = {name: Timing(t, t, t, 7) for name, t in times.items()}
    return Measured(network, threads, 4.5, "", {"halide": 3}, 10, 40, dict.fromkeys(timings, 0.1), timings, {})


def test_one_failure_takes_no_other_network_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_a_process(name: str, threads: int, seconds: float, folder: str) -> Measured | Failure:
        return Failure(name, threads, "killed") if "50" in name else _measured(name, threads, 1.0)

    monkeypatch.setattr(zoo, "_in_a_process", in_a_process)
    monkeypatch.setattr(zoo, "fma_peak_gflops", lambda threads: 100.0)
    path = tmp_path / "zoo.json"
    zoo.run([1, 2], 0.1, "timm/mobilenet", path, "sepconv bench zoo", lambda _: None)
    zoo.run([1], 0.1, "res", path, "sepconv bench zoo", lambda _: None)
    content = tables.read(path)
    assert {(one["network"], one["reason"]) for one in content["failed"]} >= {("timm/resnet50", "killed")}
    assert {row["case"] for row in content["records"]} >= {"timm/resnet18"}
    assert json.loads(path.read_text())["networks"][0]["ready_s"] == 4.5


def test_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"timm/mobilenetv1_100": 1.0, "timm/mobilenetv2_100": 0.5}
    monkeypatch.setattr(zoo, "_in_a_process", lambda name, n, seconds, folder: _measured(name, n, times.get(name, 2.5)))
    monkeypatch.setattr(zoo, "fma_peak_gflops", lambda threads: 100.0)
    zoo.run([1], 0.1, "mobilenetv", tmp_path / "zoo.json", "", lambda _: None)
    content = tables.read(tmp_path / "zoo.json")
    rows = {row[0]: row for row in tables.zoo(content, 1).rows}
    assert rows["timm/mobilenetv1_100"][-3:] == ["**2.00**", "1.20", "4.5"]
    [row] = tables.zoo_summary(content).rows
    assert row[3].startswith("0.80 (")
    assert row[-1].startswith("4.5 (")


def test_what_happens_in_the_process(tmp_path: Path) -> None:
    """A network that nobody has: its process fails, and says why."""
    found = zoo._in_a_process("zebra", 1, 0.1, str(tmp_path))
    assert isinstance(found, Failure)
    assert "create: unknown model 'zebra'" in found.reason


def test_unknown_networks_and_wrong_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bench zoo: there is no network with 'zebra', only timm/mobilenetv1_100, "):
        zoo.run([1], 1.0, "zebra", tmp_path / "a.json", "", lambda _: None)
    with pytest.raises(ValueError, match=r"bench: threads must be positive, seconds above 0, got .* and 0"):
        zoo.run([1], 0.0, "", tmp_path / "a.json", "", lambda _: None)
