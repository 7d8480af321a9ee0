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
from sepconv.convert.graph import Site, norm_scale
from sepconv.convert.passes import Images, calls, in_words
from sepconv.convert.replace import replace
from sepconv.convert.sensitivity import output_metrics
from sepconv.convert.statistics import Moments, pixels_per_image

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
    holds, by site, what an error at its output costs. ``on_step`` is called after each fit, tried or kept.
    """

    old: nn.Module
    new: nn.Module
    sites: list[Site]
    images: Images | None
    form: Form
    method: str
    sweeps: int
    ridge: float
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
        for site in self.sites:
            if ranks.get(site.name):
                with naming(site):
                    errors[site.name] = self._convert(site, ranks[site.name], first=not errors)
                self.on_step()
        return errors

    def _convert(self, site: Site, rank: int, first: bool) -> Errors:
        conv: Any = self.new.get_submodule(site.name)
        weight = conv.weight.detach().double()
        start = self.form.start(weight, rank, self.scale(site))
        if self.images is None or self.method == "svd":
            share.agree(*start)
            replace(self.new, site.names, self.form.layer(conv, start))
            return Errors(relative_error(weight, self.form.compose(start), self.scale(site)))
        moments = self.moments(site, self.method == "sequential" and not first)
        problem = self.problem(site, moments)
        fitted = self.form.fit(problem, weight, start, self.sweeps)
        shift = moments.bias(self.form.compose(fitted))
        share.agree(*fitted, shift)
        replace(self.new, site.names, self.form.layer(conv, fitted, shift))
        errors = (problem.relative_error(self.form.compose(factors)) for factors in (start, fitted))
        return Errors(*errors)

    def moments(self, site: Site, asymmetric: bool) -> Moments:
        """Second moments of one site on the converted network's inputs (asymmetric) or on the original's."""
        assert self.images is not None
        conv: Any = self.new.get_submodule(site.name)
        moments = Moments(conv)
        pixels = pixels_per_image(moments, self.images.count)
        for x, generator in share.mine(self.images.batches()):
            wanted = calls(self.old, site.conv, x, site.calls)
            given = calls(self.new, conv, x, site.calls) if asymmetric else wanted
            for (inputs, outputs), (_, target) in zip(given, wanted, strict=False):
                moments.add(inputs, outputs, target if asymmetric else None, pixels, generator)
        moments.add_up()
        return moments
