"""The report in a real browser: it works by mouse and keyboard, is accessible, and its arithmetic is PyTorch's."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sample_run
import torch
from test_report import HOSTILE, SMALL, hostile
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv import explanation
from sepconv.report import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
CHROMIUM = shutil.which("chromium")
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PICTURES = Path(__file__).parents[1] / "artifacts"
WIDTHS = (390, 1440)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (make browser)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Visit:
    """One page opened from disk, with everything it complained about and every address it asked for."""

    def __init__(self, browser: Any, path: Path, width: int = 1440, theme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        if self.page.locator("#lab").count():
            self.page.locator("#layer option").first.wait_for(state="attached")
            self.page.locator("#compare .value data").first.wait_for()

    def numbers(self, selector: str) -> list[float]:
        values = self.page.locator(f"{selector}").evaluate_all("found => found.map(one => one.value)")
        return [float(value) for value in values]

    def style(self, selector: str, name: str) -> str:
        return self.page.locator(selector).first.evaluate(f"one => getComputedStyle(one).{name}")


@pytest.fixture(scope="module")
def digits_page(digits_run) -> Path:
    return write_report(digits_run[0])


@pytest.fixture(scope="module")
def mobilenet_page(mobilenet_run) -> Path:
    return write_report(mobilenet_run[0])


@pytest.fixture
def visit(browser, digits_page) -> Iterator[Visit]:
    visit = Visit(browser, digits_page)
    yield visit
    visit.page.close()
    assert visit.complaints == []


@pytest.mark.parametrize(
    ("run", "width", "theme"),
    [
        ("digits", 390, "light"),
        ("digits", 390, "dark"),
        ("digits", 1440, "light"),
        ("digits", 1440, "dark"),
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
        assert visit.numbers(f'.bars[data-metric="{metric}"] data') == expected
    for index, row in enumerate(result["layers"], 1):
        cells = [row["rank"], row["error"], *row["params"], *row["macs"], *row["ms"]]
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
    heading = visit.page.locator("#layer-table thead th").nth(5)
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
    assert [page.locator(f'.bars[data-metric="{key}"]').is_visible() for key in ("params", "macs", "ms")] == [1, 0, 0]
    page.get_by_label("Time", exact=True).click()
    assert [page.locator(f'.bars[data-metric="{key}"]').is_visible() for key in ("params", "macs", "ms")] == [0, 0, 1]
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


class Truth:
    """What the two layers of a pair compute for the normal network's input, in float64."""

    def __init__(self, normal: nn.Module, separable: nn.Module, image: Tensor, name: str) -> None:
        conv, layer = normal.get_submodule(name), separable.get_submodule(name)
        self.x = self._run(normal, conv, image)
        path, _, index = name.rpartition(".")
        norms = [model.get_submodule(f"{path}.{int(index) + 1}").double() for model in (normal, separable)]
        self.padded = F.pad(self.x, conv._reversed_padding_repeated_twice)[0]
        self.weight, self.depthwise = conv.weight.double(), layer.depthwise.weight.double()
        scales = [(norm.weight / (norm.running_var + norm.eps).sqrt())[None, :, None, None] for norm in norms]
        geometry = (conv.stride, conv.padding, conv.dilation)
        self.hidden = F.conv2d(self.x, self.depthwise, None, *geometry, conv.in_channels)
        self.normal = norms[0](F.conv2d(self.x, self.weight, None, *geometry))[0]
        self.separable = norms[1](F.conv2d(self.hidden, layer.pointwise.weight.double()))[0]
        self.weight = self.weight * scales[0].transpose(0, 1)
        self.pointwise = layer.pointwise.weight.double().flatten(1) * scales[1].flatten()[:, None]
        self.biases = [
            norm(torch.zeros_like(y[None, :, :1, :1])).flatten()
            for norm, y in zip(norms, (self.normal, self.separable), strict=True)
        ]

    @staticmethod
    def _run(model: nn.Module, conv: nn.Module, image: Tensor) -> Tensor:
        seen: list[Tensor] = []
        handle = conv.register_forward_pre_hook(lambda module, args: seen.append(args[0].double()))
        model.eval()(image[None])
        handle.remove()
        return seen[0]


@pytest.fixture(scope="module")
def truths(digits_run) -> dict[str, Truth]:
    _, normal, separable, image = digits_run
    stored = json.loads((digits_run[0] / "explanation.json").read_text())["layers"]
    with torch.no_grad():
        return {
            layer["name"]: Truth(copy.deepcopy(normal), copy.deepcopy(separable), image, layer["name"])
            for layer in stored
        }


def close(found: Any, expected: Tensor) -> None:
    # The page computes in float64 with numbers that were stored as float32.
    torch.testing.assert_close(torch.as_tensor(found, dtype=torch.float64), expected.double(), rtol=2e-5, atol=2e-5)


def test_arithmetic_of_every_layer_is_pytorchs(visit, truths):
    page = visit.page
    options = page.locator("#layer option").all_inner_texts()
    assert options == list(truths)
    assert len(options) == 6
    for name in options:
        page.locator("#layer").select_option(label=name)
        truth = truths[name]
        for k in (0, page.locator("#channel option").count() - 1):
            page.locator("#channel").select_option(value=str(k))
            channel = int(page.locator("#channel option").nth(k).inner_text().split()[0])
            maps = page.evaluate("['normal', 'separable', 'difference'].map(name => [...state[name].values])")
            expected = [
                truth.normal[channel],
                truth.separable[channel],
                truth.separable[channel] - truth.normal[channel],
            ]
            for found, map_ in zip(maps, expected, strict=True):
                close(found, map_.flatten())
            error = float(expected[2].norm() / expected[0].norm())
            assert visit.numbers("#relative-error")[0] == pytest.approx(error, rel=1e-3)
        hidden = page.evaluate("state.hiddenMaps.map(map => [...map.values])")
        close(hidden, truth.hidden[0].flatten(1))


def check_pixel(visit: Visit, truth: Truth, o: int, row: int, column: int) -> None:
    """Every number that the page shows for a pixel."""
    c = visit.page.evaluate("state.channel")
    h = visit.page.evaluate("state.hidden")
    patch = truth.padded[c, row : row + 3, column : column + 3].flatten()
    for part, weight in (("normal", truth.weight[o, c]), ("depthwise", truth.depthwise[h, 0])):
        close(visit.numbers(f"#{part}-products .x"), patch)
        close(visit.numbers(f"#{part}-products .weight"), weight.flatten())
        close(visit.numbers(f"#{part}-products .product"), patch * weight.flatten())
        close(visit.numbers(f"#{part}-products .sum"), (patch * weight.flatten()).sum()[None])
    window = truth.padded[:, row : row + 3, column : column + 3]
    parts = (window * truth.weight[o]).sum((1, 2))
    shown = visit.page.locator("#normal-sum data[data-channel]").evaluate_all(
        "all => all.map(one => Number(one.dataset.channel))"
    )
    assert len(shown) == min(8, len(parts))
    close(visit.numbers("#normal-sum data[data-channel]"), parts[shown])
    others = parts.sum() - parts[shown].sum()
    if len(parts) > len(shown):
        close(visit.numbers("#normal-sum .others"), others[None])
    close(visit.numbers("#normal-sum data.bias"), truth.biases[0][o][None])
    close(visit.numbers("#normal-sum data.result"), truth.normal[o, row, column][None])
    check_mixture(visit, truth, o, row, column)
    values = [truth.normal[o, row, column], truth.separable[o, row, column]]
    close(visit.numbers("#compare .value data"), torch.stack([*values, values[1] - values[0]]))


def check_mixture(visit: Visit, truth: Truth, o: int, row: int, column: int) -> None:
    rows = visit.page.locator("#pointwise-products tr[data-hidden]")
    shown = rows.evaluate_all("all => all.map(one => Number(one.dataset.hidden))")
    vector = truth.hidden[0, :, row, column]
    products = vector * truth.pointwise[o]
    assert len(shown) == min(10, len(vector))
    assert set(shown) == set(products.abs().topk(len(shown)).indices.tolist())
    close(visit.numbers("#pointwise-products data.x"), vector[shown])
    close(visit.numbers("#pointwise-products data.weight"), truth.pointwise[o, shown])
    close(visit.numbers("#pointwise-products data.product"), products[shown])
    close(visit.numbers("#pointwise-products data.others"), (products.sum() - products[shown].sum())[None])
    close(visit.numbers("#pointwise-products data.bias"), truth.biases[1][o][None])
    close(visit.numbers("#pointwise-products data.result"), truth.separable[o, row, column][None])


def output_channel(visit: Visit) -> int:
    return visit.page.evaluate("state.layer.channels[state.k]")


def test_pointing_at_a_pixel_shows_its_numbers(visit, truths):
    page = visit.page
    name = page.locator("#layer option").first.inner_text()
    for selector in (
        "#normal-map .map",
        "#depthwise-tiles li:nth-child(3) .map.output",
        "#compare div:nth-child(2) .map",
    ):
        page.locator(selector).scroll_into_view_if_needed()
        box = page.locator(selector).bounding_box()
        for row, column in ((0, 0), (5, 2), (7, 7)):
            page.mouse.move(box["x"] + box["width"] * (column + 0.5) / 8, box["y"] + box["height"] * (row + 0.5) / 8)
            assert page.evaluate("[state.row, state.column]") == [row, column]
            check_pixel(visit, truths[name], output_channel(visit), row, column)


def test_pointing_at_an_input_map_chooses_the_pixel_whose_patch_is_there(visit):
    box = visit.page.locator("#normal-tiles li:first-child .map.input").bounding_box()
    # An image of 8x8 has 10x10 values with its padding: output pixel (r, c) looks at the middle (r + 1, c + 1).
    visit.page.locator("#normal-tiles").scroll_into_view_if_needed()
    box = visit.page.locator("#normal-tiles li:first-child .map.input").bounding_box()
    visit.page.mouse.move(box["x"] + box["width"] * 0.55, box["y"] + box["height"] * 0.25)
    assert visit.page.evaluate("[state.row, state.column]") == [1, 4]


def test_pixels_and_channels_by_keyboard(visit, truths):
    page = visit.page
    name = page.locator("#layer option").first.inner_text()
    big = page.locator("#normal-map button")
    big.focus()
    start = page.evaluate("[state.row, state.column]")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.evaluate("[state.row, state.column]") == [start[0] + 1, start[1] - 1]
    for _ in range(12):
        page.keyboard.press("ArrowUp")
    assert page.evaluate("state.row") == 0
    assert page.evaluate("document.activeElement.closest('#normal-map') !== null")
    tile = page.locator("#normal-tiles li[data-channel] button").nth(2)
    tile.press("Enter")
    assert tile.get_attribute("aria-pressed") == "true"
    assert page.locator("#normal-tiles [aria-pressed=true]").count() == 1
    assert page.evaluate("state.channel") == int(page.locator("#normal-tiles li").nth(2).get_attribute("data-channel"))
    check_pixel(visit, truths[name], output_channel(visit), *page.evaluate("[state.row, state.column]"))
    second = page.locator("#depthwise-tiles li button").nth(5)
    second.press("Space")
    assert second.get_attribute("aria-pressed") == "true"
    check_pixel(visit, truths[name], output_channel(visit), *page.evaluate("[state.row, state.column]"))
    page.locator("#row").press("End")
    page.locator("#column").press("Home")
    assert page.evaluate("[state.row, state.column]") == [7, 0]
    check_pixel(visit, truths[name], output_channel(visit), 7, 0)
    assert "row 7, column 0" in page.locator("#spoken").inner_text()


def test_layer_and_channel_by_keyboard(visit, truths):
    page = visit.page
    page.locator("#layer").press("End")
    page.locator("#channel").press("ArrowDown")
    name, o = page.evaluate("[state.layer.name, state.layer.channels[state.k]]")
    assert name == list(truths)[-1]
    assert page.evaluate("state.k") == 1
    row, column = page.evaluate("[state.row, state.column]")
    check_pixel(visit, truths[name], o, row, column)
    counts = [int(page.locator(f"#{key}").input_value()) for key in "kcom"]
    layer = page.evaluate(
        "[state.layer.kernel[0], state.layer.in_channels, state.layer.out_channels, state.layer.depth_multiplier]"
    )
    assert counts == layer


@pytest.mark.parametrize("width", WIDTHS)
def test_multiplications_are_counted(browser, digits_page, width):
    visit = Visit(browser, digits_page, width)
    for key, value in (("k", 5), ("c", 32), ("o", 200), ("m", 3)):
        visit.page.locator(f"#{key}").fill(str(value))
    assert visit.numbers("#count-normal data") == [5 * 5 * 32 * 200]
    assert visit.numbers("#count-separable data") == [5 * 5 * 32 * 3 + 32 * 3 * 200]
    assert visit.numbers("#count-ratio data")[0] == pytest.approx(3 * (1 / 200 + 1 / 25))
    assert "3 · (1/200 + 1/25) = 0.135" in visit.page.locator("#count-formula").inner_text()
    lengths = [visit.page.locator(f"#bar-{side}").bounding_box()["width"] for side in ("normal", "separable")]
    assert lengths[1] / lengths[0] == pytest.approx(0.135, abs=0.01)
    visit.page.locator("#m").press("ArrowRight")
    assert visit.numbers("#count-separable data") == [5 * 5 * 32 * 4 + 32 * 4 * 200]
    visit.page.close()


def test_a_tap_chooses_a_pixel_on_a_phone(browser, digits_page):
    context = browser.new_context(viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(digits_page.as_uri())
    page.locator("#compare .value data").first.wait_for()
    view = page.locator("#compare div:first-child .map")
    view.scroll_into_view_if_needed()
    box = view.bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] * 0.95, box["y"] + box["height"] * 0.05)
    assert page.evaluate("[state.row, state.column]") == [0, 7]
    context.close()


def test_a_large_layer_is_shown_in_its_window(browser, mobilenet_page, mobilenet_run):
    stored = json.loads((mobilenet_run[0] / "explanation.json").read_text())["layers"][0]
    visit = Visit(browser, mobilenet_page)
    window = stored["window"]
    assert (
        f"middle {window['height']}\N{MULTIPLICATION SIGN}{window['width']}"
        in visit.page.locator("#layer-words").inner_text()
    )
    _, normal, _, image = mobilenet_run
    with torch.no_grad():
        maps = normal.blocks[0][:2](normal.stem(image[None]))[0]
    top, left = window["top"], window["left"]
    truth = maps[stored["channels"][0], top : top + window["height"], left : left + window["width"]]
    found = visit.page.evaluate("[...state.normal.values]")
    torch.testing.assert_close(torch.tensor(found).view_as(truth), truth, rtol=1e-4, atol=1e-4)
    assert visit.complaints == []
    visit.page.close()


def test_hostile_strings_stay_text(browser, tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    explained = explanation.collect(model, sample_run.separated(model, 1), torch.randn(2, 7, 7), label=HOSTILE)
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
