"""A recipe refuses what makes no sense; schedules, optimizers and weight decay are as documented."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from distributed_run import network
from torch import nn

from sepconv.data import Data
from sepconv.data.images import TensorImages
from sepconv.layers import DepthwiseConv2d, SeparableConv2d
from sepconv.train import Recipe, default_recipe
from sepconv.train.recipe import split_parameters


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1 and at most 99999 but is 0"),
        ({"epochs": 1.5}, TypeError, "epochs must be an int but is 1.5"),
        ({"seed": True}, TypeError, "seed must be an int but is True"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1 but is 0"),
        ({"optimizer": "adam"}, ValueError, "optimizer must be one of sgd, adamw, rmsprop but is 'adam'"),
        ({"schedule": "step"}, ValueError, "schedule must be one of cosine, one_cycle, constant but is 'step'"),
        ({"mixed_precision": "fp8"}, ValueError, "mixed_precision must be one of no, bf16, fp16 but is 'fp8'"),
        ({"lr": 0.0}, ValueError, "lr must be above 0 and finite but is 0.0"),
        ({"lr": math.nan}, ValueError, "lr must be above 0 and finite but is nan"),
        ({"lr": math.inf}, ValueError, "lr must be above 0 and finite but is inf"),
        ({"momentum": 1.0}, ValueError, "momentum must be from 0 to below 1 but is 1.0"),
        ({"weight_decay": -1e-4}, ValueError, "weight_decay must be at least 0 and finite but is -0.0001"),
        ({"warmup_epochs": 11}, ValueError, "warmup_epochs must be from 0 to 10 epochs but is 11"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing must be from 0 to below 1 but is 1.0"),
        ({"crop_padding": -1}, ValueError, "crop_padding must be at least 0 but is -1"),
        ({"cutout": -1}, ValueError, "cutout must be at least 0 but is -1"),
        ({"cutout": 1.5}, TypeError, "cutout must be an int but is 1.5"),
        ({"mixup": -0.1}, ValueError, "mixup must be at least 0 and finite but is -0.1"),
        ({"cutmix": math.inf}, ValueError, "cutmix must be at least 0 and finite but is inf"),
        ({"ema": 1.0}, ValueError, "ema must be from 0 to below 1 but is 1.0"),
    ],
)
def test_recipe_refuses(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"Recipe: {message}"):
        Recipe(**settings)


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle", "constant"])
def test_schedules_rise_to_lr_and_fall_as_they_say(schedule: str) -> None:
    recipe = Recipe(epochs=10, lr=0.5, schedule=schedule, warmup_epochs=2)
    rates = [recipe.learning_rate(step, 10) for step in range(100)]
    assert rates[:20] == pytest.approx([0.5 * (i + 1) / 20 for i in range(20)])
    assert max(rates) == 0.5
    half = {"cosine": 0.25, "one_cycle": 0.25, "constant": 0.5}[schedule]
    assert rates[60] == pytest.approx(half)
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert (rates[-1] < 0.01) == (schedule != "constant")
    assert min(rates) > 0


def test_warmup_by_default() -> None:
    assert Recipe(schedule="one_cycle").learning_rate(29, 10) == 0.1
    assert Recipe(schedule="one_cycle").learning_rate(28, 10) < 0.1
    assert Recipe(schedule="cosine").learning_rate(0, 10) == 0.1


def test_default_recipe_mirrors_photographs_but_no_digits(data: Data) -> None:
    assert not default_recipe(data).flip
    images = TensorImages(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    photographs = replace(data, train=replace(data.train, images=images))
    assert (default_recipe(photographs).flip, default_recipe(photographs).crop_padding) == (True, 4)


def test_depthwise_filters_biases_and_norms_are_not_decayed() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 3, groups=8),
        DepthwiseConv2d(16, 3),
        DepthwiseConv2d(1, 3),
        SeparableConv2d(16, 4, 3),
        nn.Conv2d(16, 16, 3, groups=4),
        nn.Conv2d(1, 4, 3),
        nn.Linear(16, 2),
    )
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = split_parameters(model)
    expected = ["0.weight", "5.pointwise.weight", "6.weight", "7.weight", "8.weight"]
    assert [names[id(p)] for p in decayed] == expected
    assert {names[id(p)] for p in free} == set(names.values()) - set(expected)


def test_frozen_and_shared_parameters_appear_once_or_not_at_all() -> None:
    shared = nn.Linear(3, 3)
    frozen = nn.Linear(3, 3).requires_grad_(False)
    decayed, free = split_parameters(nn.Sequential(shared, shared, frozen))
    assert [id(p) for p in decayed + free] == [id(shared.weight), id(shared.bias)]


def test_optimizer_gets_the_recipe() -> None:
    sgd = Recipe(lr=0.3, momentum=0.8, weight_decay=0.01).make_optimizer(network())
    assert [group["weight_decay"] for group in sgd.param_groups] == [0.01, 0.0]
    assert all(g["nesterov"] and g["momentum"] == 0.8 and g["lr"] == 0.3 for g in sgd.param_groups)
    assert Recipe(optimizer="rmsprop").make_optimizer(network()).param_groups[0]["momentum"] == 0.9
    assert type(Recipe(optimizer="adamw").make_optimizer(network())).__name__ == "AdamW"
