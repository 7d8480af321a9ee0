"""Fitting the layers of a network, one after the other in the order they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sepconv.convert import share
from sepconv.convert.course import Courses
from sepconv.convert.forms import AnyForm
from sepconv.convert.forms.form import relative_error
from sepconv.convert.frontier import Frontier
from sepconv.convert.images import CalibrationImages
from sepconv.convert.moments import Moments, gather, pixels_per_image
from sepconv.convert.passes import in_words
from sepconv.convert.problem import LeastSquares
from sepconv.convert.replace import replace
from sepconv.convert.sites import Site, norm_scale

METHODS = ("sequential", "least_squares", "svd")


@contextmanager
def naming(site: Site) -> Iterator[None]:
    """Inside, a system of equations without a solution is a ValueError that names the layer."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        layer, reason = in_words(site.name, site.conv), str(error).splitlines()[0]
        raise ValueError(f"convert: {layer} cannot be fitted ({reason}); raise ridge, or name it in skip") from error


@dataclass(frozen=True)
class Errors:
    """Relative output error of one layer after the closed form and after calibration (None: not measured)."""

    closed_form: float
    fitted: float | None = None


@dataclass(frozen=True)
class Manner:
    """How layers are fitted: to what form, by which of ``METHODS``, in how many rounds, with which ridge."""

    form: AnyForm
    method: str = "svd"
    sweeps: int = 0
    ridge: float = 0.0


@dataclass
class Fit:
    """One conversion under way.

    ``old`` and ``new`` are copies of the model; layers of ``new`` become separable as :meth:`run` goes. ``metrics``
    holds, by site, what an error at its output costs, ``scales`` how much each of the network's outputs counts,
    ``courses`` the ways through the network. ``on_step`` is called after each fit, tried or kept.
    """

    old: nn.Module
    new: nn.Module
    sites: list[Site]
    images: CalibrationImages | None
    manner: Manner
    metrics: dict[str, Tensor] = field(default_factory=dict)
    scales: list[float] = field(default_factory=list)
    on_step: Callable[[], object] = lambda: None

    def __post_init__(self) -> None:
        self.courses = Courses(self.old, [])

    @property
    def form(self) -> AnyForm:
        return self.manner.form

    @property
    def candidates(self) -> list[Site]:
        return [site for site in self.sites if not site.reason]

    @property
    def calibration(self) -> CalibrationImages | None:
        """The images if layers are fitted to any."""
        return None if self.manner.method == "svd" else self.images

    def scale(self, site: Site) -> Tensor | None:
        return norm_scale(self.old, site)

    def problem(self, site: Site, moments: Moments) -> LeastSquares:
        """What the images ask of one layer.

        Raises:
            ValueError: the layer sees or gives values that are no numbers.
        """
        problem = moments.problem(self.metrics[site.name], self.manner.ridge)
        if not all(value.isfinite().all() for value in (problem.xx, problem.yx, problem.yy, problem.metric)):
            layer = in_words(site.name, site.conv)
            raise ValueError(
                f"convert: {layer} sees or passes back values too large for float32 on the calibration images"
            )
        return problem

    def run(self, ranks: dict[str, int]) -> dict[str, Errors]:
        """Make every layer with a rank separable in ``new``."""
        sites = [site for site in self.sites if ranks.get(site.name)]
        errors: dict[str, Errors] = {}
        for site, moments in zip(sites, self._moments(sites), strict=True):
            with naming(site):
                errors[site.name] = self._convert(site, ranks[site.name], moments)
            self.on_step()
        return errors

    def _moments(self, sites: list[Site]) -> Iterator[Moments | None]:
        """What the images say about each layer, while those before it become separable; None without images."""
        if self.calibration is None:
            yield from [None] * len(sites)
        elif self.manner.method == "least_squares":
            yield from gather([site.conv for site in sites], self.old, self.calibration, one_draw=False)
        else:
            yield from self._sequential(sites, self.calibration)

    def _sequential(self, sites: list[Site], images: CalibrationImages) -> Iterator[Moments]:
        """From the second layer on, moments of the converted network's inputs and the original's outputs."""
        wanted = Frontier(self.old, self.courses, fixed=True)
        given = Frontier(self.new, self.courses, fixed=False)
        for site in sites:
            first = site is sites[0]
            moments = Moments(site.conv)
            pixels = pixels_per_image(moments, images.count)
            for number, (x, generator) in enumerate(share.mine(images.batches())):
                targets = wanted.calls(number, x, site)
                calls = targets if first else given.calls(number, x, site)
                for call, target in zip(calls, targets, strict=False):
                    moments.add(*call, None if first else target.output, pixels, generator)
            moments.add_up()
            yield moments

    def _convert(self, site: Site, rank: int, moments: Moments | None) -> Errors:
        conv = self.new.get_submodule(site.name)
        assert isinstance(conv, _ConvNd)
        weight = conv.weight.detach().double()
        start = self.form.start(weight, rank, self.scale(site))
        if moments is None:
            share.agree(*start)
            replace(self.new, site.names, self.form.layer(conv, start))
            return Errors(relative_error(weight, self.form.compose(start), self.scale(site)))
        problem = self.problem(site, moments)
        fitted = self.form.fit(problem, weight, start, self.manner.sweeps)
        shift = moments.bias(self.form.compose(fitted))
        share.agree(*fitted, shift)
        replace(self.new, site.names, self.form.layer(conv, fitted, shift))
        return Errors(*(problem.relative_error(self.form.compose(factors)) for factors in (start, fitted)))
