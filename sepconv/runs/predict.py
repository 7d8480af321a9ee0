"""The classes of image files, by a trained network that knows how images are prepared for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sepconv.compile import compile
from sepconv.data import Crop
from sepconv.data.images import BrokenImage, read_images
from sepconv.data.listing import image_files
from sepconv.layers.borrowed import because_of_weights, evaluating
from sepconv.leaves.complaint import complaint
from sepconv.runs.model_file import Card, class_names

BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, best first, with their probabilities."""

    image: str
    classes: list[str]
    probabilities: list[float]


@torch.inference_mode()
def predict(
    model: nn.Module,
    card: Card,
    paths: Sequence[str | Path],
    top: int = 3,
    compiled: bool = False,
    precision: str | None = None,
    classes: Sequence[str] = (),
    known: Sequence[Sequence[str]] = (),
    skipped: list[str] | None = None,
) -> list[Prediction]:
    """Classify images.

    Args:
        model: gives scores (N, classes).
        card: how images are prepared (see ``model_file``).
        paths: image files, and folders for all images below them, ordered by their paths; each image is resized and
            cropped to the network's input.
        top: classes named for each image.
        compiled: run the network by ``sepconv.compile``: takes seconds first, pays for itself with many images.
        precision: as ``sepconv.compile`` has it; one that is named compiles the network.
        classes: names of the network's outputs in their order; those of the card where it is empty.
        known: names that may be theirs where the card has none: the first that are as many as the outputs.
        skipped: gets the names of broken images, which are left out; None makes an error of the first.

    Raises:
        ValueError: the card says nothing about images, a file is no image or a folder has none (it is named), the
            network gives no scores, or not as many as there are names.
        FileNotFoundError: no such file or folder.
    """
    prepared = card.preprocessing
    if prepared is None or prepared.fit is None:
        raise ValueError(
            "predict: the weights do not say how images are prepared: give --mean, --std and --image-size, or "
            "--data D, which takes that from a data set"
        )
    files = image_files(paths)
    scores_of: Callable[[Tensor], Any] = partial(_scores, model)
    if compiled or precision is not None:
        with evaluating(model):
            zeros = torch.zeros(min(len(files), BATCH), *card.input_shape)
            scores_of = compile(model, zeros, precision=precision)
    found: list[Prediction] = []
    for start in range(0, len(files), BATCH):
        chunk, images = _read(files[start : start + BATCH], card.input_shape[0], prepared.fit, skipped)
        if not chunk:
            continue
        scores = scores_of(card.normalise(torch.cat(images)))
        _check(scores, chunk, classes, model)
        names = classes or _names(card, known, scores.shape[1])
        best = scores.softmax(1).topk(min(top, scores.shape[1]))
        for path, probabilities, labels in zip(chunk, best.values.tolist(), best.indices.tolist(), strict=True):
            found.append(Prediction(str(path), [names[label] for label in labels], probabilities))
    if skipped and not found:
        raise ValueError(f"predict: all images are broken, such as {skipped[0]}")
    return found


def _read(
    files: Sequence[Path], channels: int, fit: Crop, skipped: list[str] | None
) -> tuple[list[Path], list[Tensor]]:
    """The files that are images, and these."""
    chunk, images = [], []
    for file in files:
        try:
            images.append(read_images([file], channels, fit))
        except BrokenImage:
            if skipped is None:
                raise
            skipped.append(str(file))
        else:
            chunk.append(file)
    return chunk, images


def _names(card: Card, known: Sequence[Sequence[str]], outputs: int) -> Sequence[str]:
    fitting = (found for found in (card.classes, *known) if len(found) == outputs)
    return next(fitting, class_names(card, outputs))


def _check(scores: object, files: Sequence[Path], classes: Sequence[str], model: nn.Module) -> None:
    """ValueError unless there is a row of finite scores for each file, a score for each class."""
    if not isinstance(scores, Tensor) or scores.dim() != 2:
        given = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"predict: the network must give scores (N, classes), got {given}")
    if classes and len(classes) != scores.shape[1]:
        raise ValueError(f"predict: {len(classes)} classes are named but the network has {scores.shape[1]} outputs")
    for file, finite in zip(files, scores.isfinite().all(1).tolist(), strict=True):
        if not finite:
            raise ValueError(f"predict: the scores of {file} hold NaN or infinity{because_of_weights(model)}")


def _scores(model: nn.Module, images: Tensor) -> Any:
    try:
        with evaluating(model):
            return model(images)
    except Exception as error:  # any code of the model may fail, in any way
        shape = tuple(images.shape[1:])
        raise ValueError(f"predict: the model does not take images of shape {shape}: {complaint(error)}") from error
