"""A trained network goes in; one of 8-bit integers, its measurements and its files come out."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from sepconv.data import Data, LoaderSplit, SampleData
from sepconv.layers.borrowed import copied
from sepconv.leaves import Inputs
from sepconv.quantize import QuantizationPlan, quantize
from sepconv.runs import fitted, model_file
from sepconv.runs.classes import matched
from sepconv.runs.judge import Judge, answers_to, check_can_learn, is_worse
from sepconv.runs.model_file import Card
from sepconv.runs.relay import relay
from sepconv.runs.run_folder import (
    CHECKPOINTS,
    INT8,
    RESULT,
    about,
    export_onnx,
    finished,
    owned,
    prepare,
    remove_checkpoints,
    write_json,
)
from sepconv.system.processes import of_first
from sepconv.system.progress import OnProgress, Step, ignore
from sepconv.train import Distillation, Recipe, train
from sepconv.train.evaluate import check_outputs
from sepconv.train.holdout import Choices
from sepconv.train.processes import processes


@dataclass(frozen=True)
class QuantizationJob:
    """How a network is quantized.

    Args:
        recipe: how it learns from the original afterwards; None leaves it as it is. Learning that ends below its start,
            on images held out from it, is undone.
        distillation: what it learns.
        calibration_images: unlabelled training images that are looked at; all where there are fewer.
        skip: names of layers that stay in float32.
        force: write the network even if its outputs move too far.
        classes: names of the network's outputs in their order; those of the card where it is empty.
        seed: of the choice of images.
        command: what the user typed, for the record.
    """

    recipe: Recipe | None = None
    distillation: Distillation = field(default_factory=Distillation)
    calibration_images: int = 1000
    skip: tuple[str, ...] = ()
    force: bool = False
    classes: tuple[str, ...] = ()
    seed: int = 0
    command: str = ""


def quantize_model(
    model: nn.Module,
    card: Card,
    data: Data | SampleData,
    job: QuantizationJob,
    out: Path,
    *,
    resume: bool = False,
    on_progress: OnProgress = ignore,
) -> dict[str, Any]:
    """Quantize a trained network, let it learn from the original, judge both and write what came out.

    Written to `out`: ``model.safetensors`` (opens again by ``model_file.open_model``), ``model.onnx`` with pairs of
    QuantizeLinear and DequantizeLinear, and ``result.json``.

    Args:
        model: trained; left as it was.
        card: how `model` is built.
        resume: go on with an interrupted learning of the same job in `out`; if `out` holds the results of this very
            job, return their record.

    Returns:
        The record that is written as ``result.json``.

    Raises:
        ValueError: see :func:`sepconv.quantize`; or `out` holds another run, or results.
        OSError: `out` cannot be written.
    """
    prepare(out, "quantize", model, resume=resume)
    with owned(out, "quantize"):
        return _work(model, card, data, job, out, resume, on_progress)


def _work(
    model: nn.Module,
    card: Card,
    data: Data | SampleData,
    job: QuantizationJob,
    out: Path,
    resume: bool,
    on_progress: OnProgress,
) -> dict[str, Any]:
    started = time.perf_counter()
    model = copied(model, "quantize")
    if job.recipe is not None:
        check_can_learn(model, "quantize")
    data = _with_classes(model, card, data, job)
    card.with_data(data).check()
    choices, judge = Choices.of(data), Judge(model, bool(data.classes))
    identity = _identity(model, choices, data, job)
    if (done := of_first(finished(out, "quantize", identity))) is not None:
        return done
    quantized, plan = _quantize(model, choices, job, on_progress)
    stages = [{"name": name, **judge.stage(net, choices.data.test)} for name, net in _named(model, quantized, judge)]
    kept = "quantized"
    if job.recipe is not None:
        before = copy.deepcopy(quantized.state_dict())
        history = train(
            quantized,
            choices.data,
            job.recipe,
            out / CHECKPOINTS,
            teacher=model,
            distillation=job.distillation,
            resume=resume,
            on_progress=relay(on_progress, "distil"),
        )
        stages.append({"name": "fine-tuned", **judge.stage(quantized, choices.data.test), "seconds": history.seconds})
        kept = "fine-tuned"
        if (choices.held_out or not judge.classes) and is_worse(stages[-1], stages[-2]):
            quantized.load_state_dict(before)
            kept = "quantized"
    found = {
        **about(card.model, data, "quantize", job.command, 0),
        "identity": identity,
        "task": judge.task,
        "normal": {**judge.stage(model, data.test), "bytes_of_weights": _bytes(model)},
        "stages": stages,
        "held_out_images": choices.held_out,
        "kept": kept,
        "test_images": len(data.test),
    }
    if processes().is_main_process:
        found |= write_quantized(quantized, card.with_data(data), plan, data, judge, out)
        found["seconds"] = round(time.perf_counter() - started, 2)
        write_json(out / RESULT, found)
    remove_checkpoints(out)
    return of_first(found)


class QuantizedNetwork(NamedTuple):
    """A quantized network and what was done to it."""

    module: nn.Module
    plan: QuantizationPlan


def quantized_or_why_not(
    model: nn.Module, data: Data | SampleData, job: QuantizationJob | None, on_progress: OnProgress
) -> QuantizedNetwork | str:
    """The network of another run quantized, or the reason where that is refused or not asked for."""
    if job is None:
        return "not asked for: --precision int8 makes it"
    try:
        return QuantizedNetwork(*_quantize(model, Choices.of(data), job, on_progress))
    except ValueError as error:
        return str(error)


def write_beside(
    found: QuantizedNetwork | str, card: Card, data: Data | SampleData, judge: Judge, out: Path
) -> dict[str, Any]:
    """The files of a quantized network in a folder of its own beside those of the run that it belongs to."""
    if isinstance(found, str):
        return {"written": False, "reason": found}
    (out / INT8).mkdir(exist_ok=True)
    return {"written": True, **write_quantized(found.module, card, found.plan, data, judge, out / INT8)}


def write_quantized(
    quantized: nn.Module, card: Card, plan: QuantizationPlan, data: Data | SampleData, judge: Judge, out: Path
) -> dict[str, Any]:
    """The files of a quantized network; returns what was measured of it."""
    model_file.write(out / model_file.FILE, quantized, card.changed_to(quantized))
    size = (out / model_file.FILE).stat().st_size
    return {
        "quantized": {**judge.stage(quantized, data.test), "bytes_of_weights": size},
        "plan": plan.to_dict(),
        "onnx": export_onnx(quantized, data, out),
    }


def _quantize(
    model: nn.Module, choices: Choices, job: QuantizationJob, on_progress: OnProgress
) -> tuple[nn.Module, QuantizationPlan]:
    on_progress(Step("quantize", 0, 1))
    return quantize(
        model,
        _calibration(choices.data, job),
        skip=job.skip,
        force=job.force,
        on_progress=lambda done, total: on_progress(Step("quantize", done, total)),
    )


def _calibration(data: Data | SampleData, job: QuantizationJob) -> Inputs:
    return Inputs.of(data.calibration(min(job.calibration_images, len(data.train)), job.seed))


def _identity(model: nn.Module, choices: Choices, data: Data | SampleData, job: QuantizationJob) -> dict[str, Any]:
    """What the results follow from: the settings, the weights and the images."""
    settings = {name: getattr(job, name) for name in ("skip", "force", "classes", "seed")}
    settings |= {"data": {"name": data.name, "test": len(data.test)}, "held_out": choices.held_out}
    settings |= {
        "recipe": job.recipe and {**asdict(job.recipe), "kernels": ""},
        "distillation": asdict(job.distillation),
    }
    repeatable = not isinstance(data.train, LoaderSplit)
    return fitted.identity_of(model, _calibration(choices.data, job), settings, repeatable=repeatable)


def _named(model: nn.Module, quantized: nn.Module, judge: Judge) -> list[tuple[str, nn.Module]]:
    """The original differs from itself by nothing, which is no stage."""
    return [*([("original", model)] if judge.classes else []), ("quantized", quantized)]


def _with_classes(model: nn.Module, card: Card, data: Data | SampleData, job: QuantizationJob) -> Data | SampleData:
    """The data with its classes matched to the network's outputs."""
    if not isinstance(data, Data) or not data.classes:
        return data
    answer = answers_to(model, data, "quantize")
    check_outputs(answer, data.num_classes)
    return matched(data, job.classes or card.classes, int(answer.shape[1]))


def _bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
