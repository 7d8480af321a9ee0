"""One rank per layer, so that the summed error is least and the summed cost stays under a limit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sepconv.convert import share
from sepconv.convert.fit import Fit
from sepconv.convert.ranks.cost import METRICS
from sepconv.convert.ranks.errors import rank_errors
from sepconv.convert.sites import Site, reasons

Costs = Mapping[str, Mapping[int, float]]
"""Per site the cost of staying normal (key 0) and of every rank that is cheaper."""

STATES = 4000
"""Partial choices kept per layer; of more, only the best of every 1/4000 of the limit is kept."""


@dataclass(frozen=True)
class Option:
    """A rank (0: the layer stays normal) with what it costs and loses."""

    rank: int
    cost: float
    error: float


@dataclass(frozen=True)
class _Partial:
    cost: float
    error: float
    choice: tuple[int, ...]


def smallest(layers: Sequence[Sequence[Option]]) -> float:
    """The least cost that any choice reaches."""
    return sum(min(option.cost for option in options) for options in layers)


def choose(layers: Sequence[Sequence[Option]], limit: float) -> list[Option]:
    """The best option per layer: exact dynamic programming over the choices that no other beats in both cost and error.

    Raises:
        ValueError: no choice stays under the limit.
    """
    rest = smallest(layers)
    if rest > limit:
        raise ValueError(f"convert: the layers cost at least {rest:g}, the limit is {limit:g}")
    states = [_Partial(0.0, 0.0, ())]
    for options in layers:
        rest -= min(option.cost for option in options)
        grown = [
            _Partial(state.cost + option.cost, state.error + option.error, (*state.choice, i))
            for state in states
            for i, option in enumerate(options)
            if state.cost + option.cost + rest <= limit * (1 + 1e-12)
        ]
        states = _undominated(grown, limit)
    best = states[-1]
    return [options[i] for options, i in zip(layers, best.choice, strict=True)]


def _undominated(states: list[_Partial], limit: float) -> list[_Partial]:
    """By rising cost and falling error; thinned to the best of each cost bucket if there are too many."""
    states = sorted(states, key=lambda state: (state.cost, state.error))
    kept: list[_Partial] = []
    for state in states:
        if not kept or state.error < kept[-1].error:
            kept.append(state)
    if len(kept) <= STATES:
        return kept
    buckets = {int(state.cost / limit * STATES): state for state in kept}
    # The cheapest stays too: dropping it could make the rest unreachable.
    return [kept[0], *(state for state in buckets.values() if state is not kept[0])]


def ranks_for_budget(fit: Fit, costs: Costs, budget: float, metric: str) -> dict[str, int]:
    """The ranks of least summed error with at most ``budget`` of the whole cost; 0 stays normal.

    Raises:
        ValueError: the budget cannot be reached; the message names the smallest that can.
    """
    total = sum(cost[0] for cost in costs.values())
    least = sum(min(cost.values()) for cost in costs.values())
    if least > budget * total:
        raise ValueError(
            f"convert: budget {budget:.4g} of {METRICS[metric]} cannot be reached; the smallest reachable is "
            f"{math.ceil(least / total * 1e4) / 1e4:.4f} (1/{total / least:.2f}){_kept(fit.sites, costs, total)}"
        )
    reached = within_reach(costs, budget * total)
    errors = rank_errors(fit, {name: [rank for rank in cost if rank] for name, cost in reached.items()})
    layers = [[Option(rank, c, errors[name][rank]) for rank, c in cost.items()] for name, cost in reached.items()]
    ranks = torch.tensor([option.rank for option in choose(layers, budget * total)])
    share.agree(ranks)
    return dict(zip(costs, ranks.tolist(), strict=True))


def within_reach(costs: Costs, limit: float) -> dict[str, dict[int, float]]:
    """Without the ranks that cost so much that even the least of all other layers would be over the limit."""
    least = {name: min(cost.values()) for name, cost in costs.items()}
    left = limit * (1 + 1e-12) - sum(least.values())
    return {name: {r: c for r, c in cost.items() if c - least[name] <= left} for name, cost in costs.items()}


def _kept(sites: Sequence[Site], costs: Costs, total: float) -> str:
    """Which layers stay normal and why, as part of a message; "" where none must."""
    part = sum(costs[site.name][0] for site in sites if site.reason) / total
    return f"; {part:.0%} of it stays as it is: {reasons(sites)}" if part else ""
