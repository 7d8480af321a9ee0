"""``sepconv bench network``: verify before time, absent contenders by name, and tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sepconv.bench import footprint, network, tables
from sepconv.bench.footprint import small_network
from sepconv.bench.network import Network, NetworkCase, source_of
from sepconv.bench.peers import CONTENDERS, Contender, absent

CASE = NetworkCase("v1 1.0-224", 2)
OURS = ["sepconv", "torch-nhwc"]


@pytest.fixture
def source(tmp_path: Path) -> Network:
    return Network("small", small_network, 16, tmp_path)


def few_scores(source: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "source_of", lambda name, folder: source)
    monkeypatch.setattr(network, "fma_peak_gflops", lambda threads: 100.0)


def test_the_networks_are_those_of_the_table(tmp_path: Path) -> None:
    assert {(case.network, case.batch) for case in network.CASES} == {
        (name, batch)
        for name in ("v1 1.0-224", "v1 0.5-160", "v1 0.25-128", "v2 1.0-224", "v2 0.5-160")
        for batch in (1, 8)
    }
    half = source_of("v2 0.5-160", tmp_path)
    assert half.images(2).shape == (2, 3, 160, 160)
    assert half.model(half.images(2)).shape == (2, 1000)


def test_weights_are_the_same_every_time_and_norms_are_at_random(tmp_path: Path, source: Network) -> None:
    again = Network("small", small_network, 16, tmp_path)
    x = source.images(3)
    assert torch.equal(source.model(x), again.model(x))
    norm: Any = source.model[1]  # type: ignore[index]
    assert not torch.equal(norm.weight, torch.ones(8))
    assert not torch.equal(norm.running_mean, torch.zeros(8))


def test_contenders_are_verified_timed_and_recorded(source: Network) -> None:
    found = list(network.run_case(CASE, source, 1, OURS, 0.001, {}))
    assert [(record.contender, record.layout) for record in found] == [("sepconv", "nchw"), ("torch-nhwc", "nhwc")]
    assert all(record.median_ms > 0 and 0 <= record.max_error <= 1 and record.samples >= 7 for record in found)
    assert found[0].kernel == "halide"
    assert {record.macs for record in found} == {2 * (8 * 8 * 8 * 27 + 64)}


def test_wrong_scores_are_never_timed(source: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Contender("wrong", (), (), "nchw", lambda source, x, threads: lambda: source.model(x) * 1.001)
    monkeypatch.setitem(CONTENDERS, "wrong", wrong)
    with pytest.raises(ValueError, match=r"bench network: wrong on v1 1.0-224 b2 differs from float64 by [\d.]+ times"):
        list(network.run_case(CASE, source, 1, [*OURS, "wrong"], 0.001, {}))


def test_absent_and_failing_contenders_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(source: Network, x: torch.Tensor, threads: int) -> Any:
        raise RuntimeError("no such operator\nmore")

    monkeypatch.setitem(CONTENDERS, "none", Contender("none", ("zebra_runtime",), (), "nchw", fails))
    monkeypatch.setitem(CONTENDERS, "fails", Contender("fails", ("torch",), (), "nchw", fails))
    few_scores(Network("small", small_network, 16, tmp_path), monkeypatch)
    path = tmp_path / "network.json"
    names = [*OURS, "none", "fails"]
    network.run([1], 0.001, "0.25-128 b1", names, False, path, "sepconv bench network", lambda _: None)
    content = json.loads(path.read_text())
    assert content["absent"] == {
        "none": "not installed: zebra_runtime",
        "fails": "failed: RuntimeError: no such operator",
    }
    assert {row["contender"] for row in content["records"]} == set(OURS)


def test_a_failure_of_ours_is_no_absence(source: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(source: Network, x: torch.Tensor, threads: int) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setitem(CONTENDERS, "sepconv", Contender("sepconv", (), (), "nchw", fails))
    with pytest.raises(RuntimeError, match="broken"):
        list(network.run_case(CASE, source, 1, OURS, 0.001, {}))


@pytest.mark.parametrize(
    ("message", "threads", "match", "names"),
    [
        ("there is no contender 'zebra', only sepconv, ", [1], "", ["zebra"]),
        ("there is no case with 'zebra'", [1], "zebra", []),
        ("threads must be positive", [0], "", []),
    ],
)
def test_wrong_arguments(tmp_path: Path, message: str, threads: list[int], match: str, names: list[str]) -> None:
    with pytest.raises(ValueError, match=message):
        network.run(threads, 1.0, match, names, False, tmp_path / "x.json", "", lambda _: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_footprint_counts_what_the_network_adds(tmp_path: Path) -> None:
    found = footprint.measure("v1 0.25-128", "torch-nchw", 1, 4 * 470_072, tmp_path).to_dict()
    assert found["cold_s"] > 0 < found["warm_s"]
    if found["memory_bytes"] is not None:
        assert found["over_weights_bytes"] == found["memory_bytes"] - 4 * 470_072
        assert 0 < found["memory_bytes"] < 100 * 2**20
    with pytest.raises(ValueError, match=r"bench network: zebra on small failed: .*KeyError"):
        footprint.measure("v1 0.25-128", "zebra", 1, 0, tmp_path)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "ncnn", "mnn", "executorch"])
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_other_runtimes_give_the_same_scores(source: Network, name: str) -> None:
    if reason := absent(CONTENDERS[name]):
        pytest.skip(reason)
    missing: dict[str, str] = {}
    assert [record.contender for record in network.run_case(CASE, source, 1, [name], 0.001, missing)] == [name]
    assert missing == {}


def _row(case: str, threads: int, contender: str, ms: float) -> dict[str, Any]:
    return {"case": case, "threads": threads, "contender": contender, "median_ms": ms, "macs": 10**9, "pass": "forward"}


def test_tables_compare_with_the_best_other() -> None:
    rows = [
        _row(case, n, name, ms / n)
        for case in ("v1 1.0-224 b1", "v1 0.5-160 b8")
        for n in (1, 2)
        for name, ms in (
            ("sepconv", 10.0),
            ("torch-compile", 20.0),
            ("torch-compile-sepconv", 12.5),
            ("openvino", 12.0),
        )
    ]
    content = {"records": rows, "machine": {"fma_peak_gflops": {"1": 400.0, "2": 800.0}}}
    table = str(tables.networks(content, 1))
    assert "| v1 1.0-224 b1 | 10.000 | 20.000 | 12.500 | 12.000 | **1.20** (openvino) | 50 % |" in table
    summary = str(tables.networks_summary(content))
    assert "| 1 | 1.20 |  | 1.20 | 1.60 |" in summary
    assert "| all |  |  | 1.20 | 1.60 |" in summary


def test_footprints_are_shown_over_the_weights() -> None:
    one = footprint.Footprint("v1 1.0-224", "sepconv", 2, 2**20, 1.234, 0.5, 3 * 2**20)
    assert "| v1 1.0-224 | sepconv | 2.0 | 1.23 | 0.50 |" in str(tables.footprints({"footprints": [one.to_dict()]}))
