"""Batch norms behind converted layers: their statistics shifted and scaled by what conversion changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from sepconv.convert.images import CalibrationImages
from sepconv.convert.passes import Hooks, run


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel in float64."""
    values = x.transpose(0, 1).flatten(1).double()
    return values.mean(1), values.var(1, correction=0)


class _Change:
    """The change of one batch norm's input from the old network to the new, averaged over batches.

    Only changes are added up: where there are none the statistics stay what they are, to the last bit.
    """

    def __init__(self, norm: Any) -> None:
        self.mean, self.var, self.eps = norm.running_mean.double(), norm.running_var.double(), norm.eps
        self.moves, self.logs, self.batches = torch.zeros_like(self.mean), torch.zeros_like(self.var), 0

    def add(self, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Take in one batch; returns the statistics that suit this batch.

        Where the running statistics stood relative to the old batch, the new ones stand relative to the new batch.
        """
        ratio = (after[1] + self.eps) / (before[1] + self.eps)
        move = after[0] - before[0] + (self.mean - before[0]) * (ratio.sqrt() - 1)
        self.moves += move
        self.logs += ratio.log()
        self.batches += 1
        return self.mean + move, self._scaled(ratio)

    def average(self) -> tuple[Tensor, Tensor]:
        return self.mean + self.moves / self.batches, self._scaled((self.logs / self.batches).exp())

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
    norms: dict[str, Any] = {
        name: module
        for name, module in new.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    changes = {name: _Change(norm) for name, norm in norms.items()}
    before: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, x: Tensor) -> None:
            before[name].append(_moments(x))

        return hook

    def correct(name: str) -> Callable[..., Tensor | None]:
        def hook(norm: Any, x: Tensor, output: Tensor) -> Tensor | None:
            if not before[name]:
                return None
            mean, var = changes[name].add(before[name].pop(0), _moments(x))
            return F.batch_norm(x, mean.to(output), var.to(output), norm.weight, norm.bias, False, 0.0, norm.eps)

        return hook

    with Hooks() as hooks, torch.no_grad():
        for name, norm in norms.items():
            hooks.before(old.get_submodule(name), note(name))
            hooks.after(norm, correct(name))
        for x in images.batches():
            before |= {name: [] for name in norms}
            run(old, x)
            run(new, x)
    for name, norm in norms.items():
        if changes[name].batches:
            mean, var = changes[name].average()
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
    return len(norms)
