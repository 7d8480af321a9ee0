"""How a network is converted and measured, and what must be the same for a run to be gone on with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from sepconv.data import Data, LoaderSplit, SampleData
from sepconv.leaves import Inputs
from sepconv.runs import fitted
from sepconv.runs.judge import MetricFunction
from sepconv.train import Distillation, Recipe
from sepconv.train.holdout import Choices


@dataclass(frozen=True)
class Job:
    """How a network is converted and measured.

    Args:
        budget: share of the original's cost that the separable network may have.
        metric: that cost: "conv_params", "macs" or "latency".
        form: what convolutions become, "bottleneck" or "separable".
        recipe: how the separable network learns from the original afterwards; None leaves it as converted. Learning
            that ends with fewer right answers than it began with, on images held out from it, is undone.
        distillation: what it learns.
        calibration_images: unlabelled training images that the conversion looks at; all where there are fewer.
        skip: names of modules that stay as they are.
        batch: images in one call while latency is measured.
        classes: names of the network's outputs in their order, by which the data's classes are found; those of the card
            where it is empty.
        output_weights, data_range: of the outputs where there are no classes; see :func:`sepconv.train.evaluate`.
        metric_function: the user's own numbers of a network, such as ``lambda network: {"iou": ...}``, told of both.
        seed: of the choice of calibration images.
        command: what the user typed, for the record.
        precision: "float32", or "int8" for a quantized network beside it, in the folder ``int8``.
        live: whether the page runs the networks in the browser.
        kind: "convert" or "demo", for the record; a demo cannot be resumed and keeps no checkpoints.
    """

    budget: float = 0.125
    metric: str = "conv_params"
    form: str = "bottleneck"
    recipe: Recipe | None = field(default_factory=Recipe)
    distillation: Distillation = field(default_factory=Distillation)
    calibration_images: int = 1000
    skip: tuple[str, ...] = ()
    batch: int = 1
    classes: tuple[str, ...] = ()
    output_weights: Mapping[str, float] | None = None
    data_range: float | None = None
    metric_function: MetricFunction | None = None
    seed: int = 0
    command: str = ""
    precision: str = "float32"
    live: bool = False
    kind: str = "convert"


def calibration_of(data: Data | SampleData, job: Job) -> Inputs:
    """The unlabelled images that the conversion looks at."""
    return Inputs.of(data.calibration(min(job.calibration_images, len(data.train)), job.seed))


def identity_of(
    original: nn.Module, choices: Choices, data: Data | SampleData, job: Job, images: Inputs
) -> dict[str, Any]:
    """What the results follow from: the settings, the weights and the images; as "conversion" what the fit does."""
    settings = {"task": "classes" if data.classes else "outputs", "held_out": choices.held_out}
    settings |= {name: getattr(job, name) for name in ("budget", "metric", "form", "skip", "output_weights")}
    repeatable = not isinstance(data.train, LoaderSplit)
    return fitted.plain(
        {
            "conversion": fitted.identity_of(original, images, settings, repeatable=repeatable),
            "data": {"name": data.name, "test": len(data.test)},
            "recipe": job.recipe and {**asdict(job.recipe), "kernels": ""},
            "distillation": asdict(job.distillation),
            **{name: getattr(job, name) for name in ("batch", "classes", "data_range", "precision", "live", "seed")},
            "metric_function": getattr(job.metric_function, "__name__", None),
        }
    )
