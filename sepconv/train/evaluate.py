"""Accuracy, loss and confusion matrix, each image counted once however many processes there are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.data import Split
from sepconv.layers.borrowed import evaluating
from sepconv.system.processes import add_up
from sepconv.train.processes import processes


@dataclass(frozen=True)
class Metrics:
    """Results over a whole split.

    Args:
        accuracy: share of images whose largest output is the right class, from 0 to 1.
        loss: mean cross-entropy.
        confusion: int64 (K, K); row = true class, column = answer.
    """

    accuracy: float
    loss: float
    confusion: Tensor


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, *, batch_size: int = 256, channels_last: bool = True) -> Metrics:
    """Run `model` in evaluation mode over `split`. In a run of several processes each of them has to call this.

    Raises:
        ValueError: the split is empty, or a label has no output.
    """
    if not len(split):
        raise ValueError("evaluate: the split has no images")
    state = processes()
    # Fewer images than processes: each counts all of them.
    shared = len(split) >= state.num_processes > 1
    rank, world = (state.process_index, state.num_processes) if shared else (0, 1)
    with evaluating(model):
        batches = split.batches(max(batch_size, world), rank=rank, world=world)
        parts = [_count(model, images, labels, channels_last) for images, labels in batches if len(images)]
    confusion = torch.stack([counts for counts, _ in parts]).sum(0)
    loss = torch.stack([loss for _, loss in parts]).sum()
    if shared:
        sums = confusion.to(state.device), loss.to(state.device)
        add_up(*sums)
        confusion, loss = (value.cpu() for value in sums)
    return Metrics(confusion.trace().item() / len(split), loss.item() / len(split), confusion)


def _count(model: nn.Module, images: Tensor, labels: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]:
    """Confusion matrix and summed loss of one batch, on the CPU."""
    tensor = next(iter(model.state_dict().values()), images)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    logits = model(images.to(tensor.device, memory_format=memory_format)).float().cpu()
    check_outputs(logits, int(labels.max()) + 1)
    classes = logits.shape[1]
    counts = torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2)
    return counts.view(classes, classes), F.cross_entropy(logits, labels, reduction="sum")


def check_outputs(logits: Tensor, classes: int) -> None:
    """ValueError unless the model gives one row of at least `classes` numbers an image."""
    if logits.ndim != 2 or logits.shape[1] < classes:
        shape = tuple(logits.shape)
        raise ValueError(f"the model's output has shape {shape} but the data has {classes} classes")
