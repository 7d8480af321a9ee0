from __future__ import annotations

import pytest

from sepconv.convert.forms import FORMS
from sepconv.convert.forms.curve import interpolated, spread


def test_spread_has_both_ends_and_equal_ratios() -> None:
    assert spread([1, 2, 4, 8, 16, 32, 64], 4) == [1, 4, 16, 64]
    assert spread([10, 11, 12, 200], 3) == [10, 12, 200]
    assert spread([3, 5], 4) == [3, 5]
    assert spread([], 4) == []


def test_a_power_law_is_found_again() -> None:
    ranks = [3, 5, 8, 13, 21, 34]
    law = {rank: 7 * rank**-2.5 for rank in ranks}
    assert interpolated({rank: law[rank] for rank in (3, 13, 34)}, ranks) == pytest.approx(law)
    assert interpolated({3: 0.0, 34: 0.0}, ranks)[8] == pytest.approx(0)


def test_no_curve_leads_to_an_exact_rank() -> None:
    ranks = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 25]
    trials = FORMS["separable"].trials(ranks)
    assert trials[0] == 1
    assert trials[-2:] == [14, 25]
    assert FORMS["separable"].trials([]) == []
    assert FORMS["bottleneck"].trials(ranks) == [1, 5, 25]
