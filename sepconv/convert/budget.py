"""One depth multiplier per layer, so that the summed error is least and the summed cost stays under a limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STATES = 4000
"""Partial choices kept per layer; of more, only the best of every 1/4000 of the limit is kept."""


@dataclass(frozen=True)
class Option:
    """A depth multiplier (0: the layer stays normal) with what it costs and loses."""

    depth_multiplier: int
    cost: float
    error: float


@dataclass(frozen=True)
class _State:
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
    states = [_State(0.0, 0.0, ())]
    for options in layers:
        rest -= min(option.cost for option in options)
        grown = [
            _State(state.cost + option.cost, state.error + option.error, (*state.choice, i))
            for state in states
            for i, option in enumerate(options)
            if state.cost + option.cost + rest <= limit * (1 + 1e-12)
        ]
        states = _undominated(grown, limit)
    best = states[-1]
    return [options[i] for options, i in zip(layers, best.choice, strict=True)]


def _undominated(states: list[_State], limit: float) -> list[_State]:
    """By rising cost and falling error; thinned to the best of each cost bucket if there are too many."""
    states = sorted(states, key=lambda state: (state.cost, state.error))
    kept: list[_State] = []
    for state in states:
        if not kept or state.error < kept[-1].error:
            kept.append(state)
    if len(kept) <= STATES:
        return kept
    buckets = {int(state.cost / limit * STATES): state for state in kept}
    # The cheapest stays too: dropping it could make the rest unreachable.
    return [kept[0], *(state for state in buckets.values() if state is not kept[0])]
