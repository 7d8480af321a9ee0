"""What every rank of every layer would cost, in weights, multiply-adds or measured seconds."""

from __future__ import annotations

import copy
import statistics
from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from sepconv.compile import CompiledModel, compile
from sepconv.convert.forms import AnyForm
from sepconv.convert.sites import Site
from sepconv.system.timing import in_turn

METRICS = {"conv_params": "the convolutions' weights", "macs": "the convolutions' MACs", "latency": "the measured time"}
"""What a budget is a part of, with its name in words."""

_ROUNDS = 9


def weights(site: Site, form: AnyForm, rank: int) -> int:
    """Weights of a convolution (rank 0), or of what it becomes."""
    return form.weights(site.conv, rank) if rank else site.conv.weight.numel()


def macs(site: Site, form: AnyForm, rank: int) -> int:
    """Multiply-adds of a convolution (rank 0), or of what it becomes, for one image over all calls."""
    if rank:
        return form.macs(site.conv, rank, site.input_pixels, site.pixels)
    transposed = isinstance(site.conv, _ConvTransposeNd)
    return site.conv.weight.numel() * (site.input_pixels if transposed else site.pixels)


def _deployed(module: nn.Module, x: torch.Tensor) -> nn.Module | CompiledModel:
    """What will run: the compiled layer where ``compile`` has kernels (float32, CPU), else the layer itself."""
    layer = copy.deepcopy(module).eval().to(x)
    return compile(layer, x) if x.dtype == torch.float32 and not x.is_cuda else layer


def _median_time(modules: dict[int, nn.Module], x: torch.Tensor) -> dict[int, float]:
    """Median seconds of each module as it will run, after two calls that do not count."""

    def run(layer: Callable[[torch.Tensor], object]) -> None:
        layer(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    with torch.no_grad():
        layers = {key: _deployed(module, x) for key, module in modules.items()}
        times = in_turn({key: partial(run, layer) for key, layer in layers.items()}, _ROUNDS + 2)
    return {key: statistics.median(values[2:]) for key, values in times.items()}


def latencies(site: Site, form: AnyForm, ranks: list[int], dtype: torch.dtype | None = None) -> dict[int, float]:
    """Measured seconds for one image over all calls, for rank 0 (normal) and every rank.

    Some ranks are measured, as each is compiled for that; between them time grows evenly.

    Args:
        dtype: the precision that will run; that of the weights unless given.
    """
    tried = form.trials(ranks)
    modules: dict[int, nn.Module] = {0: site.conv, **{rank: form.empty(site.conv, rank) for rank in tried}}
    total = dict.fromkeys(modules, 0.0)
    for shape in site.inputs:
        x = torch.randn(1, *shape).to(site.conv.weight).to(dtype)
        if site.conv.weight.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)  # as within a compiled network
        for key, seconds in _median_time(modules, x).items():
            total[key] += seconds
    return {rank: total[rank] if rank in total else _between(total, tried, rank) for rank in [0, *ranks]}


def _between(known: dict[int, float], ranks: list[int], rank: int) -> float:
    after = bisect_left(ranks, rank)
    low, high = ranks[after - 1], ranks[after]
    return known[low] + (known[high] - known[low]) * (rank - low) / (high - low)


def costs(site: Site, form: AnyForm, metric: str, dtype: torch.dtype | None = None) -> dict[int, float]:
    """Cost of rank 0 (normal) and of every rank that is cheaper than that; of a site that must stay, rank 0 alone.

    Args:
        dtype: the precision that will run, where time is measured; that of the weights unless given.
    """
    cost: Callable[[Site, AnyForm, int], float] = macs if metric == "macs" else weights
    ranks = [] if site.reason else form.ranks(site.conv)
    if metric == "latency":
        fewer = [rank for rank in ranks if macs(site, form, rank) < macs(site, form, 0)]
        found = latencies(site, form, fewer, dtype) if site.outputs else {0: 0.0}
    else:
        found = {rank: float(cost(site, form, rank)) for rank in [0, *ranks]}
    return {rank: value for rank, value in found.items() if rank == 0 or value < found[0]}
