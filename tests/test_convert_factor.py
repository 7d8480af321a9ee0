from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sepconv import reference
from sepconv.convert.factor import balance, compose, dropped_energy, full_rank, truncated_svd

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
