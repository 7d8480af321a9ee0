"""The report in a real browser: it opens quietly, works by mouse and keyboard, and says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sample_run
import torch
from test_report_html import HOSTILE, SMALL, hostile
from torch import nn
from visit import Visit

from sepconv.report import write_report
from sepconv.runs import layer_data

PICTURES = Path(__file__).parents[1] / "artifacts"


@pytest.mark.parametrize(
    ("run", "width", "theme"),
    [
        pytest.param("digits", 390, "light", marks=pytest.mark.slow),
        ("digits", 390, "dark"),
        ("digits", 1440, "light"),
        pytest.param("digits", 1440, "dark", marks=pytest.mark.slow),
        ("mobilenet", 390, "dark"),
        ("mobilenet", 1440, "light"),
    ],
)
def test_opens_quietly_and_fits(request, browser, run, width, theme):
    visit = Visit(browser, request.getfixturevalue(f"{run}_page"), width, theme)
    assert visit.complaints == []
    assert all(url.startswith(("file:", "data:image/png")) for url in visit.requests)
    assert sum(url.startswith("file:") for url in visit.requests) == 1
    assert visit.page.evaluate("document.documentElement.scrollWidth") == width
    PICTURES.mkdir(exist_ok=True)
    visit.page.screenshot(path=PICTURES / f"{run}-{width}-{theme}.png", full_page=True)
    visit.page.close()


@pytest.mark.parametrize(("width", "theme"), [(390, "dark"), (1440, "light")])
def test_is_accessible(browser, digits_page, width, theme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    visit = Visit(browser, digits_page, width, theme)
    visit.page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
    found = axe.run(visit.page).response
    assert len(found["passes"]) > 20
    serious = [fault for fault in found["violations"] if fault["impact"] in ("serious", "critical")]
    assert [(fault["id"], fault["nodes"][0]["html"]) for fault in serious] == []
    visit.page.close()


def test_numbers_equal_the_result(visit, digits_run):
    result = json.loads((digits_run[0] / "result.json").read_text())
    normal, separable = result["normal"], result["separable"]
    cards = {"Convolution weights": "conv_params", "Multiplications": "macs", "Accuracy": "accuracy"}
    for name, key in cards.items():
        assert visit.numbers(f'.card[data-quantity="{name}"] data') == [normal[key], separable[key]]
    times = [min(network["latency_ms"].values()) for network in (normal, separable)]
    assert visit.numbers('.card[data-quantity="Time per image"] data') == times
    assert visit.numbers(".stages .number data") == [stage["accuracy"] for stage in result["stages"]]
    for key, metric in (("params", "params"), ("macs", "macs"), ("ms", "ms")):
        expected = [value for layer in result["layers"] for value in layer[key]]
        expected += result["other_ms"] if key == "ms" else []
        assert visit.numbers(f'.bars[data-metric="{metric}"] data') == expected
    for index, row in enumerate(result["layers"], 1):
        cells = [row["rank"], row["error_closed_form"], row["error"], *row["params"], *row["macs"], *row["ms"]]
        found = visit.numbers(f"#layer-table tbody tr:nth-child({index}) data")
        assert found == [value for value in cells if value is not None]
    for network, matrix in result["confusion"].items():
        assert visit.numbers(f'.confusion[data-network="{network}"] data') == [n for row in matrix for n in row]
    assert visit.page.locator(".gallery li").count() == len(result["disagreements"])
    assert all(visit.page.locator(".gallery img").evaluate_all("all => all.map(one => one.naturalWidth === 8)"))


def test_bars_are_as_long_as_their_numbers(visit, digits_run):
    result = json.loads((digits_run[0] / "result.json").read_text())
    lengths = visit.page.locator('.bars[data-metric="params"] .bar').evaluate_all(
        "all => all.map(one => one.getBoundingClientRect().width)"
    )
    counts = [value for layer in result["layers"] for value in layer["params"]]
    for length, count in zip(lengths, counts, strict=True):
        assert length == pytest.approx(max(2, max(lengths) * count / max(counts)), abs=0.6)


def names(visit: Visit) -> list[str]:
    return visit.page.locator("#layer-table tbody th").all_inner_texts()


def test_tables_sort_by_mouse_and_keyboard(visit, digits_run):
    layers = json.loads((digits_run[0] / "result.json").read_text())["layers"]
    heading = visit.page.locator("#layer-table thead th").nth(6)
    expected = [row["name"] for row in sorted(layers, key=lambda row: row["params"][0])]
    heading.locator("button").click()
    assert names(visit) == expected
    assert heading.get_attribute("aria-sort") == "ascending"
    heading.locator("button").press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    assert [name for name in names(visit) if name != expected[0]] == expected[:0:-1]
    # What has no number stands after those that have one.
    visit.page.locator("#layer-table thead th").nth(4).locator("button").press("Space")
    assert names(visit)[-1] == next(row["name"] for row in layers if row["error"] is None)
    assert heading.get_attribute("aria-sort") == "none"


def test_bars_follow_the_choice(visit):
    page = visit.page
    note = page.locator("p[data-metric=ms]")
    assert not note.is_visible()
    assert [page.locator(f'.bars[data-metric="{key}"]').is_visible() for key in ("params", "macs", "ms")] == [1, 0, 0]
    page.get_by_label("Time", exact=True).click()
    assert [page.locator(f'.bars[data-metric="{key}"]').is_visible() for key in ("params", "macs", "ms")] == [0, 0, 1]
    assert note.is_visible()
    page.get_by_label("Time", exact=True).press("ArrowLeft")
    assert [page.locator(f'.bars[data-metric="{key}"]').is_visible() for key in ("params", "macs", "ms")] == [0, 1, 0]


def canvas_of(visit: Visit) -> str:
    return visit.page.locator("#normal-map canvas").evaluate("one => one.toDataURL()")


def test_theme_can_be_changed_and_maps_follow(visit):
    page, before = visit.page, canvas_of(visit)
    assert visit.style("body", "backgroundColor") == "rgb(251, 250, 248)"
    page.locator("#theme").press("Enter")
    assert visit.style("body", "backgroundColor") == "rgb(20, 22, 26)"
    assert page.locator("#theme").inner_text() == "Light"
    assert canvas_of(visit) != before
    page.locator("#theme").click()
    assert visit.style("body", "backgroundColor") == "rgb(251, 250, 248)"
    assert canvas_of(visit) == before
    page.emulate_media(color_scheme="dark")
    assert visit.style("body", "backgroundColor") == "rgb(251, 250, 248)", "the reader's choice counts"


def test_prints_in_light_with_its_tables_open(browser, digits_page):
    visit = Visit(browser, digits_page, theme="dark")
    visit.page.emulate_media(media="print")
    # The width of A4 paper between its margins.
    visit.page.set_viewport_size({"width": 718, "height": 1000})
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 718
    assert visit.style("main", "color") == "rgb(29, 32, 36)"
    assert not visit.page.locator("nav").is_visible()
    visit.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert visit.page.locator("details:not([open])").count() == 0
    visit.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert visit.page.locator("details[open]").count() == 0
    assert visit.page.pdf(format="A4").startswith(b"%PDF")
    visit.page.close()


def test_hostile_strings_stay_text(browser, tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    explained = layer_data.collect(model, sample_run.separated(model, 1), torch.randn(2, 7, 7), label=HOSTILE)
    explained["layers"][0]["name"] = HOSTILE
    sample_run.write(tmp_path, hostile(SMALL), explained)
    visit = Visit(browser, write_report(tmp_path))
    assert visit.complaints == []
    assert visit.page.locator("h1").inner_text() == f"{HOSTILE}, made separable"
    assert visit.page.locator("#layer option").inner_text() == HOSTILE
    assert HOSTILE in visit.page.locator("#layer-words").inner_text()
    assert HOSTILE in visit.page.locator(".gallery .label").inner_text()
    assert all(url.startswith(("file:", "data:image/png")) for url in visit.requests)
    visit.page.close()


def test_the_policy_of_the_page_forbids_network_and_foreign_scripts(browser, digits_page):
    visit = Visit(browser, digits_page)
    blocked = visit.page.evaluate("fetch('http://127.0.0.1:9/').then(() => false, () => true)")
    visit.page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
    )
    assert blocked
    assert visit.page.evaluate("window.ran === undefined")
    assert any("Content Security Policy" in complaint for complaint in visit.complaints)
    visit.page.close()


def test_the_smallest_result_opens(browser, tmp_path):
    sample_run.write(tmp_path, {"model": "a_model"})
    visit = Visit(browser, write_report(tmp_path))
    assert visit.complaints == []
    assert visit.numbers("#count-normal data") == [9 * 64 * 128]
    visit.page.close()
