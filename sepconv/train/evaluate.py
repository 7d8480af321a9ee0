"""How good a network is: by the classes that it names, or by how close its outputs are to another's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.data import LoaderSplit, Samples
from sepconv.data.samples import as_samples
from sepconv.layers.borrowed import evaluating
from sepconv.leaves import Closeness, Inputs, leaves
from sepconv.leaves.closeness import OutputComparison
from sepconv.leaves.outputs import said
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


@overload
def evaluate(
    model: nn.Module,
    split: Samples | Iterable[Any],
    *,
    teacher: None = None,
    batch_size: int = 256,
    channels_last: bool = True,
) -> Metrics: ...


@overload
def evaluate(
    model: nn.Module,
    split: Samples | Iterable[Any],
    *,
    teacher: nn.Module,
    output_weights: Mapping[str, float] | None = None,
    data_range: float | None = None,
    batch_size: int = 256,
    channels_last: bool = True,
) -> Closeness: ...


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Samples | Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    output_weights: Mapping[str, float] | None = None,
    data_range: float | None = None,
    batch_size: int = 256,
    channels_last: bool = True,
) -> Metrics | Closeness:
    """Run `model` in evaluation mode over `split`. In a run of several processes each of them has to call this.

    Args:
        split: of a data set, or batches, such as a ``DataLoader``: see :meth:`sepconv.leaves.Inputs.of`.
        teacher: compare all outputs with those of this network, whatever their structure, and look at no labels.
        output_weights: how much each output counts in that, by name; 1 where it is not named.
        data_range: of images that the networks give, such as 255, for their PSNR. Outputs (N, 1 or 3, H, W) from 0 to 1
            are taken for images without it.
        batch_size: of a split; batches that are given are taken as they are.

    Raises:
        ValueError: the split is empty, it has no labels and there is no teacher, a label has no output, or the networks
            have no outputs to compare, or such that are not finite.
    """
    samples = as_samples(split)
    if not len(samples):
        raise ValueError("evaluate: the split has no images")
    if teacher is not None:
        comparison = OutputComparison(output_weights, data_range)
        return _compared(model, teacher, samples.batches(batch_size), comparison, channels_last)
    return _counted(model, samples, batch_size, channels_last)


def _compared(
    model: nn.Module, teacher: nn.Module, batches: Iterable[Any], comparison: OutputComparison, channels_last: bool
) -> Closeness:
    with evaluating(model, teacher):
        for batch, _ in batches:
            inputs = Inputs.of(batch)
            wanted, given = (placed(inputs, network, channels_last).run(network) for network in (teacher, model))
            for whose, output in (("teacher", wanted), ("model", given)):
                _check_finite(output, whose)
            comparison.add(wanted, given, len(inputs))
    found = comparison.result()
    if found is None:
        raise ValueError("evaluate: the networks have no floating point outputs to compare")
    return found


def _check_finite(output: Any, whose: str) -> None:
    for name, leaf in leaves(output).items():
        if not leaf.isfinite().all():
            raise ValueError(f"evaluate: {said(name)} of the {whose} holds NaN or infinity")


def placed(inputs: Inputs, model: nn.Module, channels_last: bool) -> Inputs:
    """Inputs where the model is, of its precision."""
    tensor = next(model.parameters(), None)
    device, dtype = (torch.device("cpu"), None) if tensor is None else (tensor.device, tensor.dtype)
    fractions = dtype if dtype is not None and dtype.is_floating_point else None
    return inputs.to(device, fractions, torch.channels_last if channels_last else torch.contiguous_format)


def _counted(model: nn.Module, split: Samples, batch_size: int, channels_last: bool) -> Metrics:
    state = processes()
    # Fewer images than processes: each counts all of them, and so it does with batches that are not ours to divide.
    shared = len(split) >= state.num_processes > 1 and not isinstance(split, LoaderSplit)
    rank, world = (state.process_index, state.num_processes) if shared else (0, 1)
    with evaluating(model):
        batches = split.batches(max(batch_size, world), rank=rank, world=world)
        parts = [_count(model, Inputs.of(images), labels, channels_last) for images, labels in batches if len(images)]
    confusion = torch.stack([counts for counts, _ in parts]).sum(0)
    loss = torch.stack([loss for _, loss in parts]).sum()
    if shared:
        sums = confusion.to(state.device), loss.to(state.device)
        add_up(*sums)
        confusion, loss = (value.cpu() for value in sums)
    images = int(confusion.sum())
    return Metrics(confusion.trace().item() / images, loss.item() / images, confusion)


def _count(model: nn.Module, inputs: Inputs, labels: Tensor | None, channels_last: bool) -> tuple[Tensor, Tensor]:
    """Confusion matrix and summed loss of one batch, on the CPU."""
    if labels is None:
        raise ValueError("evaluate: the data has no classes: name a teacher, with whose outputs to compare")
    answer = placed(inputs, model, channels_last).run(model)
    check_outputs(answer, int(labels.max()) + 1)
    logits, labels = answer.float().cpu(), labels.cpu()
    classes = logits.shape[1]
    counts = torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2)
    return counts.view(classes, classes), F.cross_entropy(logits, labels, reduction="sum")


def check_outputs(logits: Any, classes: int) -> None:
    """ValueError unless the model gives one row of at least `classes` numbers an image."""
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model's output is {type(logits).__name__} but the data has {classes} classes")
    if logits.ndim != 2 or logits.shape[1] < classes:
        shape = tuple(logits.shape)
        raise ValueError(f"the model's output has shape {shape} but the data has {classes} classes")
