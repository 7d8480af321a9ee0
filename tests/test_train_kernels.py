"""Whose layers a training runs on: ours inside, the network's own before and after."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed_run import RECIPE, network, random_data
from torch import nn

import sepconv
from sepconv.layers.replace import saves_passes
from sepconv.layers.training import NormalConv2d
from sepconv.train import Progress, Recipe, train

DATA = random_data()


def _kinds(model: nn.Module) -> set[type[nn.Module]]:
    return {type(module) for module in model.modules()}


@pytest.mark.parametrize("kernels", ["sepconv", "torch"])
def test_layers_are_ours_while_it_runs(kernels: str) -> None:
    model, seen = network(norm=True), []

    def look(progress: Progress) -> None:
        seen.append(_kinds(model))

    before = _kinds(model)
    train(model, DATA, replace(RECIPE, kernels=kernels), on_progress=look)
    assert _kinds(model) == before
    assert {NormalConv2d in kinds for kinds in seen} == {kernels == "sepconv"}


def test_layers_with_nothing_between_are_left() -> None:
    """As convert writes them: there is no pass to save."""
    start = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model, seen = nn.Sequential(*start, sepconv.SeparableConv2d(8, 5, 3), *network()[6:]), []
    train(model, DATA, RECIPE, on_progress=lambda progress: seen.append(_kinds(model)))
    assert seen
    assert not any(NormalConv2d in kinds for kinds in seen)
    assert not saves_passes(model)
    assert saves_passes(network(norm=True))
    assert saves_passes(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))


def test_a_network_that_had_our_layers_keeps_them() -> None:
    model = network(norm=True)
    sepconv.replace_layers(model)
    before = _kinds(model)
    train(model, DATA, RECIPE)
    assert _kinds(model) == before


def test_a_run_goes_on_with_the_other_layers(tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if (progress.epoch, progress.step) == (2, 1):
            raise KeyboardInterrupt

    recipes = [replace(RECIPE, kernels=kernels) for kernels in ("torch", "sepconv")]
    for first, second in (recipes, recipes[::-1]):
        folder = tmp_path / first.kernels
        with pytest.raises(KeyboardInterrupt):
            train(network(norm=True), DATA, first, folder, on_progress=stop)
        model, whole = network(norm=True), network(norm=True)
        train(model, DATA, second, folder, resume=True)
        train(whole, DATA, first)
        for a, b in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_kernels_of_nobody() -> None:
    with pytest.raises(ValueError, match=r"kernels must be one of sepconv, torch but is 'halide'"):
        Recipe(kernels="halide")
