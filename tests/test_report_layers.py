"""The part of the page that computes: its controls work, and its arithmetic is PyTorch's."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import sample_run
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from visit import WIDTHS, Visit

from sepconv import PointwiseConv2d, SeparableConv2d
from sepconv.report import write_report
from sepconv.runs import layer_data


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


def test_starts_at_the_pixel_where_most_happens(visit, truths):
    page = visit.page
    for name in page.locator("#layer option").all_inner_texts():
        page.locator("#layer").select_option(label=name)
        values = torch.tensor(page.evaluate("[...state.parts[state.channel].values]")).abs()
        row, column, width = page.evaluate("[state.row, state.column, state.layer.width]")
        assert values[row * width + column] == values.max() > 0
        assert any(visit.numbers("#normal-products .product"))


def test_pixels_and_channels_by_keyboard(visit, truths):
    page = visit.page
    name = page.locator("#layer option").first.inner_text()
    big = page.locator("#normal-map button")
    big.focus()
    page.evaluate("choosePixel(3, 3)")
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


def test_activations_are_pytorchs(visit):
    x = torch.cat([torch.linspace(-9, 9, 181), torch.tensor([-40.0, -6.5, 6.5, 40.0])]).double()
    functions = {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
    for name in ("gelu", "gelu_tanh", "silu", "hardswish", "sigmoid", "relu6"):
        truth = functions.get(name, getattr(F, name, None))(x)
        found = visit.page.evaluate("([name, xs]) => xs.map(ACTIVATIONS[name])", [name, x.tolist()])
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), truth, rtol=1e-12, atol=1e-13, msg=name)


LAYERS = {
    "gelu_between": ({"padding": 1}, {"activation": "gelu", "depth_multiplier": 2}),
    "gelu_tanh_between": ({"padding": 1}, {"activation": lambda: nn.GELU(approximate="tanh")}),
    "norm_and_relu6_between": ({"stride": 2}, {"activation": "relu6", "norm": "batch"}),
    "reflected_wide_strides": ({"padding": 2, "padding_mode": "reflect", "stride": (1, 3)}, {}),
    "circular_dilated": ({"padding": (2, 0), "padding_mode": "circular", "dilation": (2, 1)}, {"depth_multiplier": 3}),
    "same": ({"padding": "same", "dilation": 2}, {}),
    "replicated_wide_filter": ({"padding": (0, 2), "padding_mode": "replicate", "kernel_size": (1, 5)}, {}),
}


@pytest.mark.parametrize(("geometry", "inside"), LAYERS.values(), ids=LAYERS)
def test_maps_of_unusual_layers_are_pytorchs(browser, tmp_path, geometry, inside):
    geometry = {"kernel_size": 3, **geometry}
    normal = nn.Sequential(nn.Conv2d(5, 7, **geometry)).eval()
    layer = SeparableConv2d(5, 7, **geometry, **inside).eval()
    image = torch.randn(5, 13, 11)
    explained = layer_data.collect(normal, nn.Sequential(layer), image)
    assert explained["left_out"] == []
    sample_run.write(tmp_path, {"model": "a_model"}, explained)
    visit = Visit(browser, write_report(tmp_path))
    with torch.no_grad():
        between = (part for part in (layer.depthwise_norm, layer.activation) if part is not None)
        z = nn.Sequential(layer.depthwise, *between)(image[None])
        after = layer.pointwise(z) if layer.pointwise_norm is None else layer.pointwise_norm(layer.pointwise(z))
        truths = normal(image[None])[0], after[0], z[0]
    for k in range(visit.page.locator("#channel option").count()):
        visit.page.locator("#channel").select_option(value=str(k))
        channel = visit.page.evaluate("state.layer.channels[state.k]")
        close(visit.page.evaluate("[...state.normal.values]"), truths[0][channel].flatten())
        close(visit.page.evaluate("[...state.separable.values]"), truths[1][channel].flatten())
    close(visit.page.evaluate("state.hiddenMaps.map(map => [...map.values])"), truths[2].flatten(1))
    assert visit.complaints == []
    visit.page.close()


BOTTLENECKS = {
    "plain": {"padding": 1},
    "strided": {"padding": 1, "stride": (2, 1)},
    "circular_dilated": {"padding": 2, "padding_mode": "circular", "dilation": (2, 1)},
    "wide_filter": {"kernel_size": (1, 5)},
}


@pytest.mark.parametrize("geometry", BOTTLENECKS.values(), ids=BOTTLENECKS)
def test_every_number_of_a_bottleneck_is_pytorchs(browser, tmp_path, geometry):
    geometry = {"kernel_size": 3, **geometry}
    normal = nn.Sequential(nn.Conv2d(23, 7, **geometry)).eval()
    reduce, layer = PointwiseConv2d(23, 12, bias=False), SeparableConv2d(12, 7, **geometry)
    separable = nn.Sequential(nn.Sequential(reduce, layer)).eval()
    image = torch.randn(23, 13, 11)
    explained = layer_data.collect(normal, separable, image)
    sample_run.write(tmp_path, {"model": "a_model", "form": "bottleneck"}, explained)
    visit = Visit(browser, write_report(tmp_path))
    page = visit.page
    with torch.no_grad():
        padded = F.pad(image[None], normal[0]._reversed_padding_repeated_twice, mode=PADS[normal[0].padding_mode])
        mixed = reduce(padded)[0].double()
        hidden = layer.depthwise(reduce(image[None]))[0]
        after = separable(image[None])[0]
    close(page.evaluate("[...state.layer.depthwise_input]"), mixed.flatten())
    close(page.evaluate("state.hiddenMaps.map(map => [...map.values])"), hidden.flatten(1))
    assert page.locator("#lab h3").all_inner_texts()[1] == "Pointwise convolution: mix the channels first"
    assert page.locator("#depthwise-tiles li").count() == page.locator("#reduce-tiles li").count() - 1 == 8
    page.locator("#channel").select_option(value="1")
    close(page.evaluate("[...state.separable.values]"), after[page.evaluate("state.layer.channels[1]")].flatten())
    chosen = page.locator("#depthwise-tiles li").nth(3)
    chosen.locator("button").press("Enter")
    r = int(chosen.get_attribute("data-hidden"))
    assert page.evaluate("state.hidden") == r
    assert page.locator("#reduce-map .name").inner_text() == f"mixture {r}"
    page.evaluate("choosePixel(2, 4)")
    (kh, kw), (sh, sw), (dh, dw) = normal[0].kernel_size, normal[0].stride, normal[0].dilation
    row, column = 2 * sh + kh // 2 * dh, 4 * sw + kw // 2 * dw
    close(visit.numbers("#reduce-products data.result"), mixed[r, row, column][None])
    products = padded[0, :, row, column] * reduce.weight[r].detach().flatten()
    shown = [int(one) for one in page.locator("#reduce-products tr[data-hidden] th").all_inner_texts()]
    assert set(shown) == set(products.abs().topk(10).indices.tolist())
    close(visit.numbers("#reduce-products data.product"), products[shown])
    close(visit.numbers("#reduce-products data.others"), (products.sum() - products[shown].sum())[None])
    patch = mixed[r, 2 * sh : 2 * sh + dh * kh : dh, 4 * sw : 4 * sw + dw * kw : dw].flatten()
    close(visit.numbers("#depthwise-products .x"), patch)
    close(visit.numbers("#depthwise-products .with-bias"), hidden[r, 2, 4][None])
    assert visit.complaints == []
    page.close()


PADS = {"zeros": "constant", "circular": "circular"}


def test_strongest_mixtures_of_a_bottleneck_are_shown_and_its_multiplications_counted(browser, tmp_path):
    normal = nn.Sequential(nn.Conv2d(4, 3, 3))
    layer = SeparableConv2d(11, 3, 3)
    separable = nn.Sequential(nn.Sequential(PointwiseConv2d(4, 11, bias=False), layer))
    image = torch.randn(4, 9, 9)
    sample_run.write(tmp_path, {"model": "a_model", "form": "bottleneck"}, layer_data.collect(normal, separable, image))
    visit = Visit(browser, write_report(tmp_path))
    with torch.no_grad():
        hidden = layer.depthwise(separable[0][0](image[None]))[0]
        strength = layer.pointwise.weight[visit.page.evaluate("state.layer.channels[0]")].abs().flatten()
        strength = strength * hidden.flatten(1).norm(dim=1)
    tiles = visit.page.locator("#depthwise-tiles li")
    shown = tiles.evaluate_all("all => all.map(one => Number(one.dataset.hidden))")
    assert set(shown) == set(strength.topk(8).indices.tolist())
    assert visit.page.evaluate("state.hidden") == strength.argmax()
    assert visit.numbers("#count-separable data") == [11 * (4 + 9 + 3)]
    assert visit.numbers("#count-normal data") == [9 * 4 * 3]
    assert "11 · (4 + 9 + 3) / (9 · 4 · 3) = 1.63" in visit.page.locator("#count-formula").inner_text()
    visit.page.close()


def test_convolutions_not_shown_are_named_with_the_reason(browser, tmp_path):
    normal = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 1))
    explained = layer_data.collect(normal, sample_run.separated(normal, 1), torch.randn(2, 7, 7))
    sample_run.write(tmp_path, {"model": "a_model"}, explained)
    visit = Visit(browser, write_report(tmp_path))
    summary = visit.page.locator("#explanation summary")
    assert "not shown here (1)" in summary.inner_text()
    assert not visit.page.locator("#explanation .facts").is_visible()
    summary.press("Enter")
    assert visit.page.locator("#explanation .facts").inner_text().split("\n") == ["1", "it is pointwise already"]
    visit.page.close()
