"""The main job: a trained network goes in; a smaller separable one, its measurements and a page about both come out."""

from __future__ import annotations

import copy
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sepconv.convert import Plan, closed_form, convert
from sepconv.data import Data, SampleData, Split, load
from sepconv.layers.borrowed import copied
from sepconv.leaves import Inputs
from sepconv.report import write_report
from sepconv.runs import compare, fitted, layer_data, model_file
from sepconv.runs.classes import matched
from sepconv.runs.fitted import Fitted
from sepconv.runs.job import Job as Job
from sepconv.runs.job import calibration_of, identity_of
from sepconv.runs.judge import Judge, answers_to, check_can_learn, is_worse, near_chance
from sepconv.runs.live import LiveNetwork, write_live
from sepconv.runs.model_file import Card
from sepconv.runs.precisions import precisions
from sepconv.runs.quantized import QuantizationJob, QuantizedNetwork, quantized_or_why_not, write_beside
from sepconv.runs.relay import relay
from sepconv.runs.run_folder import (
    CHECKPOINTS,
    EXPLANATION,
    INT8,
    LIVE,
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
from sepconv.train import Recipe, train
from sepconv.train.evaluate import check_outputs
from sepconv.train.holdout import Choices
from sepconv.train.processes import processes

DISTILLATION_LR = {"bottleneck": 0.02, "separable": 0.05}
"""Highest learning rate by form, unless told: a bottleneck starts nearer to the original and has more to lose."""

OUTPUTS_LR = 0.001
"""Highest learning rate, of AdamW, where outputs are learnt and no classes, unless told."""

DEMO_MODEL = "vgg_small"
DEMO_SETTINGS: dict[str, Any] = {}
DEMO_BUDGET = 1 / 8
DEMO_FORM = "separable"
"""The textbook's."""
DEMO_TRAINING = Recipe(epochs=12, batch_size=64, lr=0.05, crop_padding=1)
DEMO_DISTILLATION = Recipe(epochs=12, batch_size=64, lr=0.01, crop_padding=1)


@dataclass
class Outcome:
    """Everything a run has found so far, before it is written."""

    original: nn.Module
    separable: nn.Module
    card: Card
    choices: Choices
    judge: Judge
    stages: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    kept: str = "converted"
    """The stage whose network is written."""
    steps: int = 1
    """Of the conversion, as progress is told."""

    def finished(self, name: str, model: nn.Module, seconds: float) -> None:
        score = self.judge.stage(model, self.choices.data.test)
        self.stages.append({"name": name, **score, "seconds": round(seconds, 3)})

    def learned(self, phase: str, records: list[dict[str, Any]]) -> None:
        self.curves += [{**self.choices.curve(record), "phase": phase} for record in records]


def demo(
    out: Path, *, seed: int = 0, live: bool = True, command: str = "", on_progress: OnProgress = ignore
) -> dict[str, Any]:
    """Train a small normal network on the embedded digits, then do the whole job with it.

    Args:
        live: whether the page runs the networks in the browser.

    Returns:
        The record that is written as ``result.json``.
    """
    prepare(out, "demo", int8=True, live=live)
    started = time.perf_counter()
    data = load("digits")
    settings = {"in_channels": data.channels, "num_classes": data.num_classes, **DEMO_SETTINGS}
    card = Card(DEMO_MODEL, settings).with_data(data)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = card.build()
    choices = Choices.of(data)
    history = train(model, choices.data, replace(DEMO_TRAINING, seed=seed), on_progress=relay(on_progress, "train"))
    model.to(_device())
    outcome = Outcome(model, model, card, choices, Judge(model, classes=True))
    outcome.learned("original", history.records)
    outcome.finished("original", model, time.perf_counter() - started)
    recipe = replace(DEMO_DISTILLATION, seed=seed)
    job = Job(
        DEMO_BUDGET,
        form=DEMO_FORM,
        recipe=recipe,
        precision=INT8,
        live=live,
        seed=seed,
        command=command,
        kind="demo",
    )
    return _run(outcome, data, job, out, False, on_progress, started)


@torch.random.fork_rng()
def convert_model(
    model: nn.Module,
    card: Card,
    data: Data | SampleData,
    job: Job,
    out: Path,
    *,
    resume: bool = False,
    on_progress: OnProgress = ignore,
) -> dict[str, Any]:
    """Convert a trained network, let it learn from the original, measure both and write what came out.

    Written to `out`: ``model.safetensors`` (opens again by ``model_file.open_model``), ``model.onnx``, ``result.json``,
    ``explanation.json``, ``report.html``, ``live.json`` where it is asked for; and ``checkpoints/`` until the end.

    Where the data has classes, networks are judged by their right answers; where it has none, by how close their
    outputs are to those of the original, which is then all that the separable network learns.

    The split for validation is held out, or a tenth of the training images (2,000 at most) where there is none: the
    accuracies on the way are of these, and by them a distillation is kept or undone. The test images are looked at in
    the end, once for each of the two networks.

    Under `accelerate launch` or `torchrun` every process calls this with the same arguments: they share out the
    calibration, the distillation and the test images; the main process alone measures latency, and writes.

    Args:
        model: trained; left as it was.
        card: how `model` is built.
        resume: go on with an interrupted distillation in `out`, even if it does not say of which conversion; and if
            `out` holds the results of this very job, return their record. A conversion whose network was fitted already
            goes on without being told, if weights, images and settings are the same.

    Raises:
        ValueError: the budget cannot be reached, nothing can be converted, `out` holds another run, or results.
        TrainingStopped: the loss is not finite.
        OSError: `out` cannot be written.

    Returns:
        The record that is written as ``result.json``.
    """
    if card.quantized:
        raise ValueError("convert: the model is quantized: convert the one that it was made of")
    model = copied(model, "convert").to(_device())
    answer = answers_to(model, data)
    if isinstance(data, Data) and data.classes:
        data = _with_classes_of(data, job, card, answer)
    judge = Judge(model, bool(data.classes), job.output_weights, job.data_range, job.metric_function)
    if job.recipe is not None:
        check_can_learn(model, "convert")
    # What is wrong with the user's function, or cannot be described in a file, shows before the work.
    judge.metrics(model)
    card.changed_to(model).with_data(data).check()
    prepare(out, job.kind, model, resume=resume, int8=job.precision == INT8, live=job.live)
    started = time.perf_counter()
    outcome = Outcome(model, model, card.with_data(data), Choices.of(data), judge)
    if judge.classes:
        outcome.finished("original", model, 0.0)
        held = outcome.choices.data.test
        if isinstance(held, Split) and (note := near_chance(outcome.stages[-1]["accuracy"], held.labels)):
            warnings.warn(note, stacklevel=2)
    return _run(outcome, data, job, out, resume, on_progress, started)


def _with_classes_of(data: Data, job: Job, card: Card, answer: Any) -> Data:
    """The data with its classes matched to the network's outputs."""
    try:
        check_outputs(answer, data.num_classes)
    except ValueError as error:
        raise ValueError(f"convert: {error}; without classes (--task outputs) any outputs are compared") from None
    outputs = int(answer.shape[1])
    if job.classes and len(job.classes) != outputs:
        raise ValueError(f"convert: {len(job.classes)} classes are named but the network has {outputs} outputs")
    return matched(data, job.classes or card.classes, outputs)


def _run(
    outcome: Outcome,
    data: Data | SampleData,
    job: Job,
    out: Path,
    resume: bool,
    on_progress: OnProgress,
    started: float,
) -> dict[str, Any]:
    images = calibration_of(outcome.choices.data, job)
    identity = identity_of(outcome.original, outcome.choices, data, job, images)
    if job.kind != "demo" and (done := of_first(finished(out, job.kind, identity))) is not None:
        return done
    with owned(out, job.kind):
        return _work(outcome, data, job, out, resume, on_progress, started, images, identity)


def _work(
    outcome: Outcome,
    data: Data | SampleData,
    job: Job,
    out: Path,
    resume: bool,
    on_progress: OnProgress,
    started: float,
    images: Inputs,
    identity: dict[str, Any],
) -> dict[str, Any]:
    found = fitted.find(out / CHECKPOINTS, outcome.original, images, identity["conversion"])
    plan = _convert(outcome, job, images, found, on_progress)
    if found is None and job.kind != "demo" and processes().is_main_process:
        made = Fitted(outcome.separable, plan, outcome.stages[-2:])
        fitted.keep(out / CHECKPOINTS, made, outcome.original, images, identity["conversion"])
    _distil(outcome, job, out, resume or found is not None, on_progress)
    card = outcome.card.changed_to(outcome.separable)
    if processes().is_main_process:
        # Whatever happens while it is measured, the network is there; what is of an earlier one is not beside it.
        (out / RESULT).unlink(missing_ok=True)
        model_file.write(out / model_file.FILE, outcome.separable, card)
    on_progress(Step("measure", 0, 1))
    judged = _judge(outcome, data)
    record: dict[str, Any] = {}
    if processes().is_main_process:
        wanted = QuantizationJob(calibration_images=job.calibration_images, seed=job.seed, command=job.command)
        asked = wanted if job.precision == INT8 else None
        quantized = quantized_or_why_not(outcome.separable, data, asked, on_progress)
        measured = compare.compare(outcome.original, outcome.separable, plan, judged, data, job.batch)
        networks = {"normal": outcome.original, "separable": outcome.separable}
        measured["precisions"] = precisions(networks, quantized, judged, outcome.judge, data, job.batch)
        on_progress(Step("measure", 1, 1))
        on_progress(Step("write", 0, 1))
        measured["identity"] = identity
        record = _write(replace(outcome, card=card), measured, plan, data, job, out, started, quantized)
    record = of_first(record)
    remove_checkpoints(out)
    on_progress(Step("write", 1, 1))
    return record


def _write(
    outcome: Outcome,
    measured: dict[str, Any],
    plan: Plan,
    data: Data | SampleData,
    job: Job,
    out: Path,
    started: float,
    quantized: QuantizedNetwork | str,
) -> dict[str, Any]:
    card, untimed = outcome.card, measured.pop("untimed", "")
    record = {
        **about(card.model, data, job.kind, job.command, time.perf_counter() - started),
        "task": outcome.judge.task,
        "budget": job.budget,
        "metric": job.metric,
        "preprocessing": data.preprocessing.as_dict() if isinstance(data, Data) else None,
        "form": job.form,
        **measured,
        "stages": outcome.stages,
        "held_out_images": outcome.choices.held_out,
        "kept": outcome.kept,
        "notes": [note for note in (*plan.notes, outcome.choices.note, untimed) if note],
        "curves": outcome.curves,
        "onnx": export_onnx(outcome.separable, data, out),
    }
    if job.precision == INT8:
        record["int8"] = write_beside(quantized, card, data, outcome.judge, out)
    if job.live:
        record["live"] = write_live(_live(outcome, quantized), outcome.card, data, out)
    else:
        (out / LIVE).unlink(missing_ok=True)
    if isinstance(data, Data):
        image = data.test.normalise(data.test.images.take(torch.tensor([0])))
        label = data.classes[int(data.test.labels[0])] if data.classes else ""
        write_json(out / EXPLANATION, layer_data.collect(outcome.original, outcome.separable, image, label=label))
    write_json(out / RESULT, record)
    write_report(out)
    return record


def _live(outcome: Outcome, quantized: QuantizedNetwork | str) -> list[LiveNetwork]:
    found = [
        LiveNetwork("normal", "float32", outcome.original),
        LiveNetwork("separable", "float32", outcome.separable),
    ]
    return found if isinstance(quantized, str) else [*found, LiveNetwork("separable", INT8, quantized.module)]


def _convert(outcome: Outcome, job: Job, images: Inputs, found: Fitted | None, on_progress: OnProgress) -> Plan:
    """Fitted now, unless it was before."""
    on_progress(Step("convert", 0, 1))
    if found is None:
        plan = _fit(outcome, job, images, on_progress)
    else:
        outcome.separable, plan = found.network, found.plan
        outcome.stages += found.stages
    last, steps = outcome.stages[-1], outcome.steps
    on_progress(Step("convert", steps, steps, accuracy=last.get("accuracy"), error=last.get("error")))
    return plan


def _fit(outcome: Outcome, job: Job, images: Inputs, on_progress: OnProgress) -> Plan:
    started = time.perf_counter()

    def relay(done: int, total: int) -> None:
        # One more for the accuracies.
        outcome.steps = total + 1
        on_progress(Step("convert", done, outcome.steps))

    outcome.separable, plan = convert(
        outcome.original,
        images,
        job.budget,
        metric=job.metric,
        form=job.form,
        skip=job.skip,
        output_weights=job.output_weights,
        on_progress=relay,
    )
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    simple = closed_form(outcome.original, plan, images[:2])
    outcome.finished("closed form", simple, time.perf_counter() - started)
    outcome.finished("converted", outcome.separable, seconds)
    return plan


def _distil(outcome: Outcome, job: Job, out: Path, resume: bool, on_progress: OnProgress) -> None:
    if job.recipe is None:
        return
    converted = copy.deepcopy(outcome.separable.state_dict())
    history = train(
        outcome.separable,
        outcome.choices.data,
        job.recipe,
        None if job.kind == "demo" else out / CHECKPOINTS,
        teacher=outcome.original,
        distillation=replace(job.distillation, output_weights=job.output_weights),
        resume=resume,
        on_progress=relay(on_progress, "distil"),
    )
    outcome.learned("distilled", history.records)
    outcome.finished("distilled", outcome.separable, history.seconds)
    # Of too few images only outputs say something: right answers on what was learnt say nothing.
    decides = outcome.choices.held_out or not outcome.judge.classes
    if decides and is_worse(outcome.stages[-1], outcome.stages[-2]):
        outcome.separable.load_state_dict(converted)
    else:
        outcome.kept = "distilled"


def _judge(outcome: Outcome, data: Data | SampleData) -> dict[str, compare.Judged]:
    """Both networks on all test samples; images with classes are shared out by the processes."""
    judge, networks = outcome.judge, {"normal": outcome.original, "separable": outcome.separable}
    return {n: compare.Judged(judge.on(model, data.test), judge.metrics(model)) for n, model in networks.items()}


def _device() -> torch.device:
    """Where the conversion computes: in float64, which not every accelerator has."""
    device: torch.device = processes().device
    return device if device.type == "cuda" else torch.device("cpu")
