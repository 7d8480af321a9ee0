"""Batch norms behind converted layers: their statistics shifted and scaled by what conversion changed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from sepconv.convert.images import CalibrationImages
from sepconv.convert.passes import Hooks, run

FEWEST, VALUES = 128, 1 << 24
"""Images that statistics are taken of: so many, and of small ones more, up to so many input values."""


class _Channels(NamedTuple):
    """Mean and variance of every channel in float64."""

    mean: Tensor
    var: Tensor


def _channels(x: Tensor) -> _Channels:
    values = x.transpose(0, 1).flatten(1).double()
    return _Channels(values.mean(1), values.var(1, correction=0))


class _Change:
    """The change of one batch norm's input from the old network to the new, averaged over batches.

    Only changes are added up: where there are none the statistics stay what they are, to the last bit.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm, self.eps = norm, norm.eps
        self.mean, self.var = (value.double() for value in _statistics(norm))
        self.before: list[_Channels] = []
        self.moves, self.logs, self.batches = torch.zeros_like(self.mean), torch.zeros_like(self.var), 0

    def note(self, _: nn.Module, x: Tensor) -> None:
        """Of a call of the old network's norm."""
        self.before.append(_channels(x))

    def correct(self, _: nn.Module, x: Tensor, output: Tensor) -> Tensor | None:
        """The output of the new network's norm with the statistics that suit this batch."""
        if not self.before:
            return None
        mean, var = self.add(self.before.pop(0), _channels(x))
        weight, bias = self.norm.weight, self.norm.bias
        return F.batch_norm(x, mean.to(output), var.to(output), weight, bias, False, 0.0, self.eps)

    def add(self, before: _Channels, after: _Channels) -> _Channels:
        """Take in one batch; returns the statistics that suit this batch.

        Where the running statistics stood relative to the old batch, the new ones stand relative to the new batch.
        """
        ratio = (after.var + self.eps) / (before.var + self.eps)
        move = after.mean - before.mean + (self.mean - before.mean) * (ratio.sqrt() - 1)
        self.moves += move
        self.logs += ratio.log()
        self.batches += 1
        return _Channels(self.mean + move, self._scaled(ratio))

    def apply(self) -> None:
        """Give the norm the statistics that suit all batches."""
        if self.batches:
            mean, var = _statistics(self.norm)
            mean.copy_(self.mean + self.moves / self.batches)
            var.copy_(self._scaled((self.logs / self.batches).exp()))

    def _scaled(self, ratio: Tensor) -> Tensor:
        return (self.var + (self.var + self.eps) * (ratio - 1)).clamp_min(0)


def reestimate(old: nn.Module, new: nn.Module, images: CalibrationImages) -> int:
    """Change running means and variances of ``new`` by as much as its activations differ from those of ``old``.

    Comparing the two networks on the same images, instead of taking the images' own statistics, keeps what the
    training set had to say: where nothing was converted, nothing changes. Each batch is normalised with its own
    corrected statistics on the way, so later layers are measured behind corrected ones.

    Returns:
        the number of batch norms that have running statistics.
    """
    changes = {
        name: _Change(module)
        for name, module in new.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    with Hooks() as hooks, torch.no_grad():
        for name, change in changes.items():
            hooks.before(old.get_submodule(name), change.note)
            hooks.after(change.norm, change.correct)
        for x in images.batches(max(FEWEST, VALUES // next(images.batches(1)).values_per_sample)):
            for change in changes.values():
                change.before.clear()
            run(old, x)
            run(new, x)
    for change in changes.values():
        change.apply()
    return len(changes)


def _statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var
