from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sepconv.convert.ranks import budget
from sepconv.convert.ranks.budget import Option, choose, smallest, within_reach

LAYERS = st.lists(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=4), min_size=1, max_size=5
)


def options(layers: list[list[tuple[int, int]]]) -> list[list[Option]]:
    return [[Option(m, float(cost), float(error)) for m, (cost, error) in enumerate(layer)] for layer in layers]


def brute_force(layers: list[list[Option]], limit: float) -> float:
    costs = [(sum(o.cost for o in pick), sum(o.error for o in pick)) for pick in itertools.product(*layers)]
    return min(error for cost, error in costs if cost <= limit * (1 + 1e-12))


@given(LAYERS, st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_choose_equals_brute_force(raw: list[list[tuple[int, int]]], position: float) -> None:
    layers = options(raw)
    least, most = smallest(layers), sum(max(o.cost for o in layer) for layer in layers)
    limit = least + position * (most - least)
    chosen = choose(layers, limit)
    assert sum(o.cost for o in chosen) <= limit * (1 + 1e-9)
    assert all(option in layer for option, layer in zip(chosen, layers, strict=True))
    assert sum(o.error for o in chosen) == brute_force(layers, limit)


def test_choose_stays_near_the_optimum_when_choices_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [[Option(m, (9 + i % 3) * m + 0.1 * i, 100 / (m + 1) * (i + 1)) for m in range(8)] for i in range(7)]
    exact = sum(o.error for o in choose(layers, 200))
    monkeypatch.setattr(budget, "STATES", 50)
    thinned = choose(layers, 200)
    assert sum(o.cost for o in thinned) <= 200
    assert exact <= sum(o.error for o in thinned) <= 1.1 * exact


def test_choose_says_what_cannot_be_reached() -> None:
    with pytest.raises(ValueError, match=r"the layers cost at least 7, the limit is 6\.5"):
        choose([[Option(1, 3, 1), Option(0, 5, 0)], [Option(1, 4, 1)]], 6.5)


def test_ranks_that_no_choice_can_hold_are_out_of_reach() -> None:
    costs = {"a": {0: 100.0, 1: 10.0, 2: 20.0}, "b": {0: 50.0, 1: 5.0, 3: 15.0}, "c": {0: 7.0}}
    assert within_reach(costs, 32.0) == {"a": {1: 10.0, 2: 20.0}, "b": {1: 5.0, 3: 15.0}, "c": {0: 7.0}}
    assert within_reach(costs, 31.9) == {"a": {1: 10.0}, "b": {1: 5.0}, "c": {0: 7.0}}
    assert within_reach(costs, 200.0) == costs
