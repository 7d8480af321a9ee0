"""By what a run judges its networks: right answers where there are classes, else closeness to the original."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sepconv.data import Data, SampleData, Samples
from sepconv.layers.borrowed import because_of_weights, evaluating
from sepconv.leaves import Closeness, Inputs, leaves
from sepconv.leaves.complaint import complaint
from sepconv.leaves.outputs import said
from sepconv.train import Metrics, evaluate

NEAR_CHANCE = 0.1
"""Share of the way from naming the most frequent class to no error, below which a network is suspect."""

MetricFunction = Callable[[nn.Module], "float | Mapping[str, float]"]
"""The user's own: what a network, in evaluation mode, is worth; one number or several by name."""


@dataclass(frozen=True)
class Judge:
    """
    Attributes:
        original: whose outputs are the truth where there are no classes.
        classes: whether there are.
        output_weights, data_range: see :func:`sepconv.train.evaluate`.
        metric_function: its numbers stand beside the others; no choice depends on them.
    """

    original: nn.Module
    classes: bool
    output_weights: Mapping[str, float] | None = None
    data_range: float | None = None
    metric_function: MetricFunction | None = None

    @property
    def task(self) -> str:
        return "classes" if self.classes else "outputs"

    def on(self, model: nn.Module, split: Samples) -> Metrics | Closeness:
        """All there is to say of a network on these samples."""
        if self.classes:
            return evaluate(model, split)
        weights, data_range = self.output_weights, self.data_range
        return evaluate(model, split, teacher=self.original, output_weights=weights, data_range=data_range)

    def stage(self, model: nn.Module, split: Samples) -> dict[str, float]:
        """The number that stages are compared by, under its name."""
        found = self.on(model, split)
        return {"accuracy": found.accuracy} if isinstance(found, Metrics) else {"error": found.relative_error}

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """What the user's function says; nothing where there is none."""
        return {} if self.metric_function is None else measured(self.metric_function, model)


def answers_to(model: nn.Module, data: Data | SampleData, caller: str = "convert") -> Any:
    """What the model answers to two samples; ValueError unless it takes the data."""
    parameter = next(model.parameters(), torch.empty(0))
    if parameter.dtype != torch.float32:
        raise ValueError(f"{caller}: the images are float32 but the model is {parameter.dtype}: give model.float()")
    given = Inputs.of(data.calibration(min(2, len(data.train)))).to(parameter.device)
    try:
        with torch.no_grad(), evaluating(model):
            answer = given.run(model)
    except Exception as error:  # any code of the model may fail, in any way
        shape = data.input_shape or given
        raise ValueError(f"{caller}: the model does not take images of shape {shape}: {complaint(error)}") from error
    for name, leaf in leaves(answer).items():
        if not leaf.isfinite().all():
            why = because_of_weights(model)
            raise ValueError(f"{caller}: {said(name)} of the network holds NaN or infinity on this data{why}")
    return answer


def check_can_learn(model: nn.Module, caller: str) -> None:
    """ValueError where all parameters are frozen: what is made of them would be, too."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"{caller}: all parameters of the network are frozen, so it cannot learn: 0 epochs leave that out"
        )


def near_chance(accuracy: float, labels: Tensor) -> str:
    """A sentence where the network to convert knows hardly more than the most frequent class."""
    chance = int(labels.bincount().max()) / len(labels)
    if accuracy >= chance + NEAR_CHANCE * (1 - chance):
        return ""
    return (
        f"the original is right on {accuracy:.1%} of the held-out images, where naming one class always gives "
        f"{chance:.1%}: are its weights, its classes and the preparation of its images right?"
    )


def is_worse(stage: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a stage has fewer right answers, or outputs farther off."""
    return stage["accuracy"] < other["accuracy"] if "accuracy" in stage else stage["error"] > other["error"]


@torch.no_grad()
def measured(function: MetricFunction, model: nn.Module) -> dict[str, float]:
    """The user's numbers of a network.

    Raises:
        ValueError: the function fails, or gives something else than numbers.
    """
    name = getattr(function, "__name__", type(function).__name__)
    try:
        with evaluating(model):
            found = function(model)
    except Exception as error:  # the user's code may fail in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"metric_function: {name} fails on {type(model).__name__} ({reason})") from error
    numbers = dict(found) if isinstance(found, Mapping) else {name: found}
    for key, value in numbers.items():
        try:
            numbers[key] = float(value)
        except (TypeError, ValueError):
            numbers[key] = math.nan
        if not math.isfinite(numbers[key]):
            raise ValueError(f"metric_function: {name} must give finite numbers by name, got {key!r}: {value!r}")
    return {str(key): value for key, value in numbers.items()}
