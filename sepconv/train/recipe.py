"""How a network is trained: every choice as one value, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop

from sepconv.data import Augment, Data
from sepconv.layers import DepthwiseConv1d, DepthwiseConv2d, DepthwiseConv3d
from sepconv.train.mix import Mix

CHOICES = {
    "optimizer": ("sgd", "adamw", "rmsprop"),
    "schedule": ("cosine", "one_cycle", "constant"),
    "mixed_precision": ("no", "bf16", "fp16"),
    "kernels": ("sepconv", "torch"),
}
MOST_EPOCHS = 99_999  # checkpoints are named by five digits, so that their names are in order
ONE_CYCLE_RISE = 0.3
DEPTHWISE = (DepthwiseConv1d, DepthwiseConv2d, DepthwiseConv3d)


@dataclass(frozen=True)
class Recipe:
    """Optimizer, schedule, regularisation and augmentation of one training run.

    Args:
        epochs: passes over the training split.
        batch_size: images a step, of all processes together.
        optimizer: "sgd" (with Nesterov momentum), "adamw" or "rmsprop" (the MobileNet paper's).
        lr: the highest learning rate of the schedule.
        momentum: of sgd and rmsprop.
        weight_decay: not applied to depthwise filters, biases and norms.
        schedule: "one_cycle" (linear up, linear down to 0; Smith, arXiv:1708.07120), "cosine" or "constant".
        warmup_epochs: epochs of linear rise; None is 30 % of the training for one_cycle and none for the others.
        label_smoothing: share of the target that is spread evenly over the classes.
        flip, crop_padding, cutout: see `sepconv.data.Augment`.
        mixup, cutmix: see `sepconv.train.Mix`; of several processes each mixes its own share of a batch.
        mixed_precision: "no", "bf16" or "fp16" (not on CPUs).
        channels_last: store images and filters with the channels innermost, which is faster on CPUs.
        ema: decay of the running average of the weights, which is then what is evaluated and returned; 0 for none.
        whiten: start the first layer as the whitened principal patterns of the training images.
        seed: of order, augmentation and dropout. The weights are the caller's.
        kernels: "sepconv" trains with our layers in place (see `sepconv.replace_layers`) where norms or activations
            stand between convolutions, "torch" with the network's own; a run may go on with the other.

    Example:
        >>> Recipe(epochs=2, lr=0.2).learning_rate(step=4, steps_per_epoch=10)
        0.166...
    """

    epochs: int = 10
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "one_cycle"
    warmup_epochs: float | None = None
    label_smoothing: float = 0.0
    flip: bool = False
    crop_padding: int = 0
    cutout: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixed_precision: str = "no"
    channels_last: bool = True
    ema: float = 0.0
    whiten: bool = False
    seed: int = 0
    kernels: str = "sepconv"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"Recipe: {name} must be one of {', '.join(choices)} but is {getattr(self, name)!r}")
        for name in ("epochs", "batch_size", "crop_padding", "cutout", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"Recipe: {name} must be an int but is {value!r}")
            object.__setattr__(self, name, int(value))
        self._check("epochs", 1 <= self.epochs <= MOST_EPOCHS, f"at least 1 and at most {MOST_EPOCHS}")
        self._check("batch_size", self.batch_size >= 1, "at least 1")
        self._check("lr", 0 < self.lr < math.inf, "above 0 and finite")
        self._check("momentum", 0 <= self.momentum < 1, "from 0 to below 1")
        self._check("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0 and finite")
        self._check("label_smoothing", 0 <= self.label_smoothing < 1, "from 0 to below 1")
        self._check("crop_padding", self.crop_padding >= 0, "at least 0")
        self._check("cutout", self.cutout >= 0, "at least 0")
        self._check("mixup", 0 <= self.mixup < math.inf, "at least 0 and finite")
        self._check("cutmix", 0 <= self.cutmix < math.inf, "at least 0 and finite")
        self._check("ema", 0 <= self.ema < 1, "from 0 to below 1")
        fits = self.warmup_epochs is None or 0 <= self.warmup_epochs <= self.epochs
        self._check("warmup_epochs", fits, f"from 0 to {self.epochs} epochs")

    def _check(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"Recipe: {name} must be {rule} but is {getattr(self, name)}")

    @property
    def augment(self) -> Augment:
        return Augment(self.flip, self.crop_padding, self.cutout)

    @property
    def mix(self) -> Mix:
        return Mix(self.mixup, self.cutmix)

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of step `step`, counted from the first of the training."""
        total = self.epochs * steps_per_epoch
        default = ONE_CYCLE_RISE * self.epochs if self.schedule == "one_cycle" else 0
        warmup = steps_per_epoch * (default if self.warmup_epochs is None else self.warmup_epochs)
        if step + 1 < warmup:
            return self.lr * (step + 1) / warmup
        if self.schedule == "constant" or step + 1 <= warmup:
            return self.lr
        done = (step - warmup) / max(1, total - warmup)
        return self.lr * (1 - done if self.schedule == "one_cycle" else (1 + math.cos(math.pi * done)) / 2)

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """The optimizer of `model`, its parameters in two groups: with and without weight decay."""
        decayed, free = split_parameters(model)
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": free, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if self.optimizer == "adamw":
            return AdamW(groups, lr=self.lr)
        if self.optimizer == "rmsprop":
            return RMSprop(groups, lr=self.lr, momentum=self.momentum, alpha=0.9)
        return SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0)

    def check_device(self, device: torch.device) -> None:
        """ValueError where the device does not have the wanted precision."""
        if self.mixed_precision == "fp16" and device.type == "cpu":
            raise ValueError("train: mixed_precision fp16 needs a GPU; on this CPU use bf16 or no")
        if self.mixed_precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise ValueError("train: this GPU has no bf16; use mixed_precision fp16 or no")


def default_recipe(data: Data) -> Recipe:
    """A recipe to begin with: for small grey images such as digits, or for photographs, which may be mirrored."""
    if data.channels == 1:
        return Recipe(epochs=12, batch_size=64, lr=0.1, label_smoothing=0.1, crop_padding=1)
    padding = max(1, data.image_size // 8)
    return Recipe(epochs=10, batch_size=128, lr=0.2, label_smoothing=0.1, flip=True, crop_padding=padding)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters (with, without) weight decay; each once, in the model's order.

    Without: biases, norms and depthwise filters, which have so few weights that decay only hurts
    (Howard et al. 2017, arXiv:1704.04861, section 3.2).
    """
    filters = {id(p) for m in model.modules() if is_depthwise(m) for p in m.parameters(recurse=False)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    free = [p for p in trainable if p.ndim <= 1 or id(p) in filters]
    kept = {id(p) for p in free}
    return [p for p in trainable if id(p) not in kept], free


def is_depthwise(module: nn.Module) -> bool:
    """Whether each filter of `module` sees a single input channel of several."""
    if isinstance(module, DEPTHWISE):
        return True
    groups, channels = getattr(module, "groups", 1), getattr(module, "in_channels", 0)
    return isinstance(groups, int) and groups == channels > 1
