"""Learning from a trained network: its outputs (Hinton et al. 2015) and its features (Romero et al. 2015)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.layers.borrowed import evaluating


@dataclass(frozen=True)
class Distillation:
    """What the student learns from the teacher.

    Loss = alpha * T^2 * KL(teacher / T, student / T) + (1 - alpha) * cross-entropy
    + feature_weight * mean over the pairs of (squared error of the features / the teacher's variance).

    Args:
        temperature: T, above 0; higher shows more of what the teacher thinks of the wrong classes.
        alpha: weight of the teacher, from 0 to 1. With 1 no label is used.
        features: pairs (module of the student, module of the teacher) by name, whose outputs have equal shapes; or
            "auto": the last module of each image size that has the same name and output shape in both.
        feature_weight: weight of the features' part.

    References: arXiv:1503.02531 (outputs), arXiv:1412.6550 (features).
    """

    temperature: float = 4.0
    alpha: float = 0.9
    features: Sequence[tuple[str, str]] | str = ()
    feature_weight: float = 1.0

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

    Networks may change their input in place, so each gets images of its own.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, distillation: Distillation, example: Tensor) -> None:
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
            self.variances = self._variances(student, example)
            self.cleanup = stack.pop_all()

    def __enter__(self) -> Guide:
        return self

    def __exit__(self, *error: object) -> None:
        self.cleanup.close()

    def loss(self, logits: Tensor, images: Tensor, label_loss: Tensor) -> Tensor:
        """The loss of a batch, after the student has seen `images` and answered with `logits`."""
        with torch.no_grad():
            target = self.teacher(images.clone()).float()
        settings = self.distillation
        total = settings.alpha * softened_divergence(logits, target, settings.temperature)
        if settings.alpha < 1:
            total = total + (1 - settings.alpha) * label_loss
        for (student, teacher), variance in zip(self.pairs, self.variances, strict=True):
            error = F.mse_loss(self.student_features[student].float(), self.teacher_features[teacher].float())
            total = total + settings.feature_weight / len(self.pairs) * error / variance
        return total

    @torch.no_grad()
    def _variances(self, student: nn.Module, example: Tensor) -> list[Tensor]:
        """Of each teacher feature over the example images, fixed for the whole training; checks the shapes."""
        with evaluating(student):
            answer, target = student(example.clone()), self.teacher(example.clone())
        if answer.shape != target.shape:
            raise ValueError(
                f"train: the student's output has shape {tuple(answer.shape)}, the teacher's {tuple(target.shape)}"
            )
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
def matching_features(student: nn.Module, teacher: nn.Module, example: Tensor) -> tuple[tuple[str, str], ...]:
    """For each image size the last module that runs once and has equal name and output shape in both networks."""
    mine, theirs = _output_shapes(student, example), _output_shapes(teacher, example)
    last = {shape[2:]: name for name, shape in theirs.items() if mine.get(name) == shape}
    if not last:
        raise ValueError("train: no module has the same name and output shape in student and teacher: name pairs")
    return tuple((name, name) for name in last.values())


def _output_shapes(model: nn.Module, example: Tensor) -> dict[str, torch.Size]:
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
            model(example.clone())
    finally:
        for hook in hooks:
            hook.remove()
    return {name: shapes[0] for name, shapes in found.items() if len(shapes) == 1 and len(shapes[0]) == 4}


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
