"""Passes that go on where they stopped, so that layer after layer is fitted and each piece of the network runs once.

The values that the rest of a network needs are held between two layers, for each batch of images, and only the piece
between them runs. Where a network has no course (see ``course``), or does something else than it says, it runs from its
beginning for every layer.

Memory: what one batch needs, and ``HELD_BYTES`` for each network; batches that do not fit run from the beginning.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sepconv.convert.course import Course, Courses, Unfollowed
from sepconv.convert.outputs import tensors
from sepconv.convert.passes import Hooks, LayerCall, calls, run
from sepconv.convert.sites import Site
from sepconv.leaves import Inputs

HELD_BYTES = 1 << 29
"""Values of one network held between two layers."""

ROUNDING = 64
"""Units in the last place by which a network may differ from itself."""

Values = dict[int, Tensor]
Taken = TypeVar("Taken")


@dataclass
class _Progress:
    """How far a network has run on one batch, and the values that what follows needs."""

    place: int
    values: Values


class Frontier:
    """One network on its way, on every batch of images.

    Args:
        fixed: its layers stay what they are; if not, a layer is replaced after its calls were looked at, and the
            frontier waits in front of it.
    """

    def __init__(self, network: nn.Module, courses: Courses, fixed: bool) -> None:
        self._network = network
        self._courses = courses
        self._fixed = fixed
        self._held: dict[int, _Progress] = {}
        self._bytes: dict[int, int] = {}

    def calls(self, number: int, x: Inputs, site: Site) -> list[LayerCall]:
        """Input and output of every call of a site on batch ``number``, whose images are ``x``."""
        found = self._followed(x, lambda course: self._calls(course, number, x, course.calls[site.name]))
        return found or calls(self._network, self._network.get_submodule(site.name), x, site.calls)

    def outputs(self, number: int, x: Inputs, site: Site) -> list[Tensor]:
        """The floating point outputs on batch ``number``, whose images are ``x``, run from the site on."""
        found = self._followed(x, lambda course: self._outputs(course, number, x, course.calls[site.name][0]))
        return found or tensors(run(self._network, x))

    def _followed(self, x: Inputs, take: Callable[[Course], list[Taken]]) -> list[Taken]:
        """What is taken along the course of a batch; nothing if it has none."""
        course = self._courses.of(x)
        if course is None:
            return []
        try:
            with torch.no_grad():
                return take(course)
        except Unfollowed as error:
            self._courses.give_up(str(error))
            self._held.clear()
            return []

    def _calls(self, course: Course, number: int, x: Inputs, places: Sequence[int]) -> list[LayerCall]:
        first, last = places[0], places[-1]
        values = self._reach(course, number, x, first)
        if not self._fixed:
            self._hold(number, first, values)
            values = dict(values)
        seen = [self._call(course, values, first)]
        if self._fixed:
            self._hold(number, first + 1, values)
        if last > first:
            seen = [seen[0].kept()]
            values = copy.deepcopy(values)  # what runs between may change it in place
        for place in range(first + 1, last + 1):
            if place in places:
                call = self._call(course, values, place)
                seen.append(call if place == last else call.kept())
            else:
                self._step(course, values, place)
        return seen

    def _outputs(self, course: Course, number: int, x: Inputs, start: int) -> list[Tensor]:
        values = self._reach(course, number, x, start)
        self._hold(number, start, values)
        values = copy.deepcopy(values)
        for place in range(start, len(course.steps)):
            self._step(course, values, place)
        return [values[output] for output in course.outputs]

    def _reach(self, course: Course, number: int, x: Inputs, place: int) -> Values:
        """The values in front of a step."""
        progress = self._held.pop(number, None)
        self._bytes.pop(number, None)
        if progress is None or progress.place > place:
            progress = _Progress(0, dict(enumerate(x.clone().tensors)))  # the network may change its input in place
        for step in range(progress.place, place):
            self._step(course, progress.values, step)
        return progress.values

    def _hold(self, number: int, place: int, values: Values) -> None:
        """Unless the values of all batches would take too much memory."""
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in values.values()}
        size = sum(held.values())
        if sum(self._bytes.values()) + size <= HELD_BYTES:
            self._held[number], self._bytes[number] = _Progress(place, dict(values)), size

    def _step(self, course: Course, values: Values, place: int) -> None:
        course.steps[place].run(self._network, values)
        self._forget(course, values, place)

    def _call(self, course: Course, values: Values, place: int) -> LayerCall:
        call = course.steps[place].layer_call(self._network, values)
        self._forget(course, values, place)
        return call

    def _forget(self, course: Course, values: Values, place: int) -> None:
        for unused in course.unused[place]:
            values.pop(unused, None)


def follow(model: nn.Module, sites: Sequence[Site], example: Inputs) -> Courses:
    """The courses of a network past these sites, tried on an example.

    Args:
        model: in evaluation mode; left as it is.
    """
    courses = Courses(model, sites)
    if courses.of(example) and not _is_right(model, courses, sites, example):
        courses.give_up(courses.reason or "it is not the same in every pass")
    return courses


def _is_right(model: nn.Module, courses: Courses, sites: Sequence[Site], example: Inputs) -> bool:
    """Whether all sites see and give the same as in the network itself, and whether its outputs are the same."""
    real: dict[str, list[LayerCall]] = {site.name: [] for site in sites}
    with Hooks() as hooks, torch.no_grad():
        for site in sites:
            hooks.after(site.conv, _keeping(real[site.name]))
        outputs = tensors(run(model, example))
    frontier = Frontier(model, courses, fixed=True)
    if not _same(outputs, frontier.outputs(0, example, sites[0])):
        return False
    # Compared at once, as the steps behind may change in place what these gave.
    right = all(_same(_flat(real[site.name]), _flat(frontier.calls(0, example, site))) for site in sites)
    return right and not courses.reason


def _keeping(seen: list[LayerCall]) -> Callable[[nn.Module, Any, Any], None]:
    return lambda _, x, output: seen.append(LayerCall(x, output).kept())


def _flat(seen: Sequence[LayerCall]) -> list[Tensor]:
    return [tensor for call in seen for tensor in call]


def _same(wanted: Sequence[Tensor], given: Sequence[Tensor]) -> bool:
    return len(wanted) == len(given) and all(map(_near, wanted, given))


def _near(want: Tensor, have: Tensor) -> bool:
    if want.shape != have.shape or want.dtype != have.dtype:
        return False
    most = float(want.abs().nan_to_num(0, 0, 0).max()) if want.numel() else 0.0
    bound = ROUNDING * torch.finfo(want.dtype).eps
    return torch.allclose(want, have, rtol=bound, atol=bound * most, equal_nan=True)
