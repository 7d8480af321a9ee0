"""The converted network learns from the original; beside it the same network from random weights, and the rivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.evidence import rivals
from benchmarks.evidence.conversions import converted
from benchmarks.evidence.runner import Step
from benchmarks.evidence.teachers import QUICK, TEACHERS, cifar10, learned, teacher
from sepconv.models.blocks import initialize
from sepconv.train import Distillation, Recipe, train

BUDGET = "params-1-8"
LEARNING = replace(QUICK, lr=0.1, warmup_epochs=0.3, whiten=False)
DISTILLATION = Distillation(temperature=4.0, alpha=0.9)
FROM_RANDOM = replace(LEARNING, lr=QUICK.lr, warmup_epochs=None, whiten=True)

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({"lr": 0.05}, {}),
    "lr-0.1": ({"lr": 0.1}, {}),
    "lr-0.2": ({"lr": 0.2}, {}),
    "temperature-1": ({"lr": 0.05}, {"temperature": 1.0}),
    "temperature-2": ({"lr": 0.05}, {"temperature": 2.0}),
    "alpha-1": ({"lr": 0.05}, {"alpha": 1.0}),
    "features": ({"lr": 0.05}, {"features": "auto"}),
}
"""Recipe and distillation, one thing changed at a time from a learning rate of 0.05."""
VARIANT_EPOCHS = 1


def distilled(
    name: str, student: nn.Module, recipe: Recipe, distillation: Distillation | None, folder: Path
) -> dict[str, Any]:
    """Train `student` (from the teacher `name`, or with distillation None from the labels alone) and measure it."""
    data = cifar10()
    model_teacher = None if distillation is None else teacher(name)
    history = train(student, data, recipe, folder, teacher=model_teacher, distillation=distillation, resume=True)
    return {
        "teacher": name,
        "distillation": None if distillation is None else asdict(distillation),
        **learned(student, data, recipe, history),
    }


def forgotten(model: nn.Module, seed: int) -> nn.Module:
    """The same network with random weights."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    initialize(model)
    return model


def distil(name: str, epochs: int, seed: int, folder: Path) -> dict[str, Any]:
    recipe = replace(LEARNING, epochs=epochs, seed=seed)
    return distilled(name, converted(name, BUDGET), recipe, DISTILLATION, folder)


def from_random(name: str, epochs: int, seed: int, folder: Path) -> dict[str, Any]:
    """The same network, loss and time, without the converted weights."""
    recipe = replace(FROM_RANDOM, epochs=epochs, seed=seed)
    return distilled(name, forgotten(converted(name, BUDGET), seed), recipe, DISTILLATION, folder)


def from_labels(name: str, epochs: int, folder: Path) -> dict[str, Any]:
    """The same network from random weights and labels, for as many epochs as teacher and distillation together."""
    recipe = replace(FROM_RANDOM, epochs=epochs)
    return distilled(name, forgotten(converted(name, BUDGET), 0), recipe, None, folder)


def variant(name: str, key: str, folder: Path) -> dict[str, Any]:
    of_recipe, of_distillation = VARIANTS[key]
    recipe = replace(LEARNING, epochs=VARIANT_EPOCHS, **of_recipe)
    distillation = replace(DISTILLATION, **of_distillation)
    return {"variant": key, **distilled(name, converted(name, BUDGET), recipe, distillation, folder)}


def rival(name: str, kind: str, epochs: int, folder: Path) -> dict[str, Any]:
    """A rival decomposition at the weights of M = 1, from its data-free start, distilled alike."""
    student = rivals.replaced(teacher(name), RIVALS[kind]).train()
    return {"rival": kind, **distilled(name, student, replace(LEARNING, epochs=epochs), DISTILLATION, folder)}


RIVALS: dict[str, Callable[[nn.Conv2d], nn.Module]] = {
    "depthwise-first": lambda conv: rivals.depthwise_first_svd(conv, 1),
    "pointwise-first": lambda conv: rivals.pointwise_first_svd(conv, 1),
    "tucker": lambda conv: rivals.tucker(conv, rivals.separable_weights(conv, 1)),
    "cp": lambda conv: rivals.canonical(conv, rivals.separable_weights(conv, 1)),
}
HEADLINE = {
    "vgg": {"third": 2, "whole": 7},
    "resnet": {"third": 2, "whole": 5},
    "wide": {"third": 8, "whole": 30},
    "mixed": {"third": 10, "whole": 22},
}
"""Epochs of distillation that take, with the conversion, at most a third of each teacher's training time, and at most
all of it."""


def steps() -> list[Step]:
    """The most telling first."""
    found = []

    def both(name: str, epochs: int, seed: int) -> list[Step]:
        needs = (f"budget-{name}-{BUDGET}",)
        return [
            Step(f"distil-{name}-e{epochs}-s{seed}", partial(distil, name, epochs, seed), needs),
            Step(f"random-{name}-e{epochs}-s{seed}", partial(from_random, name, epochs, seed), needs),
        ]

    for name, headline in HEADLINE.items():
        for epochs in headline.values():
            found += both(name, epochs, 0)
    found += [step for epochs in (1, 5) for step in both("vgg", epochs, 0)]
    found += [Step(f"variant-vgg-{key}", partial(variant, "vgg", key), (f"budget-vgg-{BUDGET}",)) for key in VARIANTS]
    for name in ("mixed", "wide", "vgg"):
        for epochs in HEADLINE[name].values():
            found += [step for seed in (1, 2) for step in both(name, epochs, seed)]
    teacher_needs = ("teacher-vgg",)
    found += [Step(f"rival-vgg-{kind}-e2", partial(rival, "vgg", kind, 2), teacher_needs) for kind in RIVALS]
    total = TEACHERS["vgg"][2].epochs + HEADLINE["vgg"]["third"]
    found.append(Step(f"labels-vgg-e{total}", partial(from_labels, "vgg", total), (f"budget-vgg-{BUDGET}",)))
    return found
