"""The page that runs networks: what it holds, and in a browser that it answers as PyTorch does on the same pixels."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import live_page
import pytest
import torch
from PIL import Image
from torch import Tensor
from visit import Visit

from sepconv.data.images import read_images
from sepconv.device.wasm import PROVIDED
from sepconv.layers.borrowed import evaluating
from sepconv.report import write_report
from sepconv.report.records import LIVE

ASSETS = Path(write_report.__code__.co_filename).with_name("assets")
KINDS = [live_page.GREY, live_page.COLOURED]


def opened(browser: Any, path: Path, width: int = 1440, theme: str = "light") -> Visit:
    visit = Visit(browser, path, width, theme)
    visit.page.locator("#live-answers article .ms").nth(1).wait_for()
    return visit


def seen(visit: Visit) -> Tensor:
    """The bytes that the networks are given: (1, C, H, W)."""
    pixels = visit.page.evaluate("Array.from(live.pixels)")
    size, channels = visit.page.evaluate("[live.input.size, live.input.channels]")
    return torch.tensor(pixels, dtype=torch.uint8).view(1, size, size, channels).permute(0, 3, 1, 2)


def check_answers(visit: Visit, kind: str) -> None:
    """The three best classes and their probabilities are those of PyTorch."""
    card = live_page.CARDS[kind]
    for i, network in enumerate(live_page.networks(kind)):
        with torch.no_grad(), evaluating(network.model):
            expected = network.model(card.normalise(seen(visit))).softmax(1)[0]
        place = f'[data-network="network{i}"]'
        shown = dict(
            zip(
                visit.page.locator(f"{place} dt").all_inner_texts(),
                visit.numbers(f"{place} dd data"),
                strict=True,
            )
        )
        best = expected.topk(3)
        assert list(shown) == [card.classes[label] for label in best.indices.tolist()]
        assert list(shown.values()) == pytest.approx(best.values.tolist(), abs=2e-6)
        assert visit.page.locator(f"{place} .change").inner_text() == next(iter(shown))
        assert visit.numbers(f"{place} .ms")[0] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_opens_with_an_image_of_the_test_set(browser: Any, kind: str) -> None:
    visit = opened(browser, live_page.page(kind))
    data = live_page.data_of(kind)
    assert torch.equal(seen(visit), data.test.images.take(torch.tensor([0])))
    check_answers(visit, kind)
    label = data.classes[int(data.test.labels[0])]
    assert visit.page.locator("#seen-words").inner_text() == f"an image of the test set: {label}"
    assert visit.page.locator("#live-link").is_visible()
    assert visit.complaints == []
    assert [url.partition(":")[0] for url in visit.requests] == ["file"]
    visit.page.close()


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_file_is_prepared_as_the_library_does(browser: Any, kind: str, tmp_path: Path) -> None:
    card = live_page.CARDS[kind]
    visit = opened(browser, live_page.page(kind))
    for number, (height, width) in enumerate([(37, 53), (5, 31), (22, 22)]):
        file = tmp_path / f"{number}.png"
        pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(file)
        visit.page.set_input_files("#file", file)
        visit.page.wait_for_function("name => byId('seen-words').textContent === name", arg=file.name)
        assert card.preprocessing is not None
        assert card.preprocessing.fit is not None
        expected = read_images([file], card.input_shape[0], card.preprocessing.fit)
        # Sums of float32 and of float64 may lie on two sides of a half.
        assert (seen(visit).int() - expected.int()).abs().max() <= 1
        assert (seen(visit) != expected).float().mean() < 0.02
        check_answers(visit, kind)
    visit.page.close()


def test_a_drawing_is_answered(browser: Any) -> None:
    visit = opened(browser, live_page.page(live_page.GREY))
    paper = visit.page.locator("#paper")
    paper.scroll_into_view_if_needed()
    box = paper.bounding_box()
    assert box is not None
    mouse = visit.page.mouse
    mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.3 * box["height"])
    mouse.down()
    mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.7 * box["height"], steps=4)
    mouse.up()
    visit.page.wait_for_function("byId('seen-words').textContent === 'your drawing'")
    drawn = seen(visit)[0, 0].float()
    # A line down the middle, from the upper edge to the lower, wherever on the paper it was drawn.
    assert drawn[1:7, 3:5].min() > 150
    assert drawn[[0, 7], 3:5].min() > 50
    assert drawn[:, [0, 1, 6, 7]].max() == 0
    assert drawn[:, [2, 5]].max() < 60
    check_answers(visit, live_page.GREY)
    visit.page.locator("#clear").click()
    ink = "byId('paper').getContext('2d').getImageData(0, 0, 252, 252).data.filter((x, i) => i % 4 < 3 && x > 0).length"
    assert visit.page.evaluate(ink) == 0
    assert visit.complaints == []
    visit.page.close()


def test_what_is_no_image_is_named(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("no image")
    visit = opened(browser, live_page.page(live_page.GREY))
    visit.page.set_input_files("#file", file)
    visit.page.locator("#live-fault", has_text="words.txt is not an image that this browser can read.").wait_for()
    check_answers(visit, live_page.GREY)
    visit.page.close()


def test_nothing_leaves_the_page(browser: Any) -> None:
    visit = opened(browser, live_page.page(live_page.GREY))
    assert visit.page.evaluate("fetch('http://127.0.0.1:9/').then(() => false, () => true)")
    assert visit.page.evaluate("fetch('data:text/plain,x').then(() => false, () => true)")
    visit.page.close()


NO_VECTORS = "WebAssembly.instantiate = () => Promise.reject(new WebAssembly.CompileError('no vectors'))"


@pytest.mark.parametrize("without", ["WebAssembly = undefined", NO_VECTORS, ""])
def test_without_webassembly_or_scripts_the_page_is_what_it_was(browser: Any, without: str) -> None:
    context = browser.new_context(java_script_enabled=bool(without))
    if without:
        context.add_init_script(without)
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(live_page.page(live_page.GREY).as_uri())
    page.wait_for_timeout(300)
    assert page.locator("#live").is_hidden()
    assert page.locator("#live-link").is_hidden()
    assert page.locator("h1").inner_text() == "small"
    assert complaints == []
    context.close()


@pytest.mark.parametrize(("width", "theme"), [(390, "dark"), (1440, "light")])
def test_it_fits_and_is_accessible(browser: Any, width: int, theme: str) -> None:
    visit = opened(browser, live_page.page(live_page.GREY), width, theme)
    assert visit.page.evaluate("document.documentElement.scrollWidth") == width
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    faults = [one for one in axe.run(visit.page).response["violations"] if one["impact"] in ("serious", "critical")]
    assert [(fault["id"], fault["nodes"][0]["html"]) for fault in faults] == []
    visit.page.close()


def policy(page: str) -> str:
    [found] = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    return str(found)


def test_the_policy_allows_webassembly_only_where_there_is_any(tmp_path: Path) -> None:
    live = live_page.page(live_page.GREY)
    with_networks = live.read_text()
    (tmp_path / "result.json").write_bytes(live.with_name("result.json").read_bytes())
    without = write_report(tmp_path).read_text()
    assert "'wasm-unsafe-eval'" in policy(with_networks)
    assert "'wasm-unsafe-eval'" not in policy(without)
    assert policy(with_networks).startswith("default-src 'none'; img-src data:;")
    assert "WebAssembly" not in without
    assert 'id="live"' not in without
    assert len(with_networks) < len(without) + live.with_name(LIVE).stat().st_size + 25_000


@pytest.mark.parametrize("content", [{}, {"networks": []}, {"networks": 3}, {"networks": ["x"]}])
def test_a_file_without_networks_does_no_harm(content: Any, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"model": "small"}')
    (tmp_path / LIVE).write_text(json.dumps(content))
    assert "live-data" not in write_report(tmp_path).read_text()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"model": "small"}')
    (tmp_path / LIVE).write_text("[")
    with pytest.raises(ValueError, match=r"live\.json is damaged"):
        write_report(tmp_path)


def test_the_page_offers_every_function_that_networks_may_call() -> None:
    script = (ASSETS / "network.js").read_text()
    assert all(re.search(rf"\b{name}: ", script) for name in PROVIDED)
    for name in ("pixels.js", "network.js", "live.js"):
        text = (ASSETS / name).read_text()
        assert not any(
            word in text for word in ("fetch(", "XMLHttpRequest", "eval(", "import(", "innerHTML", "sendBeacon")
        )
