"""A layer as a list of stages, each a convolution with the norm and the activation behind it.

A list is made of the modules when it is needed and never kept, so it holds what was put into the layer last.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from sepconv.activations import name_of


class Stage(NamedTuple):
    """``activation(norm(conv(x)))``; None stands for what is not there."""

    conv: Any
    norm: Any = None
    activation: nn.Module | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """By the modules themselves, so that hooks and subclasses have their say."""
        conv, norm, activation = self
        x = conv(x) if norm is None else norm(conv(x))
        return x if activation is None else activation(x)


def in_sequence(modules: nn.Sequential) -> list[Stage] | None:
    """The stages that nested ``nn.Sequential`` amount to; None where they are no such stages."""
    stages: list[Stage] = []
    conv = norm = activation = None
    for module in _flat(modules):
        if isinstance(module, _ConvNd):
            if conv is not None:
                stages.append(Stage(conv, norm, activation))
            conv, norm, activation = module, None, None
        elif conv is None or activation is not None:
            return None
        elif norm is None and isinstance(module, _BatchNorm):
            norm = module
        elif name_of(module) is None:
            return None
        else:
            activation = module
    return None if conv is None else [*stages, Stage(conv, norm, activation)]


def _flat(modules: nn.Sequential) -> Iterator[nn.Module]:
    """Every call of a module, in order: one that stands there twice is called twice."""
    for module in modules._modules.values():
        if type(module) is nn.Sequential:
            yield from _flat(module)
        else:
            yield module


def nested(modules: nn.Sequential) -> list[nn.Sequential]:
    """The ``nn.Sequential`` that :func:`in_sequence` looks into."""
    inner = [module for module in modules._modules.values() if type(module) is nn.Sequential]
    return [modules, *[found for module in inner for found in nested(module)]]
