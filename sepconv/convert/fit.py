"""Fitting the separable layers, one after the other in the order they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sepconv.convert import share
from sepconv.convert.calibrate import Problem
from sepconv.convert.forms import Form, relative_error
from sepconv.convert.frontier import Course, Frontier
from sepconv.convert.graph import Site, norm_scale
from sepconv.convert.passes import Images, in_words
from sepconv.convert.replace import replace
from sepconv.convert.sensitivity import output_metrics
from sepconv.convert.statistics import Moments, gather, pixels_per_image

SENSITIVITY_IMAGES = 256
"""Images whose gradients say how much each output channel matters."""

METHODS = ("sequential", "least_squares", "svd")


@contextmanager
def naming(site: Site) -> Iterator[None]:
    """Inside, a system of equations without a solution is a ValueError that names the layer."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        layer, reason = in_words(site.name, site.conv), str(error).splitlines()[0]
        raise ValueError(f"convert: {layer} cannot be fitted ({reason}); raise ridge, or name it in skip") from error


@dataclass
class Errors:
    """Relative output error of one layer after the closed form and after calibration (None: not measured)."""

    closed_form: float
    fitted: float | None = None


@dataclass
class Fit:
    """One conversion under way.

    ``old`` and ``new`` are copies of the model; layers of ``new`` become separable as :meth:`run` goes. ``metrics``
    holds, by site, what an error at its output costs; without a ``course`` the networks run from their beginning for
    each layer. ``on_step`` is called after each fit, tried or kept.
    """

    old: nn.Module
    new: nn.Module
    sites: list[Site]
    images: Images | None
    form: Form
    method: str
    sweeps: int
    ridge: float
    course: Course | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)
    on_step: Callable[[], object] = lambda: None

    @property
    def candidates(self) -> list[Site]:
        return [site for site in self.sites if not site.reason]

    def measure_sensitivity(self) -> list[str]:
        """Fill in ``metrics``. Returns notes for the plan."""
        assert self.images is not None
        found = output_metrics(self.old, self.candidates, self.images.batches(SENSITIVITY_IMAGES))
        if all(site.name in found for site in self.candidates):
            self.metrics = found
            return []
        for site in self.candidates:
            scale = self.scale(site)
            weight = site.conv.weight.detach().double()
            ones = weight.new_ones(weight.shape[0])
            self.metrics[site.name] = torch.diag(ones if scale is None else scale.square())
        return ["the model's outputs are not differentiable: errors are weighed by batch norms, not by outputs"]

    def scale(self, site: Site) -> Tensor | None:
        return norm_scale(self.old, site)

    def problem(self, site: Site, moments: Moments) -> Problem:
        """What the images ask of one layer.

        Raises:
            ValueError: the layer sees or gives values that are no numbers.
        """
        problem = moments.problem(self.metrics[site.name], self.ridge)
        if not all(value.isfinite().all() for value in (problem.xx, problem.yx, problem.yy, problem.metric)):
            layer = in_words(site.name, site.conv)
            raise ValueError(
                f"convert: {layer} sees or passes back values too large for float32 on the calibration images"
            )
        return problem

    def run(self, ranks: dict[str, int]) -> dict[str, Errors]:
        """Make every layer with a rank separable in ``new``."""
        errors: dict[str, Errors] = {}
        sites = [site for site in self.sites if ranks.get(site.name)]
        for site, moments in zip(sites, self._moments(sites), strict=True):
            with naming(site):
                errors[site.name] = self._convert(site, ranks[site.name], moments)
            self.on_step()
        return errors

    def _moments(self, sites: list[Site]) -> Iterator[Moments | None]:
        """What the images say about each layer, while those before it become separable; None without images."""
        if self.images is None or self.method == "svd":
            yield from [None] * len(sites)
        elif self.method == "least_squares":
            yield from gather([site.conv for site in sites], self.old, self.images, one_draw=False)
        else:
            yield from self._sequential(sites)

    def _sequential(self, sites: list[Site]) -> Iterator[Moments]:
        """From the second layer on, moments of the converted network's inputs and the original's outputs."""
        assert self.images is not None
        wanted = Frontier(self.old, self.course, fixed=True)
        given = Frontier(self.new, self.course, fixed=False)
        for site in sites:
            moments = Moments(site.conv)
            pixels = pixels_per_image(moments, self.images.count)
            for number, (x, generator) in enumerate(share.mine(self.images.batches())):
                targets = wanted.calls(number, x, site)
                calls = targets if site is sites[0] else given.calls(number, x, site)
                for call, target in zip(calls, targets, strict=False):
                    moments.add(*call, None if site is sites[0] else target.output, pixels, generator)
            moments.add_up()
            yield moments

    def _convert(self, site: Site, rank: int, moments: Moments | None) -> Errors:
        conv: Any = self.new.get_submodule(site.name)
        weight = conv.weight.detach().double()
        start = self.form.start(weight, rank, self.scale(site))
        if moments is None:
            share.agree(*start)
            replace(self.new, site.names, self.form.layer(conv, start))
            return Errors(relative_error(weight, self.form.compose(start), self.scale(site)))
        problem = self.problem(site, moments)
        fitted = self.form.fit(problem, weight, start, self.sweeps)
        shift = moments.bias(self.form.compose(fitted))
        share.agree(*fitted, shift)
        replace(self.new, site.names, self.form.layer(conv, fitted, shift))
        errors = (problem.relative_error(self.form.compose(factors)) for factors in (start, fitted))
        return Errors(*errors)
