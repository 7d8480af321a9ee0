"""One contender of ``sepconv bench training``: a network, an optimizer, and a step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.bench.trained import TrainingCase, in_pytorch
from sepconv.layers import replace_layers
from sepconv.system.timing import seconds

PARTS = ("forward", "backward", "optimizer")


@dataclass
class Trainee:
    """A network with its optimizer that takes one step after the other on the same images."""

    model: nn.Module
    images: Tensor
    precision: str
    parts: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    loss: Tensor | None = None

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9)
        self.labels = torch.arange(len(self.images)) % 10

    def forward(self) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
            scores = self.model(self.images)
        self.loss = F.cross_entropy(scores if scores.dtype is torch.float64 else scores.float(), self.labels)

    def backward(self) -> None:
        assert self.loss is not None
        self.loss.backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> float:
        """Seconds that it took."""
        taken = [seconds(part) for part in (self.forward, self.backward, self.update)]
        for name, value in zip(PARTS, taken, strict=True):
            self.parts[name].append(value)
        return sum(taken)

    def gradients(self) -> Tensor:
        """Loss and gradients of all parameters as they are now, side by side, without a step."""
        self.forward()
        self.backward()
        assert self.loss is not None
        found = [self.loss.detach(), *(p.grad for p in self.model.parameters() if p.grad is not None)]
        self.optimizer.zero_grad()
        return torch.cat([t.flatten().double() for t in found])


def trainee(case: TrainingCase, contender: str, precision: str, better: str = "torch-nhwc") -> Trainee:
    """A contender with the case's network; ``better``: the layout that ``torch.compile`` gets."""
    model, images = case.model(), case.images()
    if contender == "sepconv":
        replace_layers(model)
        return Trainee(model, images, precision)
    model = in_pytorch(model)
    layout = better if contender == "torch.compile" else contender
    if layout == "torch-nchw":
        model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        images = images.contiguous()
    if contender == "torch.compile":
        model = torch.compile(model)  # type: ignore[assignment]
    return Trainee(model, images, precision)
