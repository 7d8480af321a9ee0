"""How the report counts, writes numbers and places what it draws."""

from __future__ import annotations

import pytest
import torch
from test_report_html import SMALL, report_of

from sepconv.report import charts, facts, formats, plots


def test_confusions_of_many_classes_are_listed_by_frequency():
    before, after = (torch.eye(30, dtype=torch.long).mul(50) for _ in range(2))
    before[3, 4], after[3, 4], after[20, 1] = 5, 2, 9
    result = {"confusion": {"normal": before.tolist(), "separable": after.tolist()}, "classes": ["name"] * 4}
    found = facts.confusion(result)
    assert found["matrices"] == {}
    assert found["pairs"] == [
        {"label": "20", "predicted": "name", "counts": [0, 9]},
        {"label": "name", "predicted": "4", "counts": [5, 2]},
    ]


def test_confusions_of_some_of_many_classes_have_their_names():
    matrix = {"normal": [[3, 1], [0, 2]], "separable": [[4, 0], [0, 2]]}
    found = facts.confusion({"confusion": matrix, "confusion_classes": [2, 700], "classes": ["a", "b", "c"] * 300})
    assert found["names"] == ["c", "b"]
    assert found["matrices"] == matrix
    assert found["pairs"] == [{"label": "c", "predicted": "b", "counts": [1, 0]}]


def test_curves_stand_where_their_numbers_are():
    loss, accuracy = plots.training(SMALL["curves"])
    assert [len(series.marks) for series in loss.series] == [2, 1]
    assert [name for _, name in loss.dividers] == ["original", "distilled"]
    assert (loss.y.low, accuracy.y.high) == (0, 90)
    first, second = loss.series[0].marks
    assert first[:2] == (charts.LEFT, charts.TOP)
    middle = (charts.LEFT + charts.WIDTH - charts.RIGHT) / 2
    assert second[:2] == (middle, (charts.TOP + charts.HEIGHT - charts.BOTTOM) / 2)
    assert accuracy.series[-1].marks[0][2] == "test accuracy, epoch 3: 87.5"


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.0, 1.0], ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ([2.3, 97.0], ["0", "20", "40", "60", "80", "100"]),
        ([5.0], ["4.4", "4.6", "4.8", "5", "5.2", "5.4", "5.6"]),
        ([-3e-5, 2e-5], ["-3e-05", "-2e-05", "-1e-05", "0", "1e-05", "2e-05"]),
    ],
)
def test_ticks_are_round_and_hold_the_values(values, labels):
    axis = charts.linear(values, "")
    assert [label for _, label in axis.ticks] == labels
    assert axis.low <= min(values)
    assert axis.high >= max(values)


def test_logarithmic_axis_places_powers_evenly():
    axis = charts.logarithmic([3.0, 700.0], "")
    assert axis.logarithmic
    assert (axis.low, axis.high) == (2, 1024)
    wide = charts.logarithmic([0.02, 5e5], "")
    assert (wide.low, wide.high) == (0.01, 1e6)
    assert wide.share(100.0) == pytest.approx(0.5)


def test_roofline_counts_operations_and_limits():
    layers = facts.layers(SMALL)
    found = plots.roofline(layers, SMALL, [])
    point = next(p for p in found["points"] if p["name"] == "features.1" and p["style"] == "separable")
    assert point["intensity"] == pytest.approx(2 * 4000 / 4000)
    assert point["gflops"] == pytest.approx(2 * 4000 / 0.25e-3 * 1e-9)
    # Two threads: a limit of 200 Gop/s, but 2 operations a byte at 20 GB/s give 40.
    assert point["share"] == pytest.approx(point["gflops"] / 40)
    assert found["peak"] == 200
    names = {series.name for series in found["chart"].series}
    assert names == {"arithmetic limit", "memory limit", "normal network", "separable network"}


def test_limits_measured_by_thread_count_hold_for_those_threads_alone():
    machine = {"fma_peak_gflops": {"1": 90.0, "2": 150.0}, "memory_gb_per_s": {"2": 20.0}}
    found = plots.roofline(facts.layers(SMALL), {**SMALL, "machine": machine}, [])
    assert (found["threads"], found["peak"], found["bandwidth"]) == (2, 150.0, 20.0)
    # The normal network ran on one thread, for which no speed of the memory is known.
    normal, separable = (next(p for p in found["points"] if p["style"] == style) for style in ("normal", "separable"))
    assert normal["share"] == pytest.approx(normal["gflops"] / 90)
    assert separable["share"] == pytest.approx(separable["gflops"] / min(150, 20 * separable["intensity"]))


def test_steps_outside_the_layers_close_the_list_of_times():
    *layers, rest = facts.bars(facts.layers(SMALL), [2.0, 0.5])[-1]["lines"]
    assert [line["name"] for line in layers] == ["features.0", "features.1"]
    assert (rest["name"], rest["values"], rest["shares"]) == ("all other steps", (2.0, 0.5), [100, 25])
    assert len(facts.bars(facts.layers(SMALL))[-1]["lines"]) == 2
    assert all(line["name"] != rest["name"] for line in facts.bars(facts.layers(SMALL), [2.0, 0.5])[0]["lines"])


def test_roofline_without_a_measured_machine_has_points_and_no_limits():
    found = plots.roofline(facts.layers(SMALL), {**SMALL, "machine": {}}, [])
    assert {series.name for series in found["chart"].series} == {"normal network", "separable network"}
    assert {point["share"] for point in found["points"]} == {None}
    assert plots.roofline([], SMALL, []) == {}


@pytest.mark.parametrize("value", [None, "7", True, float("nan"), float("inf"), [1]])
def test_what_is_no_number_is_a_dash(value):
    for written in (formats.count, formats.percent, formats.milliseconds, formats.duration, formats.figures):
        assert written(value) == formats.MISSING
    assert formats.share(value, 1) == formats.points(1, value) == formats.MISSING


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (0.0, "0"),
        (999, "999"),
        (999.96, "1000"),
        (1234.5, "1234"),
        (0.00012345, "0.000123"),
        (1e-7, "1.00e-07"),
    ],
)
def test_three_figures(value, expected):
    assert formats.figures(value) == expected
    assert formats.figures(-value) in (f"-{expected}", expected)


def test_the_page_shows_numbers_of_fewer_bits_or_why_not(tmp_path):
    said = " ".join(report_of(tmp_path).text.replace("\N{NO-BREAK SPACE}", " ").split())
    assert "network numbers time per call bytes of weights accuracy" in said
    assert "normal float32 4.00 ms 38.0 k 90.00 %" in said
    assert "separable bfloat16 1.00 ms 3.00 k 87.00 %" in said
    assert "bfloat16: a why" in said
    assert "separable int8 moves too far" in said
    lost = [{key: value for key, value in row.items() if key != "accuracy"} for row in SMALL["precisions"]]
    for row in lost[:2]:
        row["error"] = 0.125
    assert "relative error" in report_of(tmp_path, {**SMALL, "precisions": lost}).text
    assert "In fewer bits" not in report_of(tmp_path, {**SMALL, "precisions": []}).text
