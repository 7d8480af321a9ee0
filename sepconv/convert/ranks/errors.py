"""What every rank of every layer loses: a few are fitted, the others lie on a curve between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sepconv.convert.fit import Fit, naming
from sepconv.convert.forms.curve import interpolated
from sepconv.convert.images import CalibrationImages
from sepconv.convert.moments import Moments, gather
from sepconv.convert.ranks.first_order import Changes, draws, output_errors
from sepconv.convert.ranks.probe import Probe
from sepconv.convert.ranks.sensitivity import enough
from sepconv.convert.sites import Site

ENOUGH_TO_DIVIDE = 128
"""Images from which on errors are not looked at on those that the trials are fitted to."""

PART = 4
"""Of so many images one is for looking at errors."""

RUN = 1
"""Which of the ranks that are tried, from the least on, the network is run with: gradients know small errors alone."""

SAMPLES = 4
"""Patches per value of a patch for a trial, a quarter of what a fit that is kept gets."""


def rank_errors(fit: Fit, candidates: dict[str, list[int]]) -> dict[str, dict[int, float]]:
    """Output error of the network with one site alone converted, for every site and rank; for rank 0 (normal) zero.

    Without images it is the relative dropped energy; where the network's outputs show no error (class numbers, say),
    the relative error of the layer's own output.
    """
    errors = {name: {0: 0.0} for name in candidates}
    sites = [site for site in fit.sites if candidates[site.name]]
    if fit.calibration is None:
        for site in sites:
            ranks, weight = candidates[site.name], site.conv.weight.detach()
            tried = fit.form.trials(ranks)
            found = dict(zip(tried, fit.form.dropped(weight, tried, fit.scale(site)), strict=True))
            errors[site.name] |= interpolated(found, ranks)
        return errors
    for site, found in zip(sites, _tried(fit, sites, candidates, fit.calibration), strict=True):
        errors[site.name] |= interpolated(found, candidates[site.name])
    return errors


def _tried(
    fit: Fit, sites: Sequence[Site], candidates: dict[str, list[int]], images: CalibrationImages
) -> list[dict[int, float]]:
    """The errors of some ranks of each site."""
    fitted, judged = images.divided(PART) if images.count >= ENOUGH_TO_DIVIDE else (images, images)
    if not judged.count or not fitted.count:  # batches that cannot be divided
        fitted = judged = images
    probe = Probe(fit.old, judged, fit.courses, fit.scales)
    tried: list[_Trials] = []
    for site, moments in zip(sites, gather([s.conv for s in sites], fit.old, fitted, SAMPLES), strict=True):
        with naming(site):
            tried.append(_try(fit, site, moments, fit.form.trials(candidates[site.name]), alone=not probe.sees_outputs))
    if not probe.sees_outputs:
        return [dict(zip(trials.ranks, trials.own_errors, strict=True)) for trials in tried]
    if fit.differentiable:
        count = min(judged.count, enough(next(judged.batches(1)).values_per_sample))
        changes = [trials.changes for trials in tried]
        output_errors(fit.old, changes, judged.batches(count), draws(count), fit.scales)
    return [_run(probe, site, trials) for site, trials in zip(sites, tried, strict=True)]


def _run(probe: Probe, site: Site, trials: _Trials) -> dict[int, float]:
    """One rank as it is, and the others as the gradients compare them with it; all as they are without gradients."""
    changes, known = trials.changes, trials.changes.errors.tolist()

    def real(place: int) -> float:
        change = changes.weights[place].view_as(site.conv.weight)
        return probe.error(site, site.conv.weight.detach() + change, changes.shifts[place])

    place = min(RUN, len(known) - 1)
    if not known[place]:
        return {rank: real(i) for i, rank in enumerate(trials.ranks)}
    ratio = real(place) / known[place]
    return {rank: ratio * error for rank, error in zip(trials.ranks, known, strict=True)}


@dataclass(frozen=True)
class _Trials:
    """Some ranks of one site, fitted as far as a trial is, and where it is asked for the error of its own output."""

    ranks: list[int]
    own_errors: list[float]
    changes: Changes


def _try(fit: Fit, site: Site, moments: Moments, ranks: list[int], alone: bool) -> _Trials:
    problem = fit.problem(site, moments)
    weight = site.conv.weight.detach()
    weights, shifts, errors = [], [], []
    for rank in ranks:
        start = fit.form.start(weight, rank, fit.scale(site), brief=True)
        fitted = fit.form.compose(fit.form.fit(problem, weight, start, fit.form.trial_sweeps))
        weights.append((fitted.flatten() - weight.flatten()).to(weight))
        shifts.append(moments.bias(fitted).to(weight))
        errors += [problem.relative_error(fitted)] if alone else []
        fit.work.tried(site)
    return _Trials(ranks, errors, Changes(site.conv, torch.stack(weights), torch.stack(shifts)))
