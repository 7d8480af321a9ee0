"""Fitting the layers of a network, one after the other in the order they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sepconv.convert import share
from sepconv.convert.course import Courses
from sepconv.convert.forms import AnyForm
from sepconv.convert.forms.form import relative_error
from sepconv.convert.frontier import Frontier
from sepconv.convert.images import CalibrationImages
from sepconv.convert.moments import Moments, pixels_per_image
from sepconv.convert.passes import in_words
from sepconv.convert.problem import LeastSquares
from sepconv.convert.replace import replace
from sepconv.convert.sites import Site, norm_scale
from sepconv.convert.unseen import Unseen
from sepconv.convert.work import Work
from sepconv.layers.borrowed import copied
from sepconv.leaves import Inputs

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

    ``old`` and ``new`` are copies of the model; layers of ``new`` become separable as :meth:`run` goes. Layers are
    fitted to ``images``, and errors measured on ``held_out`` (None: on the same). ``metrics`` holds, by site, what an
    error at its output costs, ``differentiable`` whether that is known from the outputs' gradients, ``scales`` how much
    each of the network's outputs counts, ``courses`` the ways through the network, ``starts`` what the weights alone
    gave. ``work`` is told of each fit, tried or kept.
    """

    old: nn.Module
    new: nn.Module
    sites: list[Site]
    images: CalibrationImages | None
    manner: Manner
    held_out: CalibrationImages | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)
    scales: list[float] = field(default_factory=list)
    differentiable: bool = True
    starts: dict[str, Any] = field(default_factory=dict)
    work: Work = field(default_factory=lambda: Work([], {}, lambda done, parts: None))

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
        if not all(value.sum().isfinite() for value in (problem.xx, problem.yx, problem.yy, problem.metric)):
            layer = in_words(site.name, site.conv)
            raise ValueError(
                f"convert: {layer} sees or passes back values too large for float32 on the calibration images"
            )
        return problem

    def run(self, ranks: dict[str, int]) -> dict[str, Errors]:
        """Make every layer with a rank separable in ``new``."""
        sites = [site for site in self.sites if ranks.get(site.name)]
        errors: dict[str, Errors] = {}
        for site, seen in zip(sites, self._seen(sites), strict=True):
            with naming(site):
                errors[site.name] = self._convert(site, ranks[site.name], seen)
            self.work.fitted(site)
        return errors

    def closed_form(self, ranks: dict[str, int]) -> nn.Module:
        """The network that the weights alone give, once :meth:`run` has found its layers."""
        network: nn.Module = copied(self.old, "convert", sharing=True)
        for site in self.sites:
            if ranks.get(site.name):
                replace(network, site.names, self.form.layer(site.conv, self.starts[site.name]))
        return network

    def _seen(self, sites: list[Site]) -> Iterator[_Seen | None]:
        """What the images say about each layer, while those before it become separable; None without images.

        By the sequential method moments are from the second layer on those of the converted network's inputs and the
        original's outputs.
        """
        if self.calibration is None:
            yield from [None] * len(sites)
            return
        wanted = Frontier(self.old, self.courses, fixed=True)
        given = Frontier(self.new, self.courses, fixed=False)
        for site in sites:
            first = site is sites[0] or self.manner.method == "least_squares"
            seen = _Seen(Moments(site.conv), Unseen(site.conv, self.held_out.count) if self.held_out else None)
            pixels = pixels_per_image(seen.moments, self.calibration.count)
            for number, x, generator in self._batches():
                targets = wanted.calls(number, x, site)
                calls = targets if first else given.calls(number, x, site)
                for call, target in zip(calls, targets, strict=False):
                    wanted_output = None if first else target.output
                    if number >= 0:
                        seen.moments.add(*call, wanted_output, pixels, generator)
                    elif seen.unseen:
                        seen.unseen.add(*call, wanted_output, generator)
            seen.moments.add_up()
            yield seen

    def _batches(self) -> Iterator[tuple[int, Inputs, torch.Generator]]:
        """Those to fit to, numbered from 0 on, and those held out, from -1 downwards."""
        assert self.calibration is not None
        for number, (x, generator) in enumerate(share.mine(self.calibration.batches())):
            yield number, x, generator
        if self.held_out:
            for number, x in enumerate(self.held_out.batches()):
                yield -1 - number, x, torch.Generator().manual_seed(number)

    def _convert(self, site: Site, rank: int, seen: _Seen | None) -> Errors:
        conv = self.new.get_submodule(site.name)
        assert isinstance(conv, _ConvNd)
        weight = conv.weight.detach()
        start = self.starts[site.name] = self.form.start(weight, rank, self.scale(site))
        if seen is None:
            share.agree(*start)
            replace(self.new, site.names, self.form.layer(conv, start))
            return Errors(relative_error(weight, self.form.compose(start), self.scale(site)))
        problem = self.problem(site, seen.moments)
        fitted = self.form.fit(problem, weight, start, self.manner.sweeps)
        shift = seen.moments.bias(self.form.compose(fitted))
        share.agree(*fitted, shift)
        replace(self.new, site.names, self.form.layer(conv, fitted, shift))
        return Errors(*(seen.relative_error(problem, self.form.compose(factors)) for factors in (start, fitted)))


@dataclass(frozen=True)
class _Seen:
    """What the images say about one layer: those to fit to, and those held out from that, if there are any."""

    moments: Moments
    unseen: Unseen | None

    def relative_error(self, problem: LeastSquares, weight: Tensor) -> float:
        """Of a layer of that weight, with the bias that is best for it."""
        if self.unseen is None:
            return problem.relative_error(weight)
        return self.unseen.relative_error(weight, self.moments.bias(weight), problem.metric)
