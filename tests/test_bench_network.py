"""``sepconv bench network``: verify before time, absent contenders by name, and tables."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sepconv.bench import footprint, network, tables
from sepconv.bench.footprint import small_network
from sepconv.bench.network import Network, NetworkCase, source_of
from sepconv.bench.peers import BY_PRECISION, CONTENDERS, PRECISIONS, Contender, absent

CASE = NetworkCase("v1 1.0-224", 2)
OURS = [CONTENDERS[name] for name in ("sepconv", "torch-nhwc")]


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


def test_wrong_scores_are_never_timed(source: Network) -> None:
    wrong = Contender("wrong", (), (), "nchw", lambda source, x, threads: lambda: source.model(x) * 1.001)
    with pytest.raises(ValueError, match=r"bench network: wrong on v1 1.0-224 b2 differs from float64 by [\d.]+ times"):
        list(network.run_case(CASE, source, 1, [*OURS, wrong], 0.001, {}))


def test_absent_and_failing_contenders_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(source: Network, x: torch.Tensor, threads: int) -> Any:
        raise RuntimeError("no such\noperator\n\nmore")

    monkeypatch.setitem(CONTENDERS, "none", Contender("none", ("zebra_runtime",), (), "nchw", fails))
    monkeypatch.setitem(CONTENDERS, "fails", Contender("fails", ("torch",), (), "nchw", fails))
    few_scores(Network("small", small_network, 16, tmp_path), monkeypatch)
    path = tmp_path / "network.json"
    names = [*(one.name for one in OURS), "none", "fails"]
    network.run([1], 0.001, "0.25-128 b1", names, ["float32"], False, path, "sepconv bench network", lambda _: None)
    content = json.loads(path.read_text())
    assert content["absent"] == {
        "none": "not installed: zebra_runtime",
        "fails on small": "failed: RuntimeError: no such operator",
    }
    assert {row["contender"] for row in content["records"]} == {"sepconv", "torch-nhwc"}


def test_who_fails_on_one_network_is_asked_again_for_the_next(tmp_path: Path, source: Network) -> None:
    asked = []

    def fails(source: Network, x: torch.Tensor, threads: int) -> Any:
        asked.append(source.name)
        raise RuntimeError("no such operator")

    other, missing = Network("other", small_network, 16, tmp_path), {}
    for one in (source, other, source):
        assert not list(network.run_case(CASE, one, 1, [Contender("fails", ("torch",), (), "nchw", fails)], 1, missing))
    assert asked == ["small", "other"]
    assert list(missing) == ["fails on small", "fails on other"]


def test_memory_is_measured_without_the_network_that_the_contender_was_made_from(source: Network) -> None:
    alive: list[bool] = []

    def build(source: Network, x: torch.Tensor, threads: int) -> Any:
        weights = weakref.ref(source.model)
        return lambda: alive.append(weights() is not None)

    footprint._run_once(source, Contender("fleeting", (), (), "nchw", build, of_module=True), 1)
    assert (alive[0], any(alive[1:])) == (True, False)


def test_a_failure_of_ours_is_no_absence(source: Network) -> None:
    def fails(source: Network, x: torch.Tensor, threads: int) -> Any:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        list(network.run_case(CASE, source, 1, [Contender("sepconv", (), (), "nchw", fails)], 0.001, {}))


@pytest.mark.parametrize(
    ("message", "threads", "match", "names", "precisions"),
    [
        ("there is no contender 'zebra', only sepconv, ", [1], "", ["zebra"], ["float32", "int8"]),
        ("there is no contender 'ncnn', only sepconv, ", [1], "", ["ncnn"], ["int8"]),
        ("there is no case with 'zebra'", [1], "zebra", [], ["float32"]),
        ("threads must be positive", [0], "", [], ["float32"]),
        ("precisions are float32, bfloat16, int8, got float16", [1], "", [], ["float16"]),
        ("precisions are float32, bfloat16, int8, got none", [1], "", [], []),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, message: str, threads: list[int], match: str, names: list[str], precisions: list[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        network.run(threads, 1.0, match, names, precisions, False, tmp_path / "x.json", "", lambda _: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_footprint_counts_what_the_network_adds(tmp_path: Path) -> None:
    found = footprint.measure("v1 0.25-128", CONTENDERS["torch-nchw"], 1, 4 * 470_072, tmp_path).to_dict()
    assert found["cold_s"] > 0 < found["warm_s"]
    if found["memory_bytes"] is not None:
        assert found["over_weights_bytes"] == found["memory_bytes"] - 4 * 470_072
        assert 0 < found["memory_bytes"] < 100 * 2**20
    build = CONTENDERS["torch-nchw"].build
    with pytest.raises(ValueError, match=r"bench network: zebra on small failed: .*KeyError"):
        footprint.measure("v1 0.25-128", Contender("zebra", (), (), "nchw", build), 1, 0, tmp_path)


def _foreign() -> list[Contender]:
    every = [one for known in BY_PRECISION.values() for one in known.values()]
    return [one for one in every if one.packages]


@pytest.mark.parametrize("contender", _foreign(), ids=lambda one: one.title.replace(" ", "-"))
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_other_runtimes_give_the_same_scores(source: Network, contender: Contender) -> None:
    """In fewer bits nearly the same; and of other images other scores."""
    if reason := absent(contender):
        pytest.skip(reason)
    missing: dict[str, str] = {}
    case = NetworkCase("v1 1.0-224", 1) if contender.single else CASE
    [record] = network.run_case(case, source, 1, [contender], 0.001, missing)
    assert (record.contender, missing) == (contender.name, {})
    assert record.max_error <= 1
    assert record.top1 is not None
    assert record.top1 >= (1 if contender.precision == "float32" else 0.75)


def short(name: str, precision: str, call: Any) -> Contender:
    return Contender(name, (), (), "nchw", call, precision=precision)


def rounded(source: Network, x: torch.Tensor, threads: int) -> Any:
    return lambda: source.model(x.bfloat16().float())


def nothing(source: Network, x: torch.Tensor, threads: int) -> Any:
    return lambda: torch.zeros(len(x), 8)


def test_every_row_says_how_far_its_answers_agree(source: Network) -> None:
    """A fast wrong one shows, and one that answers to the same images always."""

    def first(source: Network, x: torch.Tensor, threads: int) -> Any:
        return partial(source.model, x.clone())

    kinds = [short("rounded", "bfloat16", rounded), short("nothing", "bfloat16", nothing)]
    kinds.append(short("first", "bfloat16", first))
    rows = {record.contender: record.to_dict() for record in network.run_case(CASE, source, 1, kinds, 0.001, {})}
    assert rows["rounded"]["top1"] >= 0.9
    assert 0 < rows["rounded"]["relative_error"] < 0.1
    assert rows["rounded"]["max_error"] <= 1 < rows["nothing"]["max_error"]
    for wrong in ("nothing", "first"):
        assert rows[wrong]["top1"] < 0.6
        assert rows[wrong]["relative_error"] > 0.5
    assert {row["precision"] for row in rows.values()} == {"bfloat16"}
    [exact] = network.run_case(CASE, source, 1, [CONTENDERS["torch-nhwc"]], 0.001, {})
    assert exact.top1 == 1
    assert exact.relative_error is not None
    assert exact.relative_error < 1e-5


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_ours_may_not_be_wrong_in_any_precision(source: Network, precision: str) -> None:
    with pytest.raises(ValueError, match=f"bench network: sepconv {precision} on v1 1.0-224 b2 differs from float64"):
        list(network.run_case(CASE, source, 1, [short("sepconv", precision, nothing)], 0.001, {}))


def test_precisions_are_measured_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_scores(Network("small", small_network, 16, tmp_path), monkeypatch)
    monkeypatch.setitem(BY_PRECISION, "int8", {"rounded": short("rounded", "int8", rounded)})
    monkeypatch.setitem(BY_PRECISION["bfloat16"], "rounded", short("rounded", "bfloat16", rounded))
    path, names = tmp_path / "network.json", ["torch-nhwc", "rounded"]
    network.run([1], 0.001, "0.25-128 b1", names, PRECISIONS, False, path, "sepconv bench network", lambda _: None)
    content = json.loads(path.read_text())
    found = [(row["precision"], row["contender"]) for row in content["records"]]
    wide = [("float32", "torch-nhwc"), ("bfloat16", "torch-nhwc"), ("bfloat16", "rounded"), ("int8", "rounded")]
    assert found == wide
    assert [row["bytes"] for row in content["records"]] == sorted([row["bytes"] for row in content["records"]])[::-1]
    assert tables.precisions(content) == list(PRECISIONS)


def test_every_precision_has_contenders_and_ours(tmp_path: Path) -> None:
    names = {kind: list(known) for kind, known in BY_PRECISION.items()}
    assert all("sepconv" in known for known in names.values())
    assert set(names["bfloat16"]) >= {"openvino", "openvino-default", "torch-nhwc-autocast", "torch-compile-autocast"}
    assert set(names["int8"]) == {"sepconv", "openvino", "onnxruntime", "executorch", "torch-compile-pt2e"}


def test_contenders_in_bfloat16_take_and_give_float32(source: Network) -> None:
    x = source.images(2)
    truth = source.model(x).detach()
    for name in ("torch-nhwc", "torch-nhwc-autocast"):
        y = BY_PRECISION["bfloat16"][name].build(source, x, 1)().detach()
        assert y.dtype is torch.float32
        assert 0 < float((y - truth).abs().max() / truth.abs().max()) < 0.05


def test_calibration_has_none_of_the_images_that_are_measured_with(source: Network) -> None:
    known = torch.cat([source.images(8), *source.calibration(), source.held_out()]).flatten(1)
    assert len(known.unique(dim=0)) == len(known)
    assert source.scores.sub(source.scores.mean(0)).argmax(1).unique().numel() > 3


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


def test_tables_by_precision_leave_wrong_contenders_out_of_the_best() -> None:
    rows = [
        _row("v1 1.0-224 b1", n, name, ms)
        | {"precision": precision, "max_error": error, "top1": top1, "relative_error": 1 - top1}
        for n in (1, 2)
        for precision, name, ms, error, top1 in (
            ("float32", "sepconv", 10.0, 0.1, 1.0),
            ("float32", "openvino", 11.0, 0.1, 1.0),
            ("int8", "sepconv", 4.0, 0.1, 0.9),
            ("int8", "openvino", 5.0, 0.5, 0.875),
            ("int8", "hasty", 1.0, 7.0, 0.25),
        )
    ]
    content = {"records": rows, "machine": {"fma_peak_gflops": {"1": 400.0, "2": 800.0}}}
    assert "| v1 1.0-224 b1 | 4.000 | 5.000 | 1.000~ | **1.25** (openvino) |" in str(
        tables.networks(content, 1, "int8")
    )
    assert "| v1 1.0-224 b1 | 10.000 | 11.000 | **1.10** (openvino) | 50 % |" in str(tables.networks(content, 1))
    summary = str(tables.networks_summary(content))
    assert "| 1, int8 | 1.25 |  | 1.25 |  |" in summary
    assert "| all, int8 |" in summary
    assert "| v1 1.0-224 b1 | 10.000 | 4.000 | **2.50** |" in str(tables.shorter(content, 2))
    assert "| hasty, int8 | 25.0% (25.0%) | 0.75 (0.75) |" in str(tables.agreement(content))
    assert "| sepconv, float32 | 100.0% (100.0%) |" in str(tables.agreement(content))
    without = content | {"records": [row for row in rows if row["contender"] != "sepconv"]}
    assert "| v1 1.0-224 b1 | 11.000 |  |  |" in str(tables.networks(without, 1))
    assert tables.networks_summary(without).rows == []


def test_what_dynamo_compiled_is_built_after_everybody_who_exports(source: Network) -> None:
    """Each ``torch.export`` forgets what ``torch.compile`` made, whose packed weights cannot be made again."""
    built: list[str] = []

    def contender(name: str) -> Contender:
        def build(source: Network, x: Tensor, threads: int) -> Callable[[], Tensor]:
            built.append(name)
            return lambda: source.model(x)

        return Contender(name, (), (), "nchw", build)

    list(network.run_case(CASE, source, 1, [contender(n) for n in ("torch-compile-x", "a", "b")], 0.001, {}))
    assert built == ["a", "b", "torch-compile-x"]
