"""`train`: checks that everything fits, then epoch after epoch with a checkpoint and a line in the log."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from sepconv.data import Data
from sepconv.layers.borrowed import copied, evaluating
from sepconv.system.files import check_folder, nearest_folder, remove_partial_files
from sepconv.system.processes import of_first
from sepconv.train import checkpoint
from sepconv.train.distill import Distillation, Guide
from sepconv.train.evaluate import check_outputs
from sepconv.train.history import History, Progress
from sepconv.train.processes import processes
from sepconv.train.recipe import Recipe
from sepconv.train.trainer import Trainer
from sepconv.train.whiten import whiten_first_layer

EXAMPLES = 64  # images on which models are tried before the training begins
WHITENED = 2000  # images whose patches the first layer starts from
COPIES_OF_WEIGHTS = {"sgd": 2, "adamw": 3, "rmsprop": 3}


def train(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    out: Path | str | None = None,
    *,
    teacher: nn.Module | None = None,
    distillation: Distillation | None = None,
    resume: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> History:
    """Train `model` in place; it ends in evaluation mode, on the device where it was trained.

    What the caller froze stays frozen: modules in evaluation mode inside a model in training mode (one in evaluation
    mode is trained as a whole), and batch norms whose parameters need no gradient or whose momentum is 0. After each
    epoch the test images are looked at for the log; no choice depends on it.

    Under `accelerate launch` or `torchrun` every process calls this with the same arguments: each batch is shared
    out, the main process alone writes the log and the checkpoints.

    Args:
        out: folder of `log.jsonl` (a line an epoch) and the last two checkpoints; None writes nothing.
        teacher: a trained network to learn from, by `distillation` (its defaults where that is None); left as it was.
        resume: go on after the newest good checkpoint in `out`; with one process the result is bit-equal to that of
            an undisturbed run. Where there is no checkpoint the training starts at the beginning.
        on_progress: called in the main process after each step (on GPUs each 20th) and each epoch.

    Raises:
        ValueError: model, data, teacher and recipe do not fit, or `out` holds checkpoints and `resume` is off.
        CheckpointRefused: no checkpoint in `out` is whole and of this run (a ValueError).
        TrainingStopped: the loss or the weights are not finite; the checkpoints are of before.
        OSError: `out` cannot be written.
    """
    process = processes()
    _check_arguments(data, recipe, out, teacher, distillation, resume, process)
    example = data.calibration(min(EXAMPLES, len(data.train))).to(process.device)
    _place(model, recipe, process.device)
    _try_model(model, example, data)
    if recipe.whiten:
        whiten_first_layer(model, data.calibration(min(WHITENED, len(data.train))))
    with _guide(model, teacher, distillation, recipe, example) as guide:
        trainer = Trainer(model, data, recipe, guide, on_progress)
        folder = None if out is None else Path(out)
        history = History()
        if folder is not None:
            identity = _identity(model, data, recipe, distillation or (Distillation() if teacher else None))
            if process.is_main_process:
                _open_folder(folder, model, recipe, resume)
            process.wait_for_everyone()
            if resume:
                history = _restore(trainer, folder, identity)
        with torch.random.fork_rng():
            for epoch in range(len(history.records), recipe.epochs):
                history.records.append(trainer.run_epoch(epoch))
                if folder is not None and process.is_main_process:
                    state = {"identity": identity, "records": history.records, **trainer.state_dict()}
                    checkpoint.save(folder, epoch + 1, state)
                    history.write_log(folder)
        trainer.finish()
    return history


def _check_arguments(
    data: Data,
    recipe: Recipe,
    out: Path | str | None,
    teacher: nn.Module | None,
    distillation: Distillation | None,
    resume: bool,
    process: PartialState,
) -> None:
    if distillation is not None and teacher is None:
        raise ValueError("train: distillation needs a teacher")
    if resume and out is None:
        raise ValueError("train: resume needs out, the folder of the run")
    if min(recipe.batch_size, len(data.train)) < process.num_processes:
        raise ValueError(
            f"train: {process.num_processes} processes cannot share batches of {recipe.batch_size} "
            f"from {len(data.train)} images"
        )
    if recipe.crop_padding > min(data.input_shape[1:]):
        raise ValueError(
            f"train: crop_padding {recipe.crop_padding} is wider than the images of shape {data.input_shape}: some "
            "crops would show nothing of them"
        )
    recipe.check_device(process.device)


def _place(model: nn.Module, recipe: Recipe, device: torch.device) -> None:
    model.to(device)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _try_model(model: nn.Module, example: Tensor, data: Data) -> None:
    """ValueError unless the model takes the data's images and has an output for each class."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("train: the model has no trainable parameters")
    try:
        with torch.no_grad(), evaluating(model):
            answer = model(example[:2])
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"train: the model does not take images of shape {data.input_shape}: {reason}") from error
    check_outputs(answer, data.num_classes)


def _guide(
    model: nn.Module,
    teacher: nn.Module | None,
    distillation: Distillation | None,
    recipe: Recipe,
    example: Tensor,
) -> Any:
    if teacher is None:
        return nullcontext()
    teacher = copied(teacher, "train")
    _place(teacher, recipe, example.device)
    return Guide(model, teacher, distillation or Distillation(), example)


def _identity(model: nn.Module, data: Data, recipe: Recipe, distillation: Distillation | None) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued."""
    return {
        "recipe": asdict(recipe),
        "distillation": None if distillation is None else asdict(distillation),
        "data": {
            "train": len(data.train),
            "test": len(data.test),
            "shape": data.input_shape,
            "classes": data.classes,
        },
        "model": checkpoint.describe(model),
    }


def _open_folder(folder: Path, model: nn.Module, recipe: Recipe, resume: bool) -> None:
    check_folder(folder)
    remove_partial_files(folder)
    if checkpoint.checkpoints(folder) and not resume:
        raise ValueError(f"train: {folder} holds checkpoints of an earlier run: resume it, or use another folder")
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    copies = COPIES_OF_WEIGHTS[recipe.optimizer] + bool(recipe.ema)
    needed, free = weights * copies * (checkpoint.KEPT + 1), shutil.disk_usage(nearest_folder(folder)).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"train: the checkpoints need {needed >> 20} MB but {folder} has {free >> 20} MB left",
        )


def _restore(trainer: Trainer, folder: Path, identity: dict[str, Any]) -> History:
    """Bring the trainer of every process to the newest good checkpoint that the main process finds."""
    state = of_first(checkpoint.newest(folder, identity) if trainer.process.is_main_process else None)
    if state is None:
        return History()
    try:
        trainer.load_state_dict(state)
        history = History(state["records"], len(state["records"]))
        history.check()
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        raise checkpoint.CheckpointRefused(
            f"resume: the checkpoint in {folder} holds no state of such a training ({type(error).__name__}: {error})"
        ) from error
    if trainer.process.is_main_process:
        history.write_log(folder)
    return history
