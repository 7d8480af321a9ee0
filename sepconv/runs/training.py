"""A network is trained; it, its measurements and a page about it come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from sepconv.cost import count
from sepconv.data import Data
from sepconv.report import write_report
from sepconv.runs import compare, model_file
from sepconv.runs.card import Card
from sepconv.runs.relay import relay
from sepconv.runs.run_folder import RESULT, about, owned, prepare, write_json
from sepconv.system.progress import OnProgress, ignore
from sepconv.train import Recipe, evaluate, train
from sepconv.train.processes import processes


def train_model(
    model: nn.Module,
    card: Card,
    data: Data,
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    command: str = "",
    on_progress: OnProgress = ignore,
) -> dict[str, Any]:
    """Train a network in place; `out` gets ``model.safetensors``, ``result.json``, ``report.html``, the log and the
    checkpoints.

    Under `accelerate launch` or `torchrun` the main process writes.
    """
    prepare(out, "train", model, resume=resume)
    card.with_data(data).check()
    with owned(out, "train"):
        return _work(model, card, data, recipe, out, resume, command, on_progress)


def _work(
    model: nn.Module,
    card: Card,
    data: Data,
    recipe: Recipe,
    out: Path,
    resume: bool,
    command: str,
    on_progress: OnProgress,
) -> dict[str, Any]:
    history = train(model, data, recipe, out, resume=resume, on_progress=relay(on_progress, "train"))
    metrics = evaluate(model, data.test)
    model = model.cpu()
    cost = count(model, data.input_shape)
    record = {
        **about(card.model, data, "train", command, history.seconds),
        "normal": {
            "conv_params": cost.conv_params,
            "params": cost.params,
            "macs": cost.macs,
            "bytes": cost.bytes,
            "accuracy": metrics.accuracy,
            "loss": metrics.loss,
        },
        "curves": [{**record, "phase": "original"} for record in history.records],
        **compare.confusions({"normal": metrics.confusion}, data.classes),
        "test_images": len(data.test),
    }
    if processes().is_main_process:
        model_file.write(out / model_file.FILE, model, card.with_data(data))
        write_json(out / RESULT, record)
        write_report(out)
    return record
