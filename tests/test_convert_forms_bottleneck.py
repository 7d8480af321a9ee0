"""Pointwise, depthwise, pointwise: the decomposition, its fit to images, and networks that become such."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from convertible import NETWORKS, conv, images, plain, resnet, trained
from torch import Tensor, nn

import sepconv
from sepconv.convert import closed_form, convert
from sepconv.convert.forms import FORMS, bottleneck, bottleneck_fit
from sepconv.convert.forms.bottleneck_fit import BottleneckFactors, calibrate
from sepconv.convert.moments import Moments
from sepconv.convert.problem import LeastSquares
from sepconv.cost import count
from sepconv.runs.model_file import Card, open_model, write
from sepconv.runs.structure import differences

FORM = FORMS["bottleneck"]
_MORE = [(plain, "conv_params"), (resnet, "macs")]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(
    channels: int = 5, outputs: int = 7, taps: int = 9, metric: Tensor | None = None
) -> tuple[LeastSquares, Tensor]:
    """Patches whose values hang together, the targets of a weight plus noise; and that weight (O, C, k)."""
    mixing = random(channels * taps, channels * taps, seed=1)
    patches = random(400, channels * taps, seed=2) @ mixing
    weight = random(outputs, channels, taps, seed=3)
    y = patches @ weight.flatten(1).T + random(400, outputs, seed=4)
    metric = torch.eye(outputs, dtype=torch.float64) if metric is None else metric
    n = len(patches)
    return LeastSquares(patches.T @ patches / n, y.T @ patches / n, y.T @ y / n, metric, channels), weight


def test_compose_is_the_three_layers_one_after_the_other() -> None:
    factors = BottleneckFactors(random(7, 4), random(5, 4, seed=1), random(4, 9, seed=2))
    weight = bottleneck.compose(factors)
    assert weight.shape == (7, 5, 9)
    written = torch.einsum("or,cr,rk->ock", *factors)
    torch.testing.assert_close(weight, written)
    torch.testing.assert_close(bottleneck.compose(bottleneck.balance(factors)), written)


def test_a_weight_that_is_a_bottleneck_is_found_again() -> None:
    weight = bottleneck.compose(BottleneckFactors(random(7, 2), random(5, 2, seed=1), random(2, 9, seed=2)))
    found = bottleneck.compose(bottleneck.decompose(weight, 3))
    assert float((found - weight).norm() / weight.norm()) < 1e-3


def test_scales_weigh_the_errors_of_their_output_channels() -> None:
    weight, scale = random(7, 5, 9), torch.logspace(-2, 1, 7, dtype=torch.float64)
    found = bottleneck.compose(bottleneck.decompose(weight, 4, scale)) * scale[:, None, None]
    truth = bottleneck.compose(bottleneck.decompose(weight * scale[:, None, None], 4))
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-9)


def test_more_channels_come_closer_and_enough_are_exact() -> None:
    weight = random(6, 5, 9)
    errors = [
        float((bottleneck.compose(bottleneck.decompose(weight, r)) - weight).norm() / weight.norm())
        for r in (1, 4, 12, 30)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.5
    assert errors[-1] < 1e-3


def test_scale_says_which_outputs_matter() -> None:
    weight, scale = random(6, 5, 9), torch.tensor([1e3, 1e3, 1.0, 1.0, 1.0, 0.0]).double()
    lack = [weight - bottleneck.compose(bottleneck.decompose(weight, 6, s)) for s in (None, scale)]
    plain, weighed = (part.flatten(1).norm(dim=1) for part in lack)
    assert float(weighed[:2].sum()) < 0.5 * float(plain[:2].sum())


@pytest.mark.parametrize("weighed", [False, True])
def test_each_round_of_the_fit_lowers_the_error(weighed: bool) -> None:
    root = random(7, 7, seed=5)
    given, weight = problem(metric=root @ root.T if weighed else None)
    start = bottleneck.decompose(weight, 6)
    fits = [start, *(calibrate(given, start, rounds) for rounds in range(6))]
    errors = [given.error(bottleneck.compose(factors)) for factors in fits]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    assert errors[-1] < 0.8 * errors[1]


def test_what_the_terms_see_follows_them() -> None:
    given, weight = problem()
    fit = bottleneck_fit._Fit(given, given.xx, bottleneck.decompose(weight, 6, sweeps=1))
    fit.solve_expand()
    fit.improve()
    torch.testing.assert_close(fit.terms, bottleneck_fit.terms(fit.factors))
    torch.testing.assert_close(fit.seen, fit.terms @ given.xx)


def test_the_last_layer_is_the_least_squares_answer() -> None:
    given, weight = problem()
    best = calibrate(given, bottleneck.decompose(weight, 6), 2)
    error = given.error(bottleneck.compose(best))
    for seed in range(5):
        moved = best._replace(expand=best.expand + 1e-3 * random(7, 6, seed=seed))
        assert given.error(bottleneck.compose(moved)) > error


def test_where_channels_and_taps_have_nothing_in_common_one_step_solves_a_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The equations that conjugate gradients are helped by are then the real ones."""
    channels, taps = (root @ root.T for root in (random(5, 5, seed=1), random(9, 9, seed=2)))
    weight, start = random(7, 5, 9, seed=3), bottleneck.decompose(random(7, 5, 9, seed=4), 3)
    given = LeastSquares(
        torch.kron(channels, taps), weight.flatten(1) @ torch.kron(channels, taps), torch.eye(7), torch.eye(7), 5
    )
    given = replace(given, yy=given.yx @ weight.flatten(1).T, metric=torch.eye(7, dtype=torch.float64))
    fits = []
    for steps in (1, 6):
        monkeypatch.setattr(bottleneck_fit, "STEPS", steps)
        fits.append(given.error(bottleneck.compose(calibrate(given, start, 1))))
    assert fits[0] == pytest.approx(fits[1], rel=1e-3)


def test_products_in_float32_are_as_good() -> None:
    given, weight = problem()
    errors = [
        given.error(bottleneck.compose(calibrate(given, bottleneck.decompose(weight.to(dtype), 6), 5, dtype)))
        for dtype in (torch.float32, torch.float64)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_rounds_end_when_they_no_longer_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    given, weight = problem()
    rounds = []
    improve = bottleneck_fit._Fit.improve
    monkeypatch.setattr(bottleneck_fit._Fit, "improve", lambda fit: (rounds.append(1), improve(fit))[1])
    calibrate(given, bottleneck.decompose(weight, 6), 1000)
    assert 3 < len(rounds) < 300


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("arguments", [{}, {"stride": 2}, {"bias": False, "padding_mode": "circular"}])
def test_layers_compute_what_their_factors_say(dims: int, arguments: dict[str, Any]) -> None:
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer = kind(4, 6, 3, padding=1, **arguments).double()
    factors = BottleneckFactors(random(6, 3), random(4, 3, seed=1), random(3, 3**dims, seed=2))
    shift = random(6, seed=3)
    new = FORM.layer(layer, factors, shift)
    with torch.no_grad():
        layer.weight.copy_(bottleneck.compose(factors).view_as(layer.weight))
    x = random(2, 4, *(9, 7, 5)[:dims], seed=4)
    torch.testing.assert_close(new(x), layer(x) + shift.view(-1, *[1] * dims))
    assert sum(m.weight.numel() for m in new.modules() if hasattr(m, "weight")) == FORM.weights(layer, 3)
    assert FORM.weights(FORM.empty(layer, 3)[0], 1) > 0


def test_ranks_are_cheaper_than_the_layer_and_those_of_a_multiplier_have_its_weights() -> None:
    layer = conv(24, 32)
    ranks = FORM.ranks(layer)
    assert ranks == sorted(set(ranks))
    assert ranks[0] >= 1
    assert all(FORM.weights(layer, rank) < layer.weight.numel() for rank in ranks)
    separable = FORMS["separable"]
    for m in (1, 2, 3):
        limit = separable.weights(layer, m)
        rank = FORM.of_multiplier(layer, m)
        assert FORM.weights(layer, rank) <= limit < FORM.weights(layer, rank + 1)
    assert FORM.of_multiplier(layer, 1000) == 24 * 9


@pytest.mark.parametrize("method", ["svd", pytest.param("least_squares", marks=pytest.mark.slow), "sequential"])
@pytest.mark.parametrize("name", NETWORKS)
def test_enough_channels_change_little(name: str, method: str) -> None:
    model = trained(NETWORKS[name])
    new, plan = convert(model, images(), form="bottleneck", method=method, depth_multiplier=25)
    x = images(9, 17)
    with torch.no_grad():
        wanted = model(x)
        assert float((new(x) - wanted).norm() / wanted.norm()) < 2e-2
    assert plan.form == "bottleneck"
    assert not any(type(m) is nn.Conv2d and m.kernel_size != (1, 1) and m.groups == 1 for m in new.modules())


@pytest.mark.parametrize(
    ("make", "metric"),
    [(plain, "macs"), (resnet, "conv_params"), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in _MORE)],
)
def test_the_budget_is_kept_and_the_plan_counts_what_there_is(make: Any, metric: str) -> None:
    model = trained(make)
    new, plan = convert(model, images(), 0.4, metric=metric)
    before, after = (count(m, (3, 13, 13)) for m in (model.float(), new.float()))
    assert plan.conv_params == (before.conv_params, after.conv_params)
    spent = after.conv_params / before.conv_params if metric == "conv_params" else plan.macs[1] / plan.macs[0]  # type: ignore[index]
    assert 0.25 < spent <= 0.4
    for row in plan.converted:
        assert row.rank == new.get_submodule(row.name)[0].out_channels  # type: ignore[index]
        layers = [layer for layer in after.layers if layer.name.startswith(f"{row.name}.")]
        assert sum(layer.macs for layer in layers) == row.macs_after


def test_images_help_and_the_closed_form_has_the_plans_ranks() -> None:
    model, x = trained(resnet), images(64)
    new, plan = convert(model, x, 0.3)
    simple = closed_form(model, plan, x[:2])
    ranks = {name: m[0].out_channels for name, m in simple.named_modules() if _is_bottleneck(m)}
    assert ranks == {row.name: row.rank for row in plan.converted}
    with torch.no_grad():
        wanted = model(x)
        assert float((new(x) - wanted).norm()) < float((simple(x) - wanted).norm())
    assert [stage["name"] for stage in plan.stages] == ["closed form", "sequential", "batch norm statistics"]
    assert plan.stages[1]["output_error"] < 0.8 * plan.stages[0]["output_error"]
    assert all(row.error < row.error_closed_form for row in plan.converted)


def _is_bottleneck(module: Any) -> bool:
    return type(module) is nn.Sequential and len(module) == 2 and isinstance(module[1], sepconv.SeparableConv2d)


def test_the_file_builds_it_again_and_compile_runs_it(tmp_path: Path) -> None:
    card = Card("vgg_small", {"width_mult": 0.25, "num_classes": 10, "in_channels": 1})
    model = card.build().eval()
    x = torch.randn(8, 1, 16, 16)
    new, _ = convert(model, x, 0.25)
    write(tmp_path / "model.safetensors", new, card.changed_to(new))
    again, _ = open_model(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again(x), new(x))
        fast = sepconv.compile(new.eval(), x)
        torch.testing.assert_close(fast(x), new(x), rtol=1e-4, atol=1e-4)
    kinds = {group.kind for group in fast.explain().groups}
    assert "separable" in kinds


def test_a_chain_of_what_is_not_known_is_no_description() -> None:
    with pytest.raises(ValueError, match="became a Sequential, which cannot be described"):
        differences(nn.Sequential(conv(3, 4)), nn.Sequential(nn.Sequential(nn.Softmax(dim=1))))


def test_form_is_checked() -> None:
    with pytest.raises(ValueError, match="convert: form must be one of separable, bottleneck, got 'tucker'"):
        convert(plain(), images(dtype=torch.float32), form="tucker")


def test_moments_of_a_real_layer_fit_as_the_written_problem() -> None:
    layer = conv(4, 6).double()
    moments = Moments(layer)
    x = random(8, 4, 9, 9)
    moments.add(x, layer(x), None, 81, torch.Generator().manual_seed(0))
    given = moments.problem(torch.eye(6, dtype=torch.float64), 1e-3)
    start = FORM.start(layer.weight.detach(), 5, None)
    fitted = FORM.fit(given, layer.weight.detach(), start, 3)
    assert given.relative_error(FORM.compose(fitted)) < given.relative_error(FORM.compose(start))
