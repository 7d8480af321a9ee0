"""The classes of image files, by a trained network that knows how images are prepared for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sepconv.compile import compile
from sepconv.data.images import read_images
from sepconv.data.listing import image_files
from sepconv.layers.borrowed import evaluating
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

    Raises:
        ValueError: the card says nothing about images, a file is no image or a folder has none (it is named).
        FileNotFoundError: no such file or folder.
    """
    prepared = card.preprocessing
    if prepared is None or prepared.fit is None:
        raise ValueError("predict: the weights do not say how images are prepared; --data D takes that from a data set")
    files = image_files(paths)
    scores_of: Callable[[Tensor], Tensor] = partial(_scores, model)
    if compiled or precision is not None:
        with evaluating(model):
            zeros = torch.zeros(min(len(files), BATCH), *card.input_shape)
            scores_of = compile(model, zeros, precision=precision)
    found: list[Prediction] = []
    for start in range(0, len(files), BATCH):
        chunk = files[start : start + BATCH]
        scores = scores_of(card.normalise(read_images(chunk, card.input_shape[0], prepared.fit)))
        names = class_names(card, scores.shape[1])
        best = scores.softmax(1).topk(min(top, scores.shape[1]))
        for path, probabilities, labels in zip(chunk, best.values.tolist(), best.indices.tolist(), strict=True):
            found.append(Prediction(str(path), [names[label] for label in labels], probabilities))
    return found


def _scores(model: nn.Module, images: Tensor) -> Tensor:
    with evaluating(model):
        scores: Tensor = model(images)
    return scores
