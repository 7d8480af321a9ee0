"""The first layer's start: uncorrelated answers of variance one, strongest pattern first, then the negatives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sepconv.data import Data, load
from sepconv.models import create
from sepconv.train import Recipe, train
from sepconv.train.whiten import FLOOR, whiten_first_layer


@pytest.fixture(scope="module")
def digits() -> Data:
    return load("digits")


def coloured_images() -> torch.Tensor:
    """Smooth, correlated channels."""
    noise = torch.randn(64, 3, 13, 13, generator=torch.Generator().manual_seed(0))
    return nn.functional.avg_pool2d(noise, 3, 1, 1) + noise[:, :1]


def test_answers_are_uncorrelated_and_of_equal_variance() -> None:
    images = coloured_images()
    conv = nn.Conv2d(3, 24, 2)
    whiten_first_layer(nn.Sequential(conv, nn.ReLU()), images)
    answers = conv(images).transpose(0, 1).flatten(1).detach()
    covariance = torch.cov(answers[:12])
    shrunk = 1 - FLOOR * conv.weight[:12].detach().flatten(1).square().sum(1)
    torch.testing.assert_close(covariance, torch.diag(shrunk), rtol=0, atol=1e-4)
    torch.testing.assert_close(answers[12:], -answers[:12])
    norms = conv.weight[:12].detach().flatten(1).norm(dim=1)
    assert (norms.diff() >= 0).all(), "the strongest pattern needs the smallest filter"


def test_filters_beyond_the_patterns_stay_and_fewer_take_the_strongest() -> None:
    images = coloured_images()
    wide, narrow, reference = nn.Conv2d(3, 29, 2), nn.Conv2d(3, 5, 2), nn.Conv2d(3, 24, 2)
    before = wide.weight.detach().clone()
    for conv in (wide, narrow, reference):
        whiten_first_layer(conv, images)
    assert torch.equal(wide.weight[24:], before[24:])
    assert torch.equal(wide.weight[:24], reference.weight)
    assert torch.equal(narrow.weight, reference.weight[:5])
    assert not reference.bias.any()


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Conv2d(1, 4, 3), nn.Conv2d(3, 3, 3, groups=3)])
def test_a_model_without_such_a_layer_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="whitening needs a normal convolution of 3 channels as the first layer"):
        whiten_first_layer(model, coloured_images())


def test_training_whitens_where_asked_and_only_there(digits: Data) -> None:
    settings = {"in_channels": 1, "width_mult": 0.125, "num_classes": 10}
    for whiten in (False, True):
        torch.manual_seed(0)
        model = create("vgg_small", **settings)
        before = next(iter(model.parameters())).detach().clone()
        train(model, digits, Recipe(epochs=1, batch_size=1438, lr=1e-9, whiten=whiten))
        moved = (next(iter(model.parameters())) - before).abs().max()
        assert (moved > 1e-3) == whiten
