"""The command that makes a network compute with 8-bit integers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sepconv.cli import arguments, options, show
from sepconv.cli.app import app
from sepconv.cli.console import Screen
from sepconv.cli.guard import guarded, resumable
from sepconv.cli.jobs import claim_outputs, load_data
from sepconv.runs.classes import read_classes
from sepconv.runs.model_file import open_model
from sepconv.runs.preprocessing import preprocessing_of
from sepconv.runs.quantized import QuantizationJob, quantize_model
from sepconv.runs.run_folder import CHECKPOINTS
from sepconv.system.allocator import keep_freed_memory
from sepconv.system.threads import threads_set_to
from sepconv.train import Distillation, Recipe

FINE_TUNING_LR = {"sgd": 0.002, "adamw": 0.0001, "rmsprop": 0.0001}
"""Highest learning rate, unless told: the network is nearly right already."""


@app.command("quantize", epilog="Example: sepconv quantize small --data photos --out small-int8")
@guarded
def quantize_command(
    context: typer.Context,
    model: options.Model,
    data: options.DataSource,
    weights: options.Weights = None,
    out: options.Out = Path("quantized"),
    settings: options.Settings = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            "--skip", metavar="NAME", help="A layer that stays in float32; may be repeated.", show_default=False
        ),
    ] = None,
    calibration_images: Annotated[
        int, typer.Option("--calibration-images", min=1, help="Unlabelled images that are looked at.")
    ] = 1000,
    force: Annotated[bool, typer.Option("--force", help="Write the network even if its outputs move too far.")] = False,
    epochs: options.Epochs = 0,
    batch_size: options.BatchSize = 128,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            callback=options.finite,
            help="Highest learning rate: 0.002, of adamw and rmsprop 0.0001, if left out.",
            show_default=False,
        ),
    ] = None,
    optimizer: options.Optimizer = "sgd",
    flip: options.Flip = False,
    crop_padding: options.Crop = 0,
    image_size: options.ImageSize = None,
    crop: options.CropShare = None,
    interpolation: options.Interpolation = None,
    mean: options.Mean = None,
    std: options.Std = None,
    bgr: options.Bgr = False,
    classes: options.Classes = None,
    skip_broken: options.SkipBroken = False,
    resume: options.Resume = False,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    json_file: options.JsonFile = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Make a trained network compute with 8-bit integers; with epochs it then learns from itself as it was."""
    recipe = None
    if epochs:
        recipe = Recipe(
            epochs=epochs,
            batch_size=batch_size,
            lr=FINE_TUNING_LR.get(optimizer, 0.002) if lr is None else lr,
            optimizer=optimizer,
            flip=flip,
            crop_padding=crop_padding,
            seed=seed,
        )
    job = QuantizationJob(
        recipe=recipe,
        distillation=Distillation(),
        calibration_images=calibration_images,
        skip=tuple(skip or ()),
        force=force,
        classes=tuple(read_classes(classes)) if classes else (),
        seed=seed,
        command=context.obj,
    )
    typed = arguments.Typed(image_size, crop, interpolation, mean, std, bgr)
    screen = Screen(quiet, json_file)
    claim_outputs(out, "quantize", arguments.inputs(model, weights, data), json_file, resume)
    images = load_data(screen, data, typed.over(preprocessing_of(model, weights)), skip_broken)
    show.preparation(screen, images)
    network, card = open_model(model, weights, arguments.parse_settings(settings or ()), data=images)
    keep_freed_memory()
    with threads_set_to(threads), resumable(out / CHECKPOINTS, context.obj), screen.progress() as on_progress:
        record = quantize_model(network, card, images, job, out, resume=resume, on_progress=on_progress)
    _show(screen, record, out)
    screen.result(record)


def _show(screen: Screen, record: dict[str, Any], out: Path) -> None:
    show.quantized(screen, record)
    show.files(screen, out, record["model"])
