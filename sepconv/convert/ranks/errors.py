"""What every rank of every layer loses."""

from __future__ import annotations

from sepconv.convert.fit import Fit, naming
from sepconv.convert.moments import Moments, gather
from sepconv.convert.ranks.probe import Probe
from sepconv.convert.sites import Site


def rank_errors(fit: Fit, candidates: dict[str, list[int]]) -> dict[str, dict[int, float]]:
    """Output error of the network with one site alone converted, for every site and rank; for rank 0 (normal) zero.

    Without images it is the relative dropped energy; where the network's outputs show no error (class numbers, say),
    the relative error of the layer's own output.
    """
    errors = {name: {0: 0.0} for name in candidates}
    sites = [site for site in fit.sites if candidates[site.name]]
    images = fit.calibration
    if images is None:
        for site in sites:
            ranks, weight = candidates[site.name], site.conv.weight.detach().double()
            errors[site.name] |= dict(zip(ranks, fit.form.dropped(weight, ranks, fit.scale(site)), strict=True))
        return errors
    probe = Probe(fit.old, images, fit.courses, fit.scales)
    found = gather([site.conv for site in sites], fit.old, images, one_draw=True)
    for site, moments in zip(sites, found, strict=True):
        with naming(site):
            errors[site.name] |= _tried(fit, site, moments, probe, candidates[site.name])
    return errors


def _tried(fit: Fit, site: Site, moments: Moments, probe: Probe, ranks: list[int]) -> dict[int, float]:
    """The error of each rank of one site, fitted as far as a trial is."""
    problem = fit.problem(site, moments)
    weight = site.conv.weight.detach().double()
    form, errors = fit.form, {}
    for rank in ranks:
        start = form.start(weight, rank, fit.scale(site))
        fitted = form.compose(form.fit(problem, weight, start, form.trial_sweeps))
        if probe.sees_outputs:
            errors[rank] = probe.error(site, fitted, moments.bias(fitted))
        else:
            errors[rank] = problem.relative_error(fitted)
        fit.on_step()
    return errors
