"""What every depth multiplier of every layer would cost, in weights, multiply-adds or measured seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from sepconv.convert.factor import full_rank
from sepconv.convert.graph import Site
from sepconv.convert.replace import empty_separable

METRICS = ("conv_params", "macs", "latency")
_ROUNDS = 9


def candidates(site: Site) -> list[int]:
    """Depth multipliers worth a look: 1 to 9, then in steps of an eighth, and full rank."""
    most = full_rank(site.conv.weight)
    found = list(range(1, min(most, 9) + 1))
    while found[-1] < most:
        found.append(min(most, found[-1] + found[-1] // 8))
    return found


def weights(site: Site, depth_multiplier: int) -> int:
    """Weights of a convolution (M = 0), or of its separable form."""
    outputs, channels = site.conv.out_channels, site.conv.in_channels
    if not depth_multiplier:
        return site.conv.weight.numel()
    return depth_multiplier * channels * (site.conv.weight[0, 0].numel() + outputs)


def macs(site: Site, depth_multiplier: int) -> int:
    """Multiply-adds for one image over all calls; both halves of a separable layer work at output resolution."""
    if isinstance(site.conv, _ConvTransposeNd):
        return site.conv.weight.numel() * site.input_pixels
    return weights(site, depth_multiplier) * site.pixels


def _median_time(modules: dict[int, nn.Module], x: torch.Tensor) -> dict[int, float]:
    """Median seconds of each module, the modules taking turns so that a disturbance meets all of them."""
    times: dict[int, list[float]] = {key: [] for key in modules}
    with torch.no_grad():
        for turn in range(_ROUNDS + 2):
            for key, module in modules.items():
                start = time.perf_counter()
                module(x)
                if x.is_cuda:
                    torch.cuda.synchronize(x.device)
                if turn >= 2:
                    times[key].append(time.perf_counter() - start)
    return {key: statistics.median(values) for key, values in times.items()}


def latencies(site: Site, multipliers: list[int]) -> dict[int, float]:
    """Measured seconds for one image over all calls, for M = 0 (normal) and every multiplier."""
    bias = site.conv.bias is not None
    modules: dict[int, nn.Module] = {0: site.conv}
    modules |= {m: empty_separable(site.conv, m, bias) for m in multipliers}
    total = dict.fromkeys(modules, 0.0)
    for shape in site.inputs:
        x = torch.randn(1, *shape).to(site.conv.weight)
        if site.conv.weight.dim() == 4 and site.conv.weight.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        for key, seconds in _median_time(modules, x).items():
            total[key] += seconds
    return total


def costs(site: Site, metric: str) -> dict[int, float]:
    """Cost of M = 0 (normal) and of every M that is cheaper than that; of a site that must stay, M = 0 alone."""
    cost: Callable[[Site, int], float] = macs if metric == "macs" else weights
    multipliers = [] if site.reason else candidates(site)
    if metric == "latency":
        fewer = [m for m in multipliers if macs(site, m) < macs(site, 0)]
        found = latencies(site, fewer) if site.outputs else {0: 0.0}
    else:
        found = {m: float(cost(site, m)) for m in [0, *multipliers]}
    return {m: value for m, value in found.items() if m == 0 or value < found[0]}
