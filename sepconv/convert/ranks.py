"""Which depth multiplier each layer gets under one budget."""

from __future__ import annotations

import math

import torch

from sepconv.convert import share
from sepconv.convert.budget import Option, choose, smallest
from sepconv.convert.fit import Fit, naming
from sepconv.convert.graph import Site, reasons
from sepconv.convert.probe import Probe
from sepconv.convert.statistics import Moments, gather

UNITS = {"conv_params": "the convolutions' weights", "macs": "the convolutions' MACs", "latency": "the measured time"}


def ranks_for_budget(fit: Fit, costs: dict[str, dict[int, float]], budget: float, metric: str) -> dict[str, int]:
    """The depth multipliers of least summed error with at most ``budget`` of the whole cost; 0 stays normal.

    Args:
        costs: per site the cost of staying normal (key 0) and of every cheaper depth multiplier.

    Raises:
        ValueError: the budget cannot be reached; the message names the smallest that can.
    """
    total = sum(cost[0] for cost in costs.values())
    least = smallest([[Option(m, c, 0.0) for m, c in cost.items()] for cost in costs.values()])
    if least > budget * total:
        raise ValueError(
            f"convert: budget {budget:.4g} of {UNITS[metric]} cannot be reached; the smallest reachable is "
            f"{math.ceil(least / total * 1e4) / 1e4:.4f} (1/{total / least:.2f}){_kept(fit.sites, costs, total)}"
        )
    errors = rank_errors(fit, {name: [m for m in cost if m] for name, cost in costs.items()})
    layers = [[Option(m, c, errors[name][m]) for m, c in cost.items()] for name, cost in costs.items()]
    ranks = torch.tensor([option.depth_multiplier for option in choose(layers, budget * total)])
    share.agree(ranks)
    return dict(zip(costs, ranks.tolist(), strict=True))


def _kept(sites: list[Site], costs: dict[str, dict[int, float]], total: float) -> str:
    """Which layers stay normal and why, as part of a message; "" where none must."""
    share = sum(costs[site.name][0] for site in sites if site.reason) / total
    return f"; {share:.0%} of it stays as it is: {reasons(sites)}" if share else ""


def rank_errors(fit: Fit, candidates: dict[str, list[int]]) -> dict[str, dict[int, float]]:
    """Output error of the network with one site alone converted, for every site and M; for M = 0 (normal) zero.

    Without images it is the relative dropped energy; where the network's outputs show no error (class numbers, say),
    the relative error of the layer's own output.
    """
    errors = {name: {0: 0.0} for name in candidates}
    sites = [site for site in fit.sites if candidates[site.name]]
    if fit.images is None or fit.method == "svd":
        for site in sites:
            ranks, weight = candidates[site.name], site.conv.weight.detach().double()
            errors[site.name] |= dict(zip(ranks, fit.form.dropped(weight, ranks, fit.scale(site)), strict=True))
        return errors
    probe = Probe(fit.old, fit.images, fit.course)
    found = gather([site.conv for site in sites], fit.old, fit.images, one_draw=True)
    for site, moments in zip(sites, found, strict=True):
        with naming(site):
            errors[site.name] |= _tried(fit, site, moments, probe, candidates[site.name])
    return errors


def _tried(fit: Fit, site: Site, moments: Moments, probe: Probe, ranks: list[int]) -> dict[int, float]:
    """The error of each rank of one site, fitted as far as a trial is."""
    problem = fit.problem(site, moments)
    weight = site.conv.weight.detach().double()
    errors = {}
    for m in ranks:
        start = fit.form.start(weight, m, fit.scale(site))
        fitted = fit.form.compose(fit.form.fit(problem, weight, start, fit.form.trial_sweeps))
        if probe.sees_outputs:
            errors[m] = probe.error(site, fitted, moments.bias(fitted))
        else:
            errors[m] = problem.relative_error(fitted)
        fit.on_step()
    return errors
