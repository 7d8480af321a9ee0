"""The commands that use a trained network: export and predict."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from sepconv.cli import arguments, options, show
from sepconv.cli.app import app
from sepconv.cli.console import Screen
from sepconv.cli.guard import guarded
from sepconv.data import load
from sepconv.data.listing import Ignored, image_files
from sepconv.device.files import check_folder as check_library
from sepconv.runs.classes import names_of_outputs, read_classes
from sepconv.runs.library import Device, export_library
from sepconv.runs.model_file import open_model
from sepconv.runs.onnx_file import export_onnx
from sepconv.runs.predict import predict
from sepconv.runs.preprocessing import preprocessing_of


@app.command("export", epilog="Example: sepconv export small --onnx small.onnx")
@guarded
def export_command(
    model: options.Model,
    onnx: Annotated[
        Path | None,
        typer.Option("--onnx", parser=options.path, metavar="FILE", help="An ONNX file to write.", show_default=False),
    ] = None,
    c: Annotated[
        Path | None,
        typer.Option("--c", parser=options.path, metavar="DIR", help="A folder for a C library.", show_default=False),
    ] = None,
    target: options.Target = "x86-64-linux",
    precision: options.DevicePrecision = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="That a call of the C library computes on.")] = 1,
    name: Annotated[str, typer.Option("--name", help="Its symbols begin with it.")] = "model",
    check: Annotated[bool, typer.Option("--check", help="Build its example and run it here, if that can be.")] = False,
    weights: options.Weights = None,
    settings: options.Settings = None,
    shape: options.InputShape = None,
    json_file: options.JsonFile = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write a network as an ONNX file of plain Conv nodes for a batch of any size, or as a C library for a device."""
    screen = Screen(quiet, json_file)
    if (onnx is None) == (c is None):
        raise ValueError("export: give --onnx FILE or --c DIR, one of them")
    arguments.check_outputs(arguments.inputs(model, weights), onnx=onnx, json=json_file)
    if c is not None:
        check_library(c)
    network, card = open_model(model, weights, arguments.parse_settings(settings or ()))
    if (known := preprocessing_of(model, weights)) is not None:
        card = card.prepared_by(known)
    if c is not None:
        goal = Device(target, precision, threads, name, check)
        library = export_library(network, card, arguments.shape_of(shape, card), c, goal)
        show.library(screen, library)
        screen.result({**asdict(library), "folder": str(library.folder)})
        return
    assert onnx is not None
    found = export_onnx(network, arguments.shape_of(shape, card), onnx)
    checked = f"largest error {found.max_error:.2g} in {found.checked_with}" if found.checked_with else "not checked"
    screen.say(f"Written: {found.path}, {found.size:,} bytes, {found.convolutions} Conv nodes, {checked}")
    screen.result({**asdict(found), "path": str(found.path)})


@app.command("predict", epilog="Example: sepconv predict small photos/cat.jpg photos/dog.jpg")
@guarded
def predict_command(
    model: options.Model,
    images: Annotated[
        list[Path],
        typer.Argument(parser=options.path, metavar="IMAGES...", help="Image files, or folders.", show_default=False),
    ],
    weights: options.Weights = None,
    settings: options.Settings = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            parser=options.filled,
            metavar="D",
            help="Data set with the classes, if the weights lack them.",
            show_default=False,
        ),
    ] = None,
    image_size: options.ImageSize = None,
    crop: options.CropShare = None,
    interpolation: options.Interpolation = None,
    mean: options.Mean = None,
    std: options.Std = None,
    bgr: options.Bgr = False,
    classes: options.Classes = None,
    skip_broken: options.SkipBroken = False,
    top: Annotated[int, typer.Option("--top", min=1, help="Classes to name for each image.")] = 3,
    compiled: Annotated[bool, typer.Option("--compiled", help="Compile the network first: for many images.")] = False,
    precision: options.ComputedIn = None,
    json_file: options.JsonFile = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Name the classes of images."""
    screen = Screen(quiet, json_file)
    arguments.check_outputs([*arguments.inputs(model, weights, data), *images], json=json_file)
    wanted = arguments.Typed(image_size, crop, interpolation, mean, std, bgr).over(preprocessing_of(model, weights))
    network, card = open_model(model, weights, arguments.parse_settings(settings or ()))
    typed, known = read_classes(classes) if classes else [], [names_of_outputs(card.model)]
    if data is not None:
        source = load(data, preprocessing=wanted)
        show.notes(screen, source)
        known = [source.classes, *known]
        card = replace(card.with_data(source), classes=card.classes)
    elif wanted is not None:
        card = card.prepared_by(wanted)
    files = image_files(images, ignored := Ignored())
    if ignored:
        screen.say(f"{len(files)} images, {ignored}")
    skipped: list[str] | None = [] if skip_broken else None
    found = predict(network, card, files, top, compiled, precision, typed, known, skipped)
    if skipped:
        screen.say(f"Broken images left out: {len(skipped)} ({', '.join(skipped[:5])})")
    show.predictions(screen, found)
    screen.result([asdict(prediction) for prediction in found])
