from __future__ import annotations

import itertools

import pytest
import torch
from convertible import gather, make_conv, smooth_images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sepconv import reference
from sepconv.convert.forms.separable import (
    balance,
    calibrate,
    compose,
    dropped_energy,
    full_rank,
    solve_columns,
    sweep,
    truncated_svd,
    weighted_start,
)
from sepconv.convert.problem import LeastSquares

SHAPES = [(7, 5, 3, 3), (2, 3, 3, 3), (5, 4, 1, 7), (3, 2, 5), (4, 3, 2, 3, 2)]


def random_weight(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_truncated_svd_error_is_the_dropped_energy(shape: tuple[int, ...]) -> None:
    weight = random_weight(shape)
    energy = dropped_energy(weight)
    assert len(energy) == full_rank(weight) + 1
    torch.testing.assert_close(energy[0], weight.square().sum())
    for m in range(1, full_rank(weight) + 1):
        error = (compose(*truncated_svd(weight, m)) - weight.flatten(2)).square().sum()
        torch.testing.assert_close(error, energy[m], atol=1e-12, rtol=1e-10)
    assert energy[-1] == 0


def test_truncated_svd_beats_any_other_filters() -> None:
    weight = random_weight((7, 5, 3, 3))
    best = dropped_energy(weight)[2]
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        filters = torch.linalg.qr(torch.randn(5, 9, 2, dtype=torch.float64, generator=generator)).Q.mT
        columns = torch.einsum("ock,cmk->ocm", weight.flatten(2), filters)
        assert (compose(filters, columns) - weight.flatten(2)).square().sum() > best


def test_truncated_svd_with_scale_is_that_of_the_folded_weight() -> None:
    weight, scale = random_weight((7, 5, 3, 3)), torch.linspace(0.1, 3, 7, dtype=torch.float64)
    folded = weight * scale[:, None, None, None]
    weighted = compose(*truncated_svd(weight, 2, scale)) * scale[:, None, None]
    torch.testing.assert_close(weighted, compose(*truncated_svd(folded, 2)))
    torch.testing.assert_close(dropped_energy(weight, scale), dropped_energy(folded))


def test_truncated_svd_survives_a_channel_that_is_scaled_to_zero() -> None:
    weight, scale = random_weight((7, 5, 3, 3)), torch.ones(7, dtype=torch.float64)
    scale[3] = 0
    filters, columns = truncated_svd(weight, 9, scale)
    torch.testing.assert_close(compose(filters, columns)[:3], weight.flatten(2)[:3])
    assert columns.isfinite().all()


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_separable_weights_are_recovered_exactly(outputs: int, channels: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    depthwise = torch.randn(channels, size * size, dtype=torch.float64, generator=generator)
    pointwise = torch.randn(outputs, channels, dtype=torch.float64, generator=generator)
    weight = (pointwise[:, :, None] * depthwise).view(outputs, channels, size, size)
    torch.testing.assert_close(compose(*truncated_svd(weight, 1)), weight.flatten(2))


def test_factors_are_the_weights_of_a_separable_convolution() -> None:
    weight = random_weight((4, 3, 3, 3))
    x = random_weight((2, 3, 5, 5))
    filters, columns = truncated_svd(weight, 4)
    arguments = ((1, 1), ((1, 1), (1, 1)), (1, 1))
    separable = reference.separable_conv(
        x, filters.reshape(12, 1, 3, 3), columns.reshape(4, 12, 1, 1), None, None, *arguments
    )
    torch.testing.assert_close(separable, reference.conv(x, weight, None, *arguments))


def test_balance_equalises_norms_and_keeps_the_product() -> None:
    filters, columns = truncated_svd(random_weight((7, 5, 3, 3)), 3)
    filters[1, 2] = 0
    even = balance(filters, columns)
    torch.testing.assert_close(compose(*even), compose(filters, columns))
    rows, cols = even[0].norm(dim=2), even[1].norm(dim=0)
    alive = rows > 0
    torch.testing.assert_close(rows[alive], cols[alive])
    assert alive.sum() == 14


def make_problem(ridge: float = 1e-6, seed: int = 0, target: Tensor | None = None) -> tuple[LeastSquares, nn.Conv2d]:
    conv = make_conv(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    root = torch.randn(7, 7, dtype=torch.float64, generator=generator)
    return gather(conv, smooth_images(5, seed), target).problem(root @ root.T, ridge), conv


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_each_step_lowers_the_error(rank: int) -> None:
    problem, conv = make_problem()
    weight = conv.weight.flatten(2)
    errors = [problem.error(compose(*truncated_svd(conv.weight, rank)))]
    filters, columns = weighted_start(problem, weight, rank)
    columns = solve_columns(problem, filters)
    errors.append(problem.error(compose(filters, columns)))
    for _ in range(6):
        filters, columns = sweep(problem, filters, columns)
        errors.append(problem.error(compose(filters, columns)))
        columns = solve_columns(problem, filters)
        errors.append(problem.error(compose(filters, columns)))
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(errors))
    assert errors[1] < 0.95 * errors[0]
    assert errors[-1] < 0.98 * errors[1]


def test_columns_solve_the_normal_equations() -> None:
    problem, conv = make_problem()
    filters, _ = weighted_start(problem, conv.weight.flatten(2), 2)
    columns = solve_columns(problem, filters).requires_grad_()
    flat = compose(filters, columns).flatten(1)
    loss = (problem.metric * (problem.yy - 2 * problem.yx @ flat.T + flat @ problem.xx @ flat.T)).sum()
    (gradient,) = torch.autograd.grad(loss, columns)
    assert gradient.abs().max() < 1e-8 * float((problem.metric @ problem.yx).abs().max())


def test_a_sweep_ends_where_no_channel_can_improve() -> None:
    problem, conv = make_problem()
    filters, columns = calibrate(problem, conv.weight.flatten(2), 1, 300)
    before = problem.error(compose(filters, columns))
    filters = filters.clone().requires_grad_()
    flat = compose(filters, columns).flatten(1)
    loss = (problem.metric * (problem.yy - 2 * problem.yx @ flat.T + flat @ problem.xx @ flat.T)).sum()
    (gradient,) = torch.autograd.grad(loss, filters)
    assert (gradient * filters).abs().sum() < 1e-3 * before
    assert (gradient.norm(dim=2) * filters.norm(dim=2)).max() < 1e-2 * before


@pytest.mark.parametrize("rank", [1, 9])
def test_a_reachable_target_is_reached(rank: int) -> None:
    conv = make_conv()
    if rank == 1:
        conv.weight.copy_(compose(*truncated_svd(conv.weight, 1)).view_as(conv.weight))
    problem = gather(conv, smooth_images(5)).problem(torch.eye(7, dtype=torch.float64), 1e-3)
    fitted = compose(*calibrate(problem, conv.weight.flatten(2), rank, 2))
    torch.testing.assert_close(fitted, conv.weight.flatten(2), rtol=1e-8, atol=1e-9)


def test_dead_and_repeated_channels_keep_everything_finite() -> None:
    conv, x = make_conv(), smooth_images(5)
    x[:, 2] = 0
    x[:, 3] = x[:, 4]
    x[:, 0] = 1
    problem = gather(conv, x).problem(torch.eye(7, dtype=torch.float64), 1e-3)
    fitted = compose(*calibrate(problem, conv.weight.flatten(2), 2, 3))
    assert fitted.isfinite().all()
    assert problem.relative_error(fitted) < problem.relative_error(compose(*truncated_svd(conv.weight, 2)))
    assert fitted.abs().max() < 10 * conv.weight.abs().max()


def test_all_channels_dead() -> None:
    conv = make_conv()
    problem = gather(conv, torch.zeros(3, 5, 11, 11, dtype=torch.float64)).problem(
        torch.eye(7, dtype=torch.float64), 1e-3
    )
    fitted = compose(*calibrate(problem, conv.weight.flatten(2), 9, 1))
    torch.testing.assert_close(fitted, conv.weight.flatten(2))


def test_targets_of_another_network_are_regressed_on() -> None:
    conv, x = make_conv(), smooth_images(5)
    goal = make_conv(seed=4)
    moments = gather(conv, x, goal(x))
    problem = moments.problem(torch.eye(7, dtype=torch.float64), 1e-9)
    fitted = compose(*calibrate(problem, conv.weight.flatten(2), 9, 1))
    torch.testing.assert_close(fitted, goal.weight.flatten(2), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(conv.bias + moments.bias(fitted), goal.bias, rtol=1e-3, atol=1e-3)
