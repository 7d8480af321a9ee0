"""The long commands: demo, convert, train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sepconv.cli import arguments, options, show
from sepconv.cli.app import app
from sepconv.cli.console import Screen
from sepconv.cli.guard import guarded, resumable
from sepconv.data import Data, Preprocessing, SampleData, load, load_samples
from sepconv.data.samples import is_sample_folder
from sepconv.models.registry import function_of
from sepconv.runs.classes import names_of, read_classes
from sepconv.runs.model_file import model_path, open_model
from sepconv.runs.preprocessing import preprocessing_of
from sepconv.runs.run_folder import CHECKPOINTS, FILES, INT8, RESULT, claim, claim_beside, refuse_earlier
from sepconv.runs.training import train_model
from sepconv.runs.workflow import DISTILLATION_LR, OUTPUTS_LR, Job, convert_model, demo
from sepconv.system.allocator import keep_freed_memory
from sepconv.system.files import check_folder
from sepconv.system.threads import threads_set_to
from sepconv.train import Distillation, Recipe


@app.command("demo", epilog="Example: sepconv demo --out demo")
@guarded
def demo_command(
    context: typer.Context,
    out: options.Out = Path("demo"),
    live: options.Live = True,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    json_file: options.JsonFile = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """The main job on embedded data, in about a minute: train, convert, distil, measure."""
    screen = Screen(quiet, json_file)
    claim_outputs(out, "demo", [], json_file)
    claim_beside(out)
    if (out / RESULT).exists():
        screen.say(f"This demo takes the place of the one in {out}.")
    keep_freed_memory()
    with threads_set_to(threads), screen.progress() as on_progress:
        record = demo(out, seed=seed, live=live, command=context.obj, on_progress=on_progress)
    show.stages(screen, record)
    show.before_and_after(screen, record, out)
    screen.result(record)


@app.command("convert", epilog="Example: sepconv convert runs/vgg --data photos --budget 1/8 --epochs 5 --out small")
@guarded
def convert_command(
    context: typer.Context,
    model: options.Model,
    data: options.DataSource,
    weights: options.Weights = None,
    budget: Annotated[str, typer.Option("--budget", help="Share of the cost that may remain.")] = "1/8",
    metric: Annotated[str, typer.Option("--metric", help="Cost: conv_params, macs or latency.")] = "conv_params",
    form: Annotated[
        str, typer.Option("--form", help="bottleneck (pointwise, depthwise, pointwise) or separable (the last two).")
    ] = "bottleneck",
    out: options.Out = Path("separable"),
    epochs: options.Epochs = 5,
    settings: options.Settings = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            "--skip", metavar="NAME", help="A module that stays as it is; may be repeated.", show_default=False
        ),
    ] = None,
    calibration_images: Annotated[
        int, typer.Option("--calibration-images", min=1, help="Unlabelled images the conversion looks at.")
    ] = 1000,
    batch_size: options.BatchSize = 128,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            callback=options.finite,
            help="Highest learning rate: 0.02, separable form 0.05, without classes 0.001, if left out.",
            show_default=False,
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            "--optimizer", help="sgd, adamw or rmsprop: sgd, adamw without classes, if left out.", show_default=False
        ),
    ] = None,
    flip: options.Flip = False,
    crop_padding: options.Crop = 0,
    cutout: options.Cutout = 0,
    mixup: options.Mixup = 0.0,
    cutmix: options.Cutmix = 0.0,
    mixed_precision: options.Precision = "no",
    kernels: options.Kernels = "sepconv",
    average: options.Average = 0.0,
    temperature: Annotated[
        float, typer.Option("--temperature", callback=options.finite, help="Of the distillation.")
    ] = 4.0,
    alpha: Annotated[
        float,
        typer.Option("--alpha", callback=options.finite, help="Weight of the original against the labels, 0 to 1."),
    ] = 0.9,
    image_size: options.ImageSize = None,
    crop: options.CropShare = None,
    interpolation: options.Interpolation = None,
    mean: options.Mean = None,
    std: options.Std = None,
    bgr: options.Bgr = False,
    classes: options.Classes = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            help="classes or outputs: learn and compare right answers, or whatever the network puts out. Classes where "
            "the data has any, if left out.",
            show_default=False,
        ),
    ] = None,
    output_weight: Annotated[
        list[str] | None,
        typer.Option(
            "--output-weight",
            metavar="NAME=WEIGHT",
            help="How much an output counts, 1 if left out; may be repeated.",
            show_default=False,
        ),
    ] = None,
    data_range: Annotated[
        float | None,
        typer.Option(
            "--data-range",
            callback=options.finite,
            help="Of images that the network gives, such as 255.",
            show_default=False,
        ),
    ] = None,
    metric_function: Annotated[
        str | None,
        typer.Option(
            "--metric-function",
            metavar="M:F",
            help="package.module:function of your own: takes a network, gives numbers by name.",
            show_default=False,
        ),
    ] = None,
    skip_broken: options.SkipBroken = False,
    resume: options.Resume = False,
    batch: options.Batch = 1,
    precision: Annotated[
        str, typer.Option("--precision", help="float32, or int8: a quantized network beside it, in the folder int8.")
    ] = "float32",
    live: options.Live = False,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    json_file: options.JsonFile = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Make a trained normal network separable, distil it, measure both."""
    arguments.check_precision(precision)
    recipe = None
    if epochs:
        recipe = Recipe(
            epochs=epochs,
            batch_size=batch_size,
            # A form that is not known is refused by the conversion, with the names of those that are.
            lr=DISTILLATION_LR.get(form, 0.02) if lr is None else lr,
            optimizer=optimizer or "sgd",
            flip=flip,
            crop_padding=crop_padding,
            cutout=cutout,
            mixup=mixup,
            cutmix=cutmix,
            mixed_precision=mixed_precision,
            ema=average,
            seed=seed,
            kernels=kernels,
        )
    job = Job(
        budget=arguments.parse_budget(budget),
        metric=metric,
        form=form,
        recipe=recipe,
        distillation=Distillation(temperature=temperature, alpha=alpha),
        calibration_images=calibration_images,
        skip=tuple(skip or ()),
        batch=batch,
        classes=tuple(read_classes(classes)) if classes else (),
        output_weights=arguments.parse_weights(output_weight or ()),
        data_range=data_range,
        precision=precision,
        live=live,
        seed=seed,
        command=context.obj,
    )
    given = arguments.parse_settings(settings or ())
    typed = arguments.Typed(image_size, crop, interpolation, mean, std, bgr)
    screen = Screen(quiet, json_file)
    claim_outputs(out, "convert", read := arguments.inputs(model, weights, data), json_file, resume)
    if precision == INT8:
        claim_beside(out, read)
    wanted = typed.over(preprocessing_of(model, weights))
    images = load_data(screen, data, wanted, skip_broken, arguments.parse_task(task))
    show.preparation(screen, images)
    if metric_function is not None:
        job = replace(job, metric_function=function_of(metric_function))
    if not images.classes and recipe is not None:
        # Errors relative to a variance have gradients of any size, which AdamW makes equal.
        job = replace(job, recipe=replace(recipe, optimizer=optimizer or "adamw", lr=OUTPUTS_LR if lr is None else lr))
    network, card = open_model(model, weights, given, data=images)
    if images.classes:
        card = replace(card, classes=card.classes or names_of(card.model, images.classes))
    keep_freed_memory()
    with threads_set_to(threads), resumable(out / CHECKPOINTS, context.obj), screen.progress() as on_progress:
        record = convert_model(network, card, images, job, out, resume=resume, on_progress=on_progress)
    show.stages(screen, record)
    show.before_and_after(screen, record, out)
    if "int8" in record:
        show.quantized_beside(screen, record["int8"], out)
    screen.result(record)


@app.command("train", epilog="Example: sepconv train vgg_small --data digits --epochs 12 --out runs/digits")
@guarded
def train_command(
    context: typer.Context,
    model: options.Model,
    data: options.DataSource,
    out: options.Out,
    weights: options.Weights = None,
    settings: options.Settings = None,
    epochs: options.Epochs = 10,
    batch_size: options.BatchSize = 128,
    lr: options.LearningRate = 0.1,
    optimizer: options.Optimizer = "sgd",
    schedule: options.Schedule = "one_cycle",
    weight_decay: options.WeightDecay = 5e-4,
    label_smoothing: options.LabelSmoothing = 0.0,
    flip: options.Flip = False,
    crop_padding: options.Crop = 0,
    cutout: options.Cutout = 0,
    mixup: options.Mixup = 0.0,
    cutmix: options.Cutmix = 0.0,
    mixed_precision: options.Precision = "no",
    kernels: options.Kernels = "sepconv",
    average: options.Average = 0.0,
    whiten: options.Whiten = False,
    image_size: options.ImageSize = None,
    crop: options.CropShare = None,
    interpolation: options.Interpolation = None,
    mean: options.Mean = None,
    std: options.Std = None,
    bgr: options.Bgr = False,
    skip_broken: options.SkipBroken = False,
    resume: options.Resume = False,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    json_file: options.JsonFile = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train a network, in one process or under accelerate launch or torchrun."""
    recipe = Recipe(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        optimizer=optimizer,
        schedule=schedule,
        weight_decay=weight_decay,
        label_smoothing=label_smoothing,
        flip=flip,
        crop_padding=crop_padding,
        cutout=cutout,
        mixup=mixup,
        cutmix=cutmix,
        mixed_precision=mixed_precision,
        ema=average,
        whiten=whiten,
        seed=seed,
        kernels=kernels,
    )
    given = arguments.parse_settings(settings or ())
    typed = arguments.Typed(image_size, crop, interpolation, mean, std, bgr)
    screen = Screen(quiet, json_file)
    claim_outputs(out, "train", arguments.inputs(model, weights, data), json_file, resume)
    # Of a network that begins with random weights nobody else has a say.
    known = preprocessing_of(model, weights) if weights or model_path(model) or given.get("pretrained") else None
    images = load_data(screen, data, typed.over(known), skip_broken, labelled=True)
    assert isinstance(images, Data)
    network, card = open_model(model, weights, given, data=images, seed=seed)
    keep_freed_memory()
    with threads_set_to(threads), resumable(out, context.obj), screen.progress() as on_progress:
        record = train_model(
            network, card, images, recipe, out, resume=resume, command=context.obj, on_progress=on_progress
        )
    show.trained(screen, record, out)
    screen.result(record)


def claim_outputs(out: Path, kind: str, read: list[Path], json_file: Path | None, resume: bool = False) -> None:
    """Refuse outputs that would replace what is read, or work that was done before, before anything is done."""
    claim(out, kind, read)
    refuse_earlier(out, kind, resume)
    check_folder(out)
    arguments.check_outputs(read, taken=[out / name for name in FILES], json=json_file)


def load_data(
    screen: Screen, source: str, wanted: Preprocessing | None, skip_broken: bool, labelled: bool | None = None
) -> Data | SampleData:
    """What is in `source`: images, with or without classes, or samples, which have none."""
    if labelled is not True and is_sample_folder(source):
        samples = load_samples(source)
        show.notes(screen, samples)
        return samples
    folder = Path(source)
    doing = f"Looking for images below {folder.resolve()}" if folder.is_dir() else f"Reading {source}"
    with screen.says_if_slow(doing):
        found = load(source, preprocessing=wanted, skip_broken=skip_broken, labelled=labelled)
    show.notes(screen, found)
    return found
