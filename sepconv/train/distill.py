"""Learning from a trained network: its outputs (Hinton et al. 2015) and its features (Romero et al. 2015)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.layers.borrowed import evaluating
from sepconv.leaves import Inputs
from sepconv.train.matching import OutputMatch


@dataclass(frozen=True)
class Distillation:
    """What the student learns from the teacher.

    With classes, loss = alpha * T^2 * KL(teacher / T, student / T) + (1 - alpha) * cross-entropy
    + feature_weight * mean over the pairs of (squared error of the features / the teacher's variance).

    Without, the first two terms give way to the weighted mean over the outputs of (squared error / the teacher's
    variance), for outputs of any structure.

    Args:
        temperature: T, above 0; higher shows more of what the teacher thinks of the wrong classes.
        alpha: weight of the teacher, from 0 to 1. With 1 no label is used.
        features: pairs (module of the student, module of the teacher) by name, whose outputs have equal shapes; or
            "auto": the last module of each image size that has the same name and output shape in both.
        feature_weight: weight of the features' part.
        output_weights: how much each floating point output counts, by its place in what the teacher returns, such as
            "boxes" or "heads.0"; 1 where it is not named. Without classes alone.

    References: arXiv:1503.02531 (outputs), arXiv:1412.6550 (features).
    """

    temperature: float = 4.0
    alpha: float = 0.9
    features: Sequence[tuple[str, str]] | str = ()
    feature_weight: float = 1.0
    output_weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"Distillation: temperature must be above 0 but is {self.temperature}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"Distillation: alpha must be from 0 to 1 but is {self.alpha}")
        if not 0 <= self.feature_weight < float("inf"):
            raise ValueError(f"Distillation: feature_weight must be at least 0 but is {self.feature_weight}")
        if isinstance(self.features, str):
            if self.features != "auto":
                raise ValueError(f'Distillation: features must be pairs or "auto" but is {self.features!r}')
        else:
            pairs = tuple((str(student), str(teacher)) for student, teacher in self.features)
            object.__setattr__(self, "features", pairs)


class Guide:
    """A teacher at work: gives the loss of a batch. A context manager, within which the modules are watched.

    Networks may change their input in place, so each gets one of its own.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, distillation: Distillation, example: Inputs, classes: bool
    ) -> None:
        self.teacher = teacher
        self.distillation = distillation
        if distillation.features == "auto":
            self.pairs = matching_features(student, teacher, example)
        else:
            self.pairs = tuple(distillation.features)  # type: ignore[arg-type]
        self.student_features: dict[str, Tensor] = {}
        self.teacher_features: dict[str, Tensor] = {}
        with ExitStack() as stack:
            _watch(student, [name for name, _ in self.pairs], self.student_features, "student", stack)
            _watch(teacher, [name for _, name in self.pairs], self.teacher_features, "teacher", stack)
            stack.enter_context(evaluating(teacher))
            with torch.no_grad(), evaluating(student):
                answer, target = example.run(student), example.run(teacher)
            self.match = None if classes else OutputMatch(target, answer, distillation.output_weights)
            if classes and answer.shape != target.shape:
                mine, theirs = tuple(answer.shape), tuple(target.shape)
                raise ValueError(f"train: the student's output has shape {mine}, the teacher's {theirs}")
            self.variances = self._variances()
            self.cleanup = stack.pop_all()

    def __enter__(self) -> Guide:
        return self

    def __exit__(self, *error: object) -> None:
        self.cleanup.close()

    def loss(self, answer: Any, inputs: Inputs, label_loss: Tensor | None) -> Tensor:
        """The loss of a batch, after the student has seen `inputs` and given this answer."""
        with torch.no_grad():
            target = inputs.run(self.teacher)
        settings = self.distillation
        if self.match is not None:
            total = self.match(answer, target)
        else:
            total = settings.alpha * softened_divergence(answer, target.float(), settings.temperature)
            if label_loss is not None and settings.alpha < 1:
                total = total + (1 - settings.alpha) * label_loss
        for (student, teacher), variance in zip(self.pairs, self.variances, strict=True):
            error = F.mse_loss(self.student_features[student].float(), self.teacher_features[teacher].float())
            total = total + settings.feature_weight / len(self.pairs) * error / variance
        return total

    def _variances(self) -> list[Tensor]:
        """Of each teacher feature over the examples, fixed for the whole training; checks the shapes."""
        for name, teacher_name in self.pairs:
            mine, theirs = self.student_features[name], self.teacher_features[teacher_name]
            if mine.shape != theirs.shape:
                raise ValueError(
                    f"train: features of {name} have shape {tuple(mine.shape)} in the student, "
                    f"those of {teacher_name} {tuple(theirs.shape)} in the teacher"
                )
        return [self.teacher_features[name].float().var().clamp(min=1e-8) for _, name in self.pairs]


def softened_divergence(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax(target / T) || softmax(logits / T)), mean over the batch: (N, K), (N, K) -> ()."""
    ours = F.log_softmax(logits.float() / temperature, dim=1)
    theirs = F.log_softmax(target / temperature, dim=1)
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


@torch.no_grad()
def matching_features(student: nn.Module, teacher: nn.Module, example: Inputs) -> tuple[tuple[str, str], ...]:
    """For each image size the last module that runs once and has equal name and output shape in both networks."""
    mine, theirs = _output_shapes(student, example), _output_shapes(teacher, example)
    last = {shape[2:]: name for name, shape in theirs.items() if mine.get(name) == shape}
    if not last:
        raise ValueError("train: no module has the same name and output shape in student and teacher: name pairs")
    return tuple((name, name) for name in last.values())


def _output_shapes(model: nn.Module, example: Inputs) -> dict[str, torch.Size]:
    """The output shape of each module, in the order they finish, that makes one image-like tensor in one call."""
    found: dict[str, list[torch.Size]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            shape = output.shape if isinstance(output, Tensor) else torch.Size()
            found.setdefault(name, []).append(shape)

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        with evaluating(model):
            example.run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: shapes[0] for name, shapes in found.items() if len(shapes) == 1 and len(shapes[0]) > 2}


def _watch(model: nn.Module, names: Iterable[str], store: dict[str, Tensor], role: str, stack: ExitStack) -> None:
    """Keep the output of the named modules in `store` whenever they run, until `stack` is closed."""
    modules = dict(model.named_modules())

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            store[name] = output

        return hook

    for name in names:
        if name not in modules:
            raise ValueError(f"train: the {role} has no module called {name!r}")
        stack.callback(modules[name].register_forward_hook(keep(name)).remove)
