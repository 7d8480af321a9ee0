"""The state of one training run and its step: model, optimizer, running average, in one process or many."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from sepconv.data import Data, SampleData
from sepconv.data.augment import generator
from sepconv.leaves import Inputs
from sepconv.system.processes import add_up, average
from sepconv.train.average import WeightAverage
from sepconv.train.distill import Guide
from sepconv.train.evaluate import evaluate
from sepconv.train.history import Progress, TrainingStopped
from sepconv.train.processes import processes
from sepconv.train.recipe import Recipe

STEPS_BETWEEN_LOOKS_ON_GPU = 20  # reading the loss makes the processor wait for the GPU
# Each process keeps its own running statistics within an epoch; PyTorch 2.13 renamed the argument.
RENAMED = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
OWN_STATISTICS: dict[str, Any] = {"forward_sync_buffers" if RENAMED else "broadcast_buffers": False}


class Trainer:
    """Trains `model` epoch by epoch; its state can be saved and restored between epochs.

    Everything random in an epoch follows from the recipe's seed and the epoch's number, so no random state is saved.

    Args:
        classes: whether the data's labels count; if not, the guide alone says what is right.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data | SampleData,
        recipe: Recipe,
        guide: Guide | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        *,
        classes: bool = True,
    ) -> None:
        self.process = processes()
        self.model, self.data, self.recipe, self.guide = model, data, recipe, guide
        self.classes = classes
        self.modes = modes_in_training(model) if classes or model.training else modes_as_used(model)
        self.on_progress = on_progress if self.process.is_main_process else None
        self.memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.batch_size = min(recipe.batch_size, len(data.train))
        self.steps = data.train.steps(self.batch_size)
        self.mix = recipe.mix
        self.optimizer = recipe.make_optimizer(model)
        self.average = WeightAverage(model, recipe.ema) if recipe.ema else None
        device = self.process.device
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.mixed_precision == "fp16")
        self.parallel = model
        if self.process.num_processes > 1:
            devices = [device.index] if device.type == "cuda" else None
            self.parallel = DistributedDataParallel(model, devices, **OWN_STATISTICS)
        self.begin = time.perf_counter()
        self.steps_done = 0

    def run_epoch(self, epoch: int) -> dict[str, Any]:
        """Train for the epoch `epoch`, counted from 0, evaluate, and return its record."""
        begin, work = time.perf_counter(), time.process_time()
        loss, accuracy = self._train_epoch(epoch)
        trained = time.perf_counter()
        scores = self._evaluate(epoch)
        last = (epoch + 1) * self.steps
        self._report(epoch, self.steps, loss, accuracy, scores)
        return {
            "epoch": epoch + 1,
            "step": last,
            "lr": self.recipe.learning_rate(last - 1, self.steps),
            "train_loss": loss,
            **({"train_accuracy": accuracy} if self.classes else {}),
            **scores,
            "seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - work,
            "images_per_second": self.steps * self.batch_size / (trained - begin),
        }

    def finish(self) -> None:
        """Leave the model with the weights that were evaluated, in evaluation mode."""
        if self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
        self.model.eval()

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def _train_epoch(self, epoch: int) -> tuple[float, float]:
        """Mean loss and accuracy over the epoch's training images."""
        rank, world = self.process.process_index, self.process.num_processes
        torch.manual_seed(generator(self.recipe.seed, epoch, rank).initial_seed())
        for module, mode in self.modes:
            module.training = mode
        look_every = 1 if self.process.device.type == "cpu" else STEPS_BETWEEN_LOOKS_ON_GPU
        unseen: list[Tensor] = []
        totals = [0.0, 0.0]
        batches = self.data.train.batches(
            self.batch_size,
            shuffle_seed=self.recipe.seed,
            epoch=epoch,
            augment=self.recipe.augment,
            drop_last=True,
            rank=rank,
            world=world,
        )
        for step, (images, labels) in enumerate(batches):
            self._set_learning_rate(epoch * self.steps + step)
            unseen.append(self._step(Inputs.of(images), labels))
            self.steps_done += 1
            if (step + 1) % look_every == 0 or step + 1 == self.steps:
                totals = [a + b for a, b in zip(totals, self._look(unseen, epoch, step), strict=True)]
                unseen = []
                self._report(epoch, step + 1, totals[0] / (step + 1), totals[1] / (step + 1), {})
        return totals[0] / self.steps, totals[1] / self.steps

    def _step(self, inputs: Inputs, labels: Tensor | None) -> Tensor:
        """One update of the weights; this process's share of the batch's mean loss and accuracy, shape (2,)."""
        inputs = inputs.to(self.process.device, memory_format=self.memory_format)
        target = labels = (
            labels.to(self.process.device, non_blocking=True) if self.classes and labels is not None else None
        )
        if self.mix and labels is not None and inputs.tensor is not None:
            images, target = self.mix(inputs.tensor, labels, self.data.num_classes)
            inputs, labels = Inputs((images,)), target.argmax(1)
        with self._autocast():
            given = inputs if self.guide is None else inputs.clone()
            answer = self.parallel(*given.args, **given.kwargs)
            loss = None
            if target is not None:
                loss = F.cross_entropy(answer.float(), target, label_smoothing=self.recipe.label_smoothing)
            if self.guide is not None:
                loss = self.guide.loss(answer, inputs, loss)
        assert loss is not None
        share = len(inputs) / self.batch_size if self.process.num_processes > 1 else 1.0
        # The processes' gradients are averaged: weighted so that the mean is that over all images of the batch.
        weighted = loss if share == 1 else loss * (share * self.process.num_processes)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(weighted).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)
        accuracy = loss.new_zeros(()).float()
        if labels is not None:
            accuracy = (answer.detach().argmax(1) == labels).float().mean()
        return torch.stack([loss.detach().float(), accuracy]) * share

    def _look(self, unseen: list[Tensor], epoch: int, step: int) -> tuple[float, float]:
        """Sums of the mean losses and accuracies of the steps up to `step` that nobody has looked at."""
        values = torch.stack(unseen)
        add_up(values)
        finite = values[:, 0].isfinite().tolist()
        if not all(finite):
            first = step - len(finite) + 1 + finite.index(False)
            raise TrainingStopped(
                f"train: the loss is {values[finite.index(False), 0].item()} in epoch {epoch + 1}, step {first + 1} "
                f"of {self.steps} (lr {self.recipe.learning_rate(epoch * self.steps + first, self.steps):.3g})"
            )
        loss, accuracy = values.sum(0).tolist()
        return loss, accuracy

    def _evaluate(self, epoch: int) -> dict[str, float]:
        self._share_statistics()
        for name, value in self.model.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all():
                raise TrainingStopped(f"train: {name} is not finite after epoch {epoch + 1}")
        model = self.model if self.average is None else self.average.module
        layout = self.recipe.channels_last
        with self._autocast():
            if self.classes:
                metrics = evaluate(model, self.data.test, channels_last=layout)
                return {"test_loss": metrics.loss, "test_accuracy": metrics.accuracy}
            assert self.guide is not None
            teacher, weights = self.guide.teacher, self.guide.distillation.output_weights
            found = evaluate(model, self.data.test, teacher=teacher, output_weights=weights, channels_last=layout)
        return {"test_error": found.relative_error}

    def _share_statistics(self) -> None:
        """Average the norms' running statistics over the processes: each has seen its share of the images."""
        models = (self.model,) if self.average is None else (self.model, self.average.module)
        average(*(value for model in models for value in model.buffers() if value.is_floating_point()))

    def _set_learning_rate(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(step, self.steps)

    def _autocast(self) -> Any:
        if self.recipe.mixed_precision == "no":
            return nullcontext()
        dtype = torch.bfloat16 if self.recipe.mixed_precision == "bf16" else torch.float16
        return torch.autocast(self.process.device.type, dtype)

    def _report(self, epoch: int, step: int, loss: float, accuracy: float, scores: dict[str, float]) -> None:
        if self.on_progress is None:
            return
        seconds = time.perf_counter() - self.begin
        left = self.recipe.epochs * self.steps - (epoch * self.steps + step)
        remaining = seconds / max(1, self.steps_done) * left
        epochs, steps = self.recipe.epochs, self.steps
        known = (accuracy if self.classes else None), scores.get("test_accuracy")
        times = seconds, math.ceil(remaining)
        self.on_progress(Progress(epoch + 1, epochs, step, steps, loss, *known, *times, scores.get("test_error")))


def modes_in_training(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Every module with the mode it is trained in: the caller's; training if the model itself is in evaluation mode."""
    modes = [(module, module.training or not model.training) for module in model.modules()]
    return [(module, mode and not _frozen(module)) for module, mode in modes]


def modes_as_used(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Evaluation mode for every module: what a batch's statistics and dropout would add to the outputs is noise."""
    return [(module, False) for module in model.modules()]


def _frozen(module: nn.Module) -> bool:
    """Whether a batch norm is not to learn: its parameters take no gradient, or its statistics do not move."""
    if not isinstance(module, _BatchNorm) or module.running_mean is None:
        return False
    parameters = list(module.parameters())
    return module.momentum == 0 or (bool(parameters) and not any(p.requires_grad for p in parameters))
