"""Benchmark records become tables that a reader can check by hand; losses are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from page_parts import Page
from visit import Visit

from sepconv.report import facts, suites, write_report

ROWS = (
    # case, pass, contender, threads, layout, ms
    ("3x3", "forward", "torch", 1, "contiguous", 8.0),
    ("3x3", "forward", "torch", 1, "channels_last", 6.0),
    ("3x3", "forward", "torch", 1, "another", 7.0),
    ("3x3", "forward", "sepconv", 1, "channels_last", 2.0),
    ("3x3", "grad_input", "torch", 1, "contiguous", 3.0),
    ("3x3", "grad_input", "sepconv", 1, "contiguous", 4.0),
    ("3x3", "forward", "sepconv", 2, "contiguous", 1.5),
    ("5x5", "forward", "torch", 1, "contiguous", 5.0),
)


def records(suite: str = "ops") -> list[dict[str, Any]]:
    names = ("case", "pass", "contender", "threads", "layout", "median_ms")
    extra = {"suite": suite, "low_ms": 1.0, "high_ms": 9.0, "macs": 10**6, "bytes": 10**6, "kernel": "k"}
    return [{**dict(zip(names, row, strict=True)), **extra} for row in ROWS]


def benchmark(folder: Path, name: str = "ops.json", **changes: Any) -> Path:
    machine = {"cpu": "a processor", "fma_peak_gflops": {"1": 50.0, "2": 90.0}, "memory_gb_per_s": {"2": 7.5}}
    content = {"machine": machine, "command": "sepconv bench ops", "records": records(), **changes}
    (folder / name).write_text(json.dumps(content))
    return folder / name


def test_best_layout_of_each_against_the_best_of_the_others() -> None:
    one, two = suites.suites([{"records": records()}])
    assert (one["threads"], one["contenders"]) == ("1", ["torch", "sepconv"])
    assert [(row["case"], row["pass"], row["times"], row["gain"]) for row in one["rows"]] == [
        ("3x3", "forward", [6.0, 2.0], 3.0),
        ("3x3", "grad input", [3.0, 4.0], 0.75),
        ("5x5", "forward", [5.0, None], None),
    ]
    assert (one["won"], one["compared"], one["mean"]) == (1, 2, pytest.approx(1.5))
    assert (two["threads"], two["compared"], two["mean"]) == ("2", 0, None)


def test_precisions_are_tables_of_their_own_and_wrong_contenders_are_compared_with_nothing() -> None:
    names = ("contender", "median_ms", "precision", "max_error")
    rows = [
        ("sepconv", 4.0, "float32", 0.1),
        ("torch", 6.0, "float32", 0.5),
        ("sepconv", 1.0, "int8", 0.1),
        ("torch", 2.0, "int8", 0.5),
        ("hasty", 0.5, "int8", 7.0),
    ]
    known = {"suite": "network", "case": "v1", "pass": "forward", "threads": 1, "macs": 10**6, "bytes": 10**6}
    content = [{"records": [known | dict(zip(names, row, strict=True)) for row in rows]}]
    usual, short = suites.suites(content)
    assert (usual["suite"], usual["mean"]) == ("network", pytest.approx(1.5))
    assert (short["suite"], short["contenders"]) == ("network, int8", ["sepconv", "torch", "hasty (wrong)"])
    assert (short["rows"][0]["gain"], short["rows"][0]["fastest"]) == (2.0, 1.0)
    assert [row["contender"] for row in facts.raw_records(content)][2:] == [
        "sepconv, int8",
        "torch, int8",
        "hasty, int8",
    ]


@pytest.mark.parametrize("value", [None, "1", -1.0, 0, float("nan")])
def test_a_time_that_is_none_is_no_row(value: object) -> None:
    assert suites.suites([{"records": [{**records()[0], "median_ms": value}]}]) == []


def test_a_benchmark_file_gets_its_page_beside_it(tmp_path: Path) -> None:
    page = write_report(benchmark(tmp_path))
    assert page == tmp_path / "ops.html"
    text = Page(page).text
    for expected in (
        "Benchmark ops",
        "sepconv is the fastest in 1 of 2",
        "50.0 (1 thread), 90.0 (2 threads)",
        "7.5 (2",
    ):
        assert expected in text
    assert "made separable" not in text


def test_a_folder_of_benchmark_files_gets_one_page(tmp_path: Path) -> None:
    benchmark(tmp_path)
    benchmark(tmp_path, "blocks.json", records=records("blocks"))
    (tmp_path / "unrelated.json").write_text("[1]")
    page = write_report(tmp_path)
    assert page == tmp_path / "report.html"
    assert "Benchmark blocks, ops" in Page(page).text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"^write_report: there is no \S+ops\.json$"),
        ("{", r"^write_report: \S+ops\.json is damaged \(.*\)$"),
        ('{"records": []}', r"^write_report: \S+ops\.json has no benchmark records; demo, .*$"),
    ],
)
def test_a_missing_or_damaged_benchmark_file_is_one_clear_line(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "ops.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "ops.json")


@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_opens_quietly_fits_and_sorts(browser: Any, tmp_path: Path, width: int) -> None:
    visit = Visit(browser, write_report(benchmark(tmp_path)), width, "dark")
    assert visit.page.evaluate("document.documentElement.scrollWidth") == width
    table = 'table[data-suite="ops"][data-threads="1"]'
    assert visit.numbers(f"{table} td.best data") == [2.0, 3.0, 5.0]
    visit.page.locator(f"{table} thead button").last.press("Enter")
    assert visit.numbers(f"{table} tr td:last-child data") == [0.75, 3.0]
    assert visit.complaints == []
    visit.page.close()
