"""The report as a file: what it holds, what it leaves out, and what it does with damaged or hostile input."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import sample_run
import torch
from page_parts import Page
from torch import nn

from sepconv.report import formats, plots, records, write_report
from sepconv.runs import layer_data

HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)>\"'&{{7*7}}<!--"
SMALL = {
    "model": "a_model",
    "data": "a data set",
    "command": "sepconv convert a_model",
    "seconds": 61.5,
    "normal": {
        "conv_params": 9000,
        "params": 9500,
        "macs": 90000,
        "accuracy": 0.9,
        "latency_ms": {"torch": 4.0, "sepconv": 3.0},
        "threads": 1,
    },
    "separable": {
        "conv_params": 1000,
        "params": 1500,
        "macs": 9000,
        "accuracy": 0.875,
        "latency_ms": {"torch": {"median_ms": 2.0}, "sepconv": 1.5},
        "threads": 2,
        "kernels": {"separable_conv": "a_kernel"},
    },
    "precisions": sample_run.PRECISIONS,
    "stages": [{"name": "original", "accuracy": 0.9, "seconds": 3.0}, {"name": "converted", "accuracy": 0.5}],
    "layers": [
        {
            "name": "features.0",
            "kind": "normal",
            "kernel": [3, 3],
            "in_channels": 3,
            "out_channels": 8,
            "rank": None,
            "error": None,
            "params": [216, 216],
            "macs": [2160, 2160],
            "bytes": [800, 800],
            "ms": [0.5, 0.5],
            "reason": "the first layer",
        },
        {
            "name": "features.1",
            "kind": "separable",
            "kernel": [3, 3],
            "in_channels": 8,
            "out_channels": 16,
            "rank": 2,
            "error": 0.125,
            "params": [1152, 400],
            "macs": [11520, 4000],
            "bytes": [9000, 4000],
            "ms": [1.5, 0.25],
            "reason": "",
        },
    ],
    "curves": [
        {"epoch": 1, "phase": "original", "train_loss": 2.0, "test_accuracy": 0.5, "lr": 0.1},
        {"epoch": 2, "phase": "original", "train_loss": 1.0, "test_accuracy": 0.75, "lr": 0.1},
        {"epoch": 1, "phase": "distilled", "train_loss": 0.5, "train_accuracy": None, "test_accuracy": 0.875},
    ],
    "classes": ["cat", "dog"],
    "confusion": {"normal": [[10, 1], [2, 7]], "separable": [[9, 2], [3, 6]]},
    "test_images": 20,
    "disagreement_count": 3,
    "disagreements": [
        {"image": "data:image/png;base64,iVBORw0KGgo=", "name": "a.png", "label": 0, "normal": 0, "separable": 1}
    ],
    "machine": {"cpu": "a processor", "cores": 2, "fma_peak_gflops": 100.0, "memory_gb_per_s": 20.0},
    "versions": {"torch": "2.13"},
}


def report_of(folder: Path, result: object = SMALL, explained: object = None) -> Page:
    sample_run.write(folder, result, explained)
    return Page(write_report(folder))


@pytest.fixture(scope="module")
def small_explanation() -> dict:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    return layer_data.collect(model, sample_run.separated(model, 1), torch.randn(2, 7, 7), label="seven")


def test_one_complete_file_that_refers_to_nothing_else(tmp_path, small_explanation):
    page = report_of(tmp_path, SMALL, small_explanation)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["explanation.json", "report.html", "result.json"]
    links = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")]
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert {tag for tag, _ in page.elements}.isdisjoint({"link", "iframe", "object", "form", "base"})
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {link[1:] for link in links if link.startswith("#")}
    assert targets <= set(ids)
    assert not any(word in page.scripts[-1] for word in ("fetch(", "XMLHttpRequest", "eval(", "import(", "innerHTML"))


def test_the_page_says_what_the_result_says(tmp_path):
    text = report_of(tmp_path).text.replace("\N{NO-BREAK SPACE}", " ")
    for expected in (
        "a_model, made separable",
        "1/9.0 of the convolution weights and 1/10.0 of the multiplications",
        "Accuracy went from 90.00 % to 87.50 %",
        "Time per image: 3.00 ms before, 1.50 ms after",
        "of 9.50 k in all",
        f"{formats.MINUS}2.50 points",
        "answers that changed 3 of 20",
        "layers left as they were 1 of 2",
        "1 min 2 s",
        "sepconv, 2 threads",
        "separable_conv: a_kernel",
        "features.1",
        "8 → 16",
        "12.50 %",
        "the first layer",
        "cat",
        "a.png",
        "sepconv convert a_model",
        "a processor",
    ):
        assert expected in text, expected


def test_the_formulas_are_those_of_the_form(tmp_path):
    separable, bottleneck = "C · M + C · M · O", "C · R + k·k · R + R · O"
    text = report_of(tmp_path).text
    assert separable in text
    assert "rank M" in text
    assert bottleneck not in text
    text = report_of(tmp_path, {**SMALL, "form": "bottleneck"}).text
    assert bottleneck in text
    assert "rank R" in text
    assert separable not in text


def test_stages_say_what_they_are_and_that_one_gained_nothing(tmp_path):
    names = ("original", "closed form", "converted", "distilled", "of my own")
    result = {**SMALL, "stages": [{"name": name, "accuracy": 0.9} for name in names]}
    text = report_of(tmp_path, result).text
    for expected in (
        "as it was trained",
        "from the weights alone",
        "no training yet",
        "to answer as the original does",
    ):
        assert expected in text
    assert "gained nothing" not in text
    result["stages"][3]["accuracy"] = 0.85
    text = report_of(tmp_path, result).text
    assert "to answer as the original does; here it gained nothing" in text
    assert "was undone" not in text
    result["kept"] = "converted"
    assert "here it gained nothing and was undone" in report_of(tmp_path, result).text


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"test_images": 359}, "On 359 test images."),
        ({"test_images": 359, "held_out_images": 143}, "On 143 images held out from conversion and dist"),
        ({"held_out_images": 0, "notes": ["Too <few> of them."]}, "On the training images."),
        ({}, ""),
    ],
    ids=["old record", "held out", "too few", "unknown"],
)
def test_stages_say_which_images_they_are_of(tmp_path, entries, said):
    result = {key: value for key, value in SMALL.items() if key != "test_images"}
    text = report_of(tmp_path, {**result, **entries}).text
    assert said in text
    assert ("held out" in text) == (entries.get("held_out_images", 0) > 0)
    assert ("Too <few> of them." in text) == ("notes" in entries)


def test_an_accuracy_that_stays_is_said_to_stay(tmp_path):
    result = copy.deepcopy(SMALL)
    result["separable"]["accuracy"] = result["normal"]["accuracy"] - 1e-9
    text = report_of(tmp_path, result).text.replace("\N{NO-BREAK SPACE}", " ")
    assert "Accuracy stayed at 90.00 %." in text
    assert "accuracy unchanged" in text


@pytest.mark.parametrize("missing", [key for key in SMALL if key != "model"])
def test_a_missing_part_is_left_out(tmp_path, missing):
    result = {key: value for key, value in SMALL.items() if key != missing}
    assert "a_model" in report_of(tmp_path, result).text


KINDS = [None, "text", 7, [1, "x", None], {"a": [1]}, [[1]], [{}], {}, float("nan"), True, 10**400, 1e308, -1e-300]


@pytest.mark.parametrize("value", KINDS, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("key", [key for key in SMALL if key != "model"])
def test_a_part_of_another_kind_does_no_harm(tmp_path, key, value):
    assert "a_model" in report_of(tmp_path, {**SMALL, key: value}).text


@pytest.mark.parametrize("value", [10**400, 1e308, -1e308, -1e-300, 0, -1])
def test_numbers_beyond_any_measurement_do_no_harm(tmp_path, value):
    def spoilt(part):
        if isinstance(part, dict):
            return {key: spoilt(entry) for key, entry in part.items()}
        if isinstance(part, list):
            return [spoilt(entry) for entry in part]
        return value if isinstance(part, (int, float)) else part

    for key in SMALL:
        assert "a_model" in report_of(tmp_path, {**SMALL, key: spoilt(SMALL[key])}).text
    assert "a_model" in report_of(tmp_path, spoilt(SMALL)).text


def test_numbers_that_are_none_are_missing_not_shown(tmp_path):
    result = copy.deepcopy(SMALL)
    result["normal"]["accuracy"] = "<b>zebra</b>"
    result["layers"][1] |= {"error": float("inf"), "params": ["1", 2], "ms": [1]}
    page = report_of(tmp_path, result)
    assert "zebra" not in page.text
    assert "Infinity" not in page.text
    assert "b" not in {tag for tag, _ in page.elements}


def test_only_the_name_of_the_model(tmp_path):
    page = report_of(tmp_path, {"model": "a_model"})
    assert "a_model" in page.text
    assert "made separable" not in page.text
    assert formats.MISSING not in page.text


def test_a_training_alone_is_shown_without_comparison(tmp_path):
    result = {"model": "a_model", "normal": SMALL["normal"], "curves": SMALL["curves"]}
    page = report_of(tmp_path, result)
    assert "made separable" not in page.text
    assert [attributes["value"] for tag, attributes in page.elements if tag == "data"] == [
        "9000",
        "9500",
        "90000",
        "0.9",
        "4.0",
        "3.0",
    ]


DAMAGED = {
    "missing": (None, r"^write_report: \S+ has neither result\.json nor a benchmark file; .* bench the other$"),
    "truncated": ('{"model": "a', r"^write_report: \S+result\.json is damaged \(Unterminated string .*\)$"),
    "a_list": ("[1]", r"^write_report: \S+result\.json is damaged \(not an object but list\)$"),
    "not_text": ("\ud800", r"^write_report: \S+result\.json is damaged \(.*\)$"),
    "too_deep": ("[" * 200_000, r"^write_report: \S+result\.json is damaged \(.*\)$"),
    "another_file": ('{"a": 1}', r'^write_report: \S+result\.json has no name under "model", so it is not a result$'),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_missing_or_damaged_result_is_one_clear_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "result.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=message) as raised:
        write_report(tmp_path)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "report.html").exists()


def test_other_damaged_files_are_named(tmp_path, small_explanation):
    sample_run.write(tmp_path, SMALL)
    for name, content, message in (
        ("explanation.json", "{", r"explanation\.json is damaged"),
        ("explanation.json", json.dumps({**small_explanation, "x": float("nan")}), r"explanation\.json holds a number"),
        ("speed.json", "{", r"speed\.json is damaged"),
        ("log.jsonl", '{"epoch": 1}\n{"epo\n{"epoch": 3}\n', r"log\.jsonl is damaged in line 2"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=rf"^write_report: .*{message}"):
            write_report(tmp_path)
        (tmp_path / name).unlink()


def test_an_old_report_stays_when_a_new_one_fails(tmp_path):
    report_of(tmp_path)
    old = (tmp_path / "report.html").read_bytes()
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "result.json"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write into any folder")
def test_a_folder_that_cannot_be_written(tmp_path):
    sample_run.write(tmp_path, SMALL)
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"cannot write .*report\.html"):
        write_report(tmp_path)


def hostile(value: object) -> object:
    """The same data with every string replaced, those that must be something else excepted."""
    if isinstance(value, str):
        return value if value.startswith("data:") else HOSTILE
    if isinstance(value, list):
        return [hostile(one) for one in value]
    if isinstance(value, dict):
        kept = {"latency_ms", "kernels", "machine", "versions"}
        return {
            key: {f"{HOSTILE}{i}": hostile(one) for i, one in enumerate(entry.values())}
            if key in kept
            else hostile(entry)
            for key, entry in value.items()
        }
    return value


def test_hostile_strings_stay_text(tmp_path, small_explanation):
    explained = copy.deepcopy(small_explanation)
    explained["image"]["label"] = explained["layers"][0]["name"] = HOSTILE
    benchmark = {
        "records": [{"case": HOSTILE, "contender": HOSTILE, "kernel": HOSTILE, "median_ms": 1.0, "macs": 9, "bytes": 9}]
    }
    (tmp_path / "speed.json").write_text(json.dumps(benchmark))
    page = report_of(tmp_path, hostile(SMALL), explained)
    assert [tag for tag, _ in page.elements if tag == "script"] == ["script", "script"]
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "49" not in page.text
    assert page.text.count(HOSTILE) > 25
    assert json.loads(page.scripts[0]) == explained
    assert {
        tag: attributes["src"][:21] for tag, attributes in page.elements if tag == "img" and "src" in attributes
    } == {"img": "data:image/png;base64"}


@pytest.mark.parametrize(
    "image", ["http://a.org/x.png", "data:text/html;base64,AAAA", 'data:image/png;base64,A"A', None, 3]
)
def test_only_png_data_becomes_a_picture(tmp_path, image):
    result = {**SMALL, "disagreements": [{**SMALL["disagreements"][0], "image": image}]}
    page = report_of(tmp_path, result)
    assert not [attributes for tag, attributes in page.elements if tag == "img" and attributes.get("src")]
    assert "a.png" in page.text


def test_the_log_gives_the_curves_where_the_result_has_none(tmp_path):
    result = {key: value for key, value in SMALL.items() if key != "curves"}
    (tmp_path / "log.jsonl").write_text(
        '{"epoch": 1, "train_loss": 3.5}\n{"epoch": 2, "train_loss": 2.5}\n{"epoch": 3, "tr'
    )
    page = report_of(tmp_path, result)
    assert "train loss, epoch 2: 2.50" in page.text
    assert "epoch 3" not in page.text


def test_benchmark_records_are_shown_and_give_points(tmp_path):
    record = {
        "case": "3x3",
        "contender": "sepconv",
        "pass": "forward",
        "threads": 1,
        "median_ms": 2.0,
        "macs": 4e6,
        "bytes": 1e6,
    }
    other = {**record, "contender": "torch", "median_ms": 4.0}
    (tmp_path / "speed.json").write_text(json.dumps({"machine": {"fma_peak_gflops": 50.0}, "records": [record, other]}))
    (tmp_path / "unrelated.json").write_text('{"records": 3}')
    page = report_of(tmp_path, {"model": "a_model"})
    assert "Benchmark records (2)" in page.text
    found = plots.roofline([], {}, records.read(tmp_path).benchmarks)
    assert [(p["group"], p["gflops"], p["share"]) for p in found["points"]] == [
        ("sepconv", pytest.approx(4.0), pytest.approx(0.08)),
        ("other kernels", pytest.approx(2.0), pytest.approx(0.04)),
    ]


def test_a_mobilenet_report_is_below_twelve_megabytes(mobilenet_page):
    assert 1e6 < mobilenet_page.stat().st_size < 12e6
