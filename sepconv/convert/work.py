"""How long the steps of a conversion take beside one another: what progress and the time that remains are told from.

Measured on a ResNet-18: a trial of a rank takes time with the square of a patch's size, for its decomposition and its
products with the second moments; a fit that is kept twice that, and a pass over the images that is as long for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sepconv.convert.sites import Site

PARTS = 1000
"""In so many parts of about equal time a conversion is told."""


def trial(site: Site) -> float:
    """Work of fitting one rank as far as a choice needs it."""
    return float(site.conv.weight[0].numel() ** 2)


@dataclass
class Work:
    """The work of a conversion that is done, and all of it.

    Attributes:
        trials: how many ranks of each site are tried.
        told: is called with the parts that are done and :data:`PARTS`.
    """

    sites: Sequence[Site]
    trials: dict[str, int]
    told: Callable[[int, int], None]
    done: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        squares = [trial(site) for site in self.sites]
        self._pass = sum(squares) / max(1, len(squares))
        self._tried = sum(self.trials.get(site.name, 0) * trial(site) for site in self.sites)
        self._all = self._tried + sum(map(self._fit, self.sites)) or 1.0

    def _fit(self, site: Site) -> float:
        return 2 * trial(site) + self._pass

    def tried(self, site: Site) -> None:
        self._add(trial(site))

    def fitted(self, site: Site) -> None:
        # Choices end before fits begin, also where there was less to try than was thought.
        self.done = max(self.done, self._tried)
        self._add(self._fit(site))

    def _add(self, work: float) -> None:
        self.done += work
        self.told(min(PARTS, round(PARTS * self.done / self._all)), PARTS)
