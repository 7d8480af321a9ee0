"""How much each output channel of a layer matters to the network's output.

An error e at a layer moves the outputs by J e, so E[e^T J^T J e] is what it costs. J^T J is estimated without labels:
for random signs v the gradient g = J^T v of v . outputs has E[g g^T] = J^T J. Errors of different layers measured in
this metric add up in one unit (squared output change per image), which is what ranks under one budget are compared
by; batch norms, activations and everything else behind the layer are accounted for by construction.

The Kronecker form, E[g g^T] apart from E[p p^T], is that of K-FAC (Martens and Grosse 2015, arXiv:1503.05671).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sepconv.convert.outputs import tensors
from sepconv.convert.passes import Hooks, run
from sepconv.convert.sites import Site, norm_scale
from sepconv.leaves import Inputs

VALUES = 1 << 19
"""Input values in one pass backward."""

FEWEST, MOST = 64, 256
"""Images whose gradients say how much each output channel matters: the fewer, the larger they are."""

FLOOR = 1e-2
"""Part of the mean sensitivity that every direction gets, so that none is free because few images were seen."""


def enough(size: int) -> int:
    """Images of so many values to take gradients of: large ones have more pixels in every layer."""
    return min(MOST, max(FEWEST, 2 * VALUES // max(1, size)))


def output_metrics(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Inputs],
    draws: int = 2,
    scales: Sequence[float] = (),
) -> dict[str, Tensor]:
    """J^T J of every site, by site name, summed over its pixels: (O, O) each.

    ``scales`` are those of the squared errors of the outputs; 1 where there are none.
    ``model`` must be in eval mode with frozen parameters. A site that the gradient does not reach is missing.
    """
    sums: dict[str, Tensor] = {}
    images = 0

    def watch(site: Site) -> Callable[..., Tensor]:
        def add(gradient: Tensor | None) -> None:
            if gradient is None:  # what follows gives none, such as a quantized layer
                return
            g = gradient.transpose(0, 1).flatten(1)
            sums[site.name] = sums.get(site.name, 0) + (g @ g.T).double()

        def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():  # the model's own code says so
                return output
            if not output.requires_grad:
                output = output.detach().requires_grad_().clone()
            output.register_hook(add)
            return output

        return hook

    generator = torch.Generator().manual_seed(0)
    with Hooks() as hooks, torch.enable_grad():
        for site in sites:
            hooks.after(site.conv, watch(site))
        for x in small(batches):
            images += len(x)
            scaled = differentiable(tensors(run(model, x)), scales)
            outputs = [output.values for output in scaled]
            for draw in range(draws if outputs else 0):
                torch.autograd.backward(outputs, signs(scaled, generator), retain_graph=draw + 1 < draws)
    return {name: _floored(total / (images * draws)) for name, total in sums.items()}


class Scaled(NamedTuple):
    """An output of the network, and by what its squared errors are multiplied."""

    values: Tensor
    scale: float


def differentiable(outputs: Sequence[Tensor], scales: Sequence[float]) -> list[Scaled]:
    """Those that a gradient comes from."""
    every = map(Scaled, outputs, scales or [1.0] * len(outputs))
    return [output for output in every if output.values.requires_grad]


def signs(outputs: Sequence[Scaled], generator: torch.Generator) -> list[Tensor]:
    """Random ones, times the root of each output's scale."""
    drawn = [torch.randint(0, 2, t.shape, generator=generator).to(t) for t, _ in outputs]
    return [(t * 2 - 1) * scale**0.5 for t, (_, scale) in zip(drawn, outputs, strict=True)]


def small(batches: Iterable[Inputs]) -> Iterator[Inputs]:
    """The same samples in batches that leave room for what a pass backward needs."""
    for x in batches:
        size = max(1, VALUES // x.values_per_sample) if x.divisible else max(1, len(x))
        for start in range(0, len(x), size):
            yield x[start : start + size]


def _floored(metric: Tensor) -> Tensor:
    # Where nothing that the layer does reaches the output, all its channels matter alike.
    level = float(metric.diagonal().mean()) or 1.0
    return metric + FLOOR * level * torch.eye(len(metric), dtype=metric.dtype, device=metric.device)


def norm_metric(model: nn.Module, site: Site) -> Tensor:
    """What takes the place of J^T J where there is no gradient: the batch norm's scale, which errors go through."""
    scale = norm_scale(model, site)
    weight = site.conv.weight.detach().double()
    return torch.diag(weight.new_ones(len(weight)) if scale is None else scale.square())
