"""The converted network learns from the original; beside it the same network from random weights, and the rivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence import between, rivals
from benchmarks.evidence.conversions import calibration, converted
from benchmarks.evidence.runner import Step
from benchmarks.evidence.teachers import QUICK, SMALL, TEACHERS, data_of, learned, teacher
from sepconv.convert.forms import FORMS
from sepconv.models.blocks import initialize
from sepconv.train import Distillation, Recipe, train

BUDGET = "params-1-8"
LEARNING = replace(QUICK, lr=0.1, warmup_epochs=0.3, whiten=False)
GENTLE = replace(LEARNING, lr=0.02)
"""For bottlenecks, whose start has more to lose."""
PATIENT = replace(LEARNING, crop_padding=4, cutout=10)
"""For `MANY` epochs and more, by which the images of `LEARNING` would be known by heart."""
MANY = 20
DISTILLATION = Distillation(temperature=4.0, alpha=0.9)
FROM_RANDOM = replace(LEARNING, lr=QUICK.lr, warmup_epochs=None, whiten=True)


@dataclass(frozen=True)
class Change:
    """One thing done in another way: of the recipe, of the distillation, or of the converted network."""

    recipe: dict[str, Any] = field(default_factory=dict)
    distillation: dict[str, Any] = field(default_factory=dict)
    network: Callable[[nn.Module, Tensor], nn.Module] = lambda model, images: model
    form: str = "separable"


VARIANTS: dict[str, dict[str, Change]] = {
    "vgg": {
        "default": Change(),
        **{f"lr-{lr}": Change({"lr": lr}) for lr in (0.01, 0.05, 0.2)},
        "temperature-1": Change({}, {"temperature": 1.0}),
        "temperature-2": Change({}, {"temperature": 2.0}),
        "alpha-1": Change({}, {"alpha": 1.0}),
        "features": Change({}, {"features": "auto"}),
        **{f"bottleneck-lr-{lr}": Change({"lr": lr}, form="bottleneck") for lr in (0.01, 0.02, 0.05, 0.1)},
        "norm-between": Change(network=between.norm),
        "norm-and-prelu-between": Change(network=between.activation),
    },
    "mixed": {"cutmix": Change({"cutmix": 0.5, "crop_padding": 4})},
}
VARIANT_EPOCHS = {"vgg": 1, "mixed": 10}


def distilled(
    name: str, student: nn.Module, recipe: Recipe, distillation: Distillation | None, folder: Path
) -> dict[str, Any]:
    """Train `student` (from the teacher `name`, or with distillation None from the labels alone) and measure it."""
    model_teacher = None if distillation is None else teacher(name)
    history = train(
        student, data_of(name), recipe, folder, teacher=model_teacher, distillation=distillation, resume=True
    )
    return {
        "teacher": name,
        "distillation": None if distillation is None else asdict(distillation),
        **learned(student, name, recipe, history),
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


def distil(name: str, form: str, epochs: int, seed: int, folder: Path) -> dict[str, Any]:
    recipe = PATIENT if epochs >= MANY else GENTLE if form == "bottleneck" else LEARNING
    student = converted(name, BUDGET, form)
    return {"form": form, **distilled(name, student, replace(recipe, epochs=epochs, seed=seed), DISTILLATION, folder)}


def from_random(name: str, form: str, epochs: int, seed: int, folder: Path) -> dict[str, Any]:
    """The same network, loss and time, without the converted weights."""
    recipe = replace(FROM_RANDOM, epochs=epochs, seed=seed)
    student = forgotten(converted(name, BUDGET, form), seed)
    return {"form": form, **distilled(name, student, recipe, DISTILLATION, folder)}


def from_labels(name: str, epochs: int, folder: Path) -> dict[str, Any]:
    """The same network from random weights and labels, for as many epochs as teacher and distillation together."""
    recipe = replace(FROM_RANDOM, epochs=epochs)
    return distilled(name, forgotten(converted(name, BUDGET, "separable"), 0), recipe, None, folder)


def variant(name: str, key: str, folder: Path) -> dict[str, Any]:
    change = VARIANTS[name][key]
    recipe = replace(LEARNING, epochs=VARIANT_EPOCHS[name], **change.recipe)
    student = change.network(converted(name, BUDGET, change.form), calibration(name))
    return {"variant": key, **distilled(name, student, recipe, replace(DISTILLATION, **change.distillation), folder)}


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
SHORT = (1, 2, 5)
"""Epochs of distillation of the small teachers' students."""
SEEDS = (0, 1, 2)
HEADLINE = {
    ("wide", "separable"): {8: SEEDS},
    ("mixed", "separable"): {10: SEEDS, 22: (0,)},
    ("mixed", "bottleneck"): {5: SEEDS},
}
"""Epochs of distillation that take, with the conversion, at most a third of a teacher's training time (22: at most all
of it), with their seeds."""


def epochs_from_labels(name: str) -> int:
    """As many as the teacher's training and the longest of the short distillations together."""
    return TEACHERS[name].recipe.epochs + SHORT[-1]


def steps() -> list[Step]:
    """The most telling first."""

    def needs(name: str, form: str) -> tuple[str, ...]:
        return (f"{form}-{name}-{BUDGET}",)

    def student(name: str, form: str, epochs: int, seed: int = 0) -> Step:
        return Step(
            f"distil-{form}-{name}-e{epochs}-s{seed}", partial(distil, name, form, epochs, seed), needs(name, form)
        )

    def random(name: str, form: str, epochs: int) -> Step:
        return Step(
            f"random-{form}-{name}-e{epochs}-s0", partial(from_random, name, form, epochs, 0), needs(name, form)
        )

    found = []
    for (name, form), every in HEADLINE.items():
        found += [student(name, form, epochs, seed) for epochs, seeds in every.items() for seed in seeds]
        found.append(random(name, form, min(every)))
    for name, form in product(SMALL, FORMS):
        found += [student(name, form, epochs) for epochs in SHORT]
    found += [random(name, "bottleneck", SHORT[-1]) for name in SMALL] + [random("vgg", "separable", SHORT[-1])]
    for name, keys in VARIANTS.items():
        found += [
            Step(f"variant-{name}-{key}", partial(variant, name, key), needs(name, change.form))
            for key, change in keys.items()
        ]
    total = epochs_from_labels("vgg")
    found.append(Step(f"labels-vgg-e{total}", partial(from_labels, "vgg", total), needs("vgg", "separable")))
    found += [Step(f"rival-vgg-{kind}-e2", partial(rival, "vgg", kind, 2), ("teacher-vgg",)) for kind in RIVALS]
    return found
