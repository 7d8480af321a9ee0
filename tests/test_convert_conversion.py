from __future__ import annotations

import copy
import json

import pytest
import torch
from convertible import NETWORKS, Shared, conv, convert, images, plain, resnet, trained
from torch import Tensor, nn

from sepconv import SeparableConv1d, SeparableConv2d, SeparableConv3d
from sepconv.compile import CompiledModel
from sepconv.convert import Plan, closed_form
from sepconv.convert.forms import FORMS
from sepconv.convert.ranks import cost
from sepconv.convert.ranks.cost import latencies
from sepconv.convert.sites import find_sites, record
from sepconv.convert.work import PARTS, Work
from sepconv.leaves import Inputs

STAYED = "the budget is better spent on other layers"


@pytest.mark.parametrize("method", ["svd", "least_squares", "sequential"])
@pytest.mark.parametrize("name", NETWORKS)
def test_full_rank_changes_nothing(name: str, method: str) -> None:
    model = trained(NETWORKS[name])
    new, plan = convert(model, images(), method=method, depth_multiplier=25)
    x = images(9, 17)
    torch.testing.assert_close(new(x), model(x), rtol=1e-9, atol=1e-10)
    assert not any(type(m) is nn.Conv2d and m.kernel_size != (1, 1) and m.groups == 1 for m in new.modules())
    assert all(row.rank == min(row.out_channels, row.kernel_size[0] ** 2) for row in plan.converted)
    assert all(stage["output_error"] < 1e-15 for stage in plan.stages)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_original_is_untouched(name: str) -> None:
    model = NETWORKS[name]().double().train()
    state = copy.deepcopy(model.state_dict())
    new, _ = convert(model, images(), depth_multiplier=1)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(m.training for m in [*model.modules(), *new.modules()])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *new.modules()])
    assert not {id(p) for p in model.parameters()} & {id(p) for p in new.parameters()}
    assert all(p.requires_grad for p in [*model.parameters(), *new.parameters()])


def test_modes_of_single_modules_are_kept() -> None:
    model = plain().double().train()
    model[1].eval()
    new, _ = convert(model, images(), depth_multiplier=1)
    assert [m.training for m in new.children()] == [m.training for m in model.children()]
    assert new[0].depthwise.training
    frozen = plain().double().eval().requires_grad_(False)
    new, _ = convert(frozen, images(), depth_multiplier=1)
    assert not any(p.requires_grad for p in new.parameters())
    assert not any(m.training for m in new.modules())


def test_a_shared_module_stays_shared() -> None:
    new, plan = convert(trained(Shared), images(), depth_multiplier=2)
    assert new.first is new.again["same"]
    assert isinstance(new.first, SeparableConv2d)
    assert [row.name for row in plan.layers] == ["stem", "first"]
    assert plan.layers[1].macs_before == 6 * 6 * 9 * (13 * 13 + 7 * 7)


def test_progress_is_told_after_every_fit_and_ends_where_all_is_done() -> None:
    seen: list[tuple[int, int]] = []
    _, plan = convert(trained(plain), images(40), budget=1 / 2, on_progress=lambda done, of: seen.append((done, of)))
    tried = len(seen) - len(plan.converted)
    assert tried >= len(plan.layers)
    assert seen == sorted(seen)
    assert {of for _, of in seen} == {PARTS}
    stayed = sum(not row.rank and row.reason == STAYED for row in plan.layers)
    assert (seen[-1][0] == PARTS) == (not stayed)
    seen.clear()
    _, plan = convert(trained(plain), images(40), depth_multiplier=1, on_progress=lambda *step: seen.append(step))
    assert len(seen) == len(plan.converted)
    assert seen[-1] == (PARTS, PARTS)


def test_parts_of_the_work_take_about_equal_time() -> None:
    # Twice the channels: four times the work of a trial. A fit is two trials and one pass, which all sites share alike.
    sites = find_sites(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)))
    told: list[int] = []
    work = Work(sites, {site.name: 3 for site in sites}, lambda done, of: told.append(done))
    for site in sites:
        for _ in range(3):
            work.tried(site)
    for site in sites:
        work.fitted(site)
    units = [1, 2, 3, 7, 11, 15, 15 + 2 + 2.5, 15 + 2 + 2.5 + 8 + 2.5]
    assert told == [round(1000 * unit / units[-1]) for unit in units]


def test_closed_form_has_the_plans_ranks_and_its_error() -> None:
    model = trained(resnet).requires_grad_(False)
    x = images(100)
    _, plan = convert(model, x, budget=1 / 2, reestimate_bn=False)
    simple = closed_form(model, plan, x[:2])
    ranks = {name: m.depthwise.depth_multiplier for name, m in simple.named_modules() if hasattr(m, "depthwise")}
    assert ranks == {row.name: row.rank for row in plan.converted}
    assert (plan.images, plan.held_out) == (100, 6)
    assert "errors are of 6 images held out" in str(plan)
    want, have = model(x[15::16]), simple(x[15::16])
    error = (want - have).square().sum() / (want - want.mean(0)).square().sum()
    assert plan.stages[0] == {"name": "closed form", "output_error": pytest.approx(float(error), rel=1e-3)}


def test_later_layers_answer_for_earlier_errors() -> None:
    model = trained(resnet)
    errors = {}
    model.requires_grad_(False)
    for method in ("svd", "least_squares", "sequential"):
        new, plan = convert(model, images(300), method=method, depth_multiplier=1, reestimate_bn=False)
        errors[method] = plan.stages[-1]["output_error"]
        unseen = images(300)[15::16] if plan.held_out else images(300)[:256]
        want, have = model(unseen), new(unseen)
        by_hand = (want - have).square().sum() / (want - want.mean(0)).square().sum()
        assert errors[method] == pytest.approx(float(by_hand))
    assert errors["sequential"] < 0.9 * errors["least_squares"]
    assert errors["least_squares"] < 0.9 * errors["svd"]


@pytest.mark.parametrize("metric", ["conv_params", "macs"])
@pytest.mark.parametrize("budget", [0.3, 0.6, 1.0])
def test_the_budget_is_kept_and_used(metric: str, budget: float) -> None:
    model = trained(resnet)
    new, plan = convert(model, images(), budget, metric=metric)
    before, after = plan.conv_params if metric == "conv_params" else plan.macs
    assert after <= budget * before
    assert after >= (0.75 * budget if budget < 1 else 1.0) * before
    weights = sum(m.weight.numel() for m in new.modules() if isinstance(m, nn.Conv2d))
    assert weights == plan.conv_params[1]
    assert sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d)) == plan.conv_params[0]


def test_a_budget_of_all_changes_nothing() -> None:
    model = trained(plain)
    new, plan = convert(model, images(), 1.0)
    state = new.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {row.reason for row in plan.layers} == {"the budget is better spent on other layers"}


def test_latency_as_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(modules: dict[int, nn.Module], x: Tensor) -> dict[int, float]:
        assert all(module(x).shape == modules[0](x).shape for module in modules.values())
        return {m: 0.2 + 0.1 * m if m else float(modules[0].kernel_size[0]) for m in modules}

    monkeypatch.setattr(cost, "_median_time", pretend)
    model = nn.Sequential(conv(4, 8, 3), nn.ReLU(), conv(8, 8, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    _, plan = convert(model.double(), images()[:, [0, 1, 2, 0]], (3 + 0.7) / 8, metric="latency")
    paid = [0.2 + 0.1 * row.rank if row.rank else row.kernel_size[0] for row in plan.layers]
    assert sum(paid) <= 3 + 0.7 + 1e-9
    assert plan.converted


def test_latency_is_measured() -> None:
    (site,) = record(nn.ReLU(), find_sites(nn.Sequential(conv(3, 4))), Inputs.of(images(1, dtype=torch.float32)))
    site.inputs, site.outputs = [(3, 9, 9)], [(4, 9, 9)]
    found = latencies(site, FORMS["separable"], [1, 3])
    assert list(found) == [0, 1, 3]
    assert all(0 < seconds < 10 for seconds in found.values())


def test_latency_is_that_of_what_compile_runs_at_the_precision_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, ran = conv(8, 8).train(), []

    def timed(calls: dict[int, object], rounds: int) -> dict[int, list[float]]:
        ran.extend(call.args[0] for call in calls.values())  # type: ignore[attr-defined]
        return {key: [0.5 + key] * rounds for key in calls}

    monkeypatch.setattr(cost, "in_turn", timed)
    (site,) = record(nn.ReLU(), find_sites(nn.Sequential(layer)), Inputs.of(images(1, dtype=torch.float32)))
    site.inputs, site.outputs = [(8, 9, 9)], [(8, 9, 9)]
    found = latencies(site, FORMS["bottleneck"], [1, 2, 3, 4, 8])
    assert found == pytest.approx({0: 0.5, 1: 1.5, 2: 2.5, 3: 3.5, 4: 4.5, 8: 8.5})
    assert [type(layer) for layer in ran] == [CompiledModel] * 4
    ran.clear()
    latencies(site, FORMS["bottleneck"], [1, 2], torch.bfloat16)
    assert [next(layer.parameters()).dtype for layer in ran] == [torch.bfloat16] * 3
    assert layer.training


def test_network_decoupling_without_any_image() -> None:
    model = trained(plain)
    new, plan = convert(model, None, 0.5, method="svd")
    assert plan.images == 0
    assert plan.stages == []
    assert plan.macs is None
    assert plan.conv_params[1] <= 0.5 * plan.conv_params[0]
    assert new(images()).shape == (40, 5)
    with_example, _ = convert(model, None, 0.5, method="svd", example_input=images(2))
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), with_example.parameters(), strict=True))
    _, plan = convert(model, None, 0.5, method="svd", metric="macs", example_input=images(2))
    assert plan.macs[1] <= 0.5 * plan.macs[0]


def test_the_closed_form_sees_the_scale_of_the_batch_norm() -> None:
    model = trained(plain)
    with torch.no_grad():
        model[1].weight[:4] = 100
    new, _ = convert(model, None, method="svd", depth_multiplier=1)
    lost = (new[0](images()) - model[0](images())).square().mean((0, 2, 3))
    with torch.no_grad():
        model[1].weight[:4] = 0.01
    other, _ = convert(model, None, method="svd", depth_multiplier=1)
    lost_unscaled = (other[0](images()) - model[0](images())).square().mean((0, 2, 3))
    assert lost[:4].sum() < 0.7 * lost_unscaled[:4].sum()


def test_float32_and_channels_last_are_kept() -> None:
    model = trained(plain).float().to(memory_format=torch.channels_last)
    batch = images(dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    new, _ = convert(model, batch, depth_multiplier=9)
    assert all(p.dtype == torch.float32 for p in new.parameters())
    assert new[4].pointwise.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(new(batch), model(batch), rtol=1e-3, atol=1e-4)


def test_half_precision_is_kept() -> None:
    model = trained(plain).bfloat16()
    new, plan = convert(model, images(), depth_multiplier=9)
    assert all(p.dtype == torch.bfloat16 for p in new.parameters())
    assert plan.stages[-1]["output_error"] < 0.02


def test_signals_and_volumes() -> None:
    signal = nn.Sequential(nn.Conv1d(3, 8, 5), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.Flatten()).double()
    new, _ = convert(signal, torch.randn(50, 3, 19, dtype=torch.float64), depth_multiplier=5)
    assert isinstance(new[0], SeparableConv1d)
    x = torch.randn(4, 3, 19, dtype=torch.float64)
    torch.testing.assert_close(new(x), signal(x))
    volume = nn.Sequential(nn.Conv3d(3, 30, (2, 3, 3), padding=1), nn.Flatten()).double()
    new, _ = convert(volume, torch.randn(8, 3, 5, 6, 7, dtype=torch.float64), depth_multiplier=18)
    assert isinstance(new[0], SeparableConv3d)
    x = torch.randn(4, 3, 5, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(new(x), volume(x))


def test_calibration_as_batches_with_labels() -> None:
    model = trained(plain)
    whole = convert(model, images(), depth_multiplier=1)[0]
    loader = [(images()[:25], torch.zeros(25)), (images()[25:], torch.zeros(15))]
    for source in (loader, iter(loader)):
        parts, plan = convert(model, source, depth_multiplier=1)
        assert plan.images == 40
        torch.testing.assert_close(parts(images()), whole(images()), rtol=1e-6, atol=1e-8)


def test_the_plan_is_json_and_a_narrow_table() -> None:
    model = trained(plain)
    _, plan = convert(nn.Sequential(*[nn.Sequential(model)] * 1), images(), 0.4)
    record = json.loads(json.dumps(plan.to_dict()))
    assert record["conv_params_after"] == plan.conv_params[1]
    assert record["layers"][0]["kernel_size"] == [3, 3]
    about = {key: record[key] for key in ("form", "method", "metric", "budget", "images")}
    assert Plan(**about, layers=[]).budget == 0.4
    lines = str(plan).splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines].count("0.0.4") == 1
    assert any(
        line.startswith("separable, sequential, budget 0.4 of conv_params, 40 images: conv weights 1/")
        for line in lines
    )
