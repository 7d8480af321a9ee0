"""`train`: checks that everything fits, then epoch after epoch with a checkpoint and a line in the log."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from sepconv.data import Data, LoaderSplit, SampleData, Samples
from sepconv.data.dataset import NO_AUGMENT
from sepconv.data.samples import as_samples
from sepconv.layers.borrowed import copied, evaluating
from sepconv.layers.replace import replaced_layers, saves_passes
from sepconv.leaves import Inputs
from sepconv.leaves.complaint import complaint
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
    data: Data | SampleData | Iterable[Any],
    recipe: Recipe,
    out: Path | str | None = None,
    *,
    val: Samples | Iterable[Any] | None = None,
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

    With a teacher, data may be anything: where there are no classes, or the model's output is not one row of numbers
    for them, the model learns to give the teacher's outputs, whatever their structure. A model in evaluation mode then
    stays in it: batch norms keep their statistics, and nothing is dropped.

    Args:
        data: a data set, or batches, such as a ``DataLoader`` (see :meth:`sepconv.leaves.Inputs.of`): each epoch goes
            through them as they are, so that size, order and augmentation are the loader's and not the recipe's.
        val: batches for the log after each epoch, in the place of the data's test split; the training batches
            themselves where there is neither.
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
    data = as_data(data, val)
    _check_arguments(data, recipe, out, teacher, distillation, resume, process)
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    example = Inputs.of(data.calibration(min(EXAMPLES, len(data.train)))).to(process.device, memory_format=layout)
    _place(model, recipe, process.device)
    classes = _try_model(model, example, data, teacher is not None)
    if recipe.whiten:
        whiten_first_layer(model, _only_tensor(data.calibration(min(WHITENED, len(data.train)))))
    identity = _identity(model, data, recipe, distillation or (Distillation() if teacher else None))
    fused = recipe.kernels == "sepconv" and saves_passes(model)
    ours = replaced_layers(model) if fused else nullcontext()
    with _guide(model, teacher, distillation, recipe, example, classes) as guide, ours:
        trainer = Trainer(model, data, recipe, guide, on_progress, classes=classes)
        folder = None if out is None else Path(out)
        history = History()
        if folder is not None:
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


def as_data(data: Data | SampleData | Iterable[Any], val: Samples | Iterable[Any] | None = None) -> Data | SampleData:
    """Batches as a data set; a data set with other samples in the place of its test split."""
    if isinstance(data, Data | SampleData):
        return data if val is None else replace(data, test=as_samples(val))  # type: ignore[arg-type]
    split = LoaderSplit.of(data)
    labels = next(split.batches(1))[1]
    classes = 0 if labels is None else int(labels.max()) + 1
    return SampleData(type(data).__name__, split, split if val is None else as_samples(val), num_classes=classes)


def _only_tensor(images: Tensor | Inputs) -> Tensor:
    tensor = Inputs.of(images).tensor
    if tensor is None:
        raise ValueError("train: whitening is for networks of one input")
    return tensor


def _check_arguments(
    data: Data | SampleData,
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
    if isinstance(data.train, LoaderSplit) and process.num_processes > 1:
        raise ValueError("train: several processes cannot share a loader's batches: give a data set of sepconv.data")
    if isinstance(data, SampleData) and (recipe.augment != NO_AUGMENT or recipe.mix):
        raise ValueError("train: flips, crops, cutout and mixing are for data sets of images: the loader may do them")
    if min(recipe.batch_size, len(data.train)) < process.num_processes:
        raise ValueError(
            f"train: {process.num_processes} processes cannot share batches of {recipe.batch_size} "
            f"from {len(data.train)} images"
        )
    if isinstance(data, Data) and recipe.crop_padding > min(data.input_shape[1:]):
        raise ValueError(
            f"train: crop_padding {recipe.crop_padding} is wider than the images of shape {data.input_shape}: some "
            "crops would show nothing of them"
        )
    recipe.check_device(process.device)


def _place(model: nn.Module, recipe: Recipe, device: torch.device) -> None:
    model.to(device)
    if recipe.channels_last:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 4:  # the layout is of images; volumes have none by this name
                tensor.data = tensor.data.to(memory_format=torch.channels_last)


def _try_model(model: nn.Module, example: Inputs, data: Data | SampleData, taught: bool) -> bool:
    """Whether the model learns classes, rather than a teacher's outputs.

    Raises:
        ValueError: it does not take the data, or has no output for each class, or there are no classes and no teacher.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("train: the model has no trainable parameters")
    shape = data.input_shape if isinstance(data, Data) else example
    try:
        with torch.no_grad(), evaluating(model):
            answer = example[:2].run(model)
    except Exception as error:  # any code of the model may fail, in any way
        raise ValueError(f"train: the model does not take images of shape {shape}: {complaint(error)}") from error
    if not data.num_classes and not taught:
        raise ValueError("train: the data has no classes: give a teacher, whose outputs the model learns to give")
    fits = isinstance(answer, Tensor) and answer.ndim == 2 and answer.shape[1] >= data.num_classes
    if data.num_classes and (isinstance(data, Data) or not taught):
        check_outputs(answer, data.num_classes)
    return bool(data.num_classes) and fits


def _guide(
    model: nn.Module,
    teacher: nn.Module | None,
    distillation: Distillation | None,
    recipe: Recipe,
    example: Inputs,
    classes: bool,
) -> Any:
    if teacher is None:
        return nullcontext()
    teacher = copied(teacher, "train")
    _place(teacher, recipe, next((t.device for t in example.tensors), torch.device("cpu")))
    return Guide(model, teacher, distillation or Distillation(), example, classes)


def _identity(
    model: nn.Module, data: Data | SampleData, recipe: Recipe, distillation: Distillation | None
) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued."""
    settings = {name: value for name, value in asdict(recipe).items() if name != "kernels"}
    return {
        "recipe": settings,
        "distillation": None if distillation is None else _settings(distillation),
        "data": _identity_of_data(data),
        "model": checkpoint.describe(model),
    }


def _identity_of_data(data: Data | SampleData) -> dict[str, Any]:
    """Of a loader how many batches it gives: what is in the first of them may be by chance."""
    if isinstance(data.train, LoaderSplit):
        return {"batches": data.train.count, "classes": bool(data.num_classes)}
    sizes = {"train": len(data.train), "test": len(data.test)}
    return {**sizes, "shape": data.input_shape, "classes": data.classes}


def _settings(distillation: Distillation) -> dict[str, Any]:
    """As checkpoints of before have them: the weights of outputs only where there are any."""
    return {key: value for key, value in asdict(distillation).items() if key != "output_weights" or value}


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
