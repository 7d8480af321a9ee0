"""How far the network's output is from the original's after each step of a conversion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sepconv.convert.batch_norm import reestimate
from sepconv.convert.fit import Fit
from sepconv.convert.images import CalibrationImages
from sepconv.convert.passes import run
from sepconv.leaves.closeness import OutputComparison

JUDGED = 256
"""Images that outputs are compared on at most."""


def output_errors(
    old: nn.Module,
    networks: Sequence[nn.Module],
    images: CalibrationImages,
    weights: Mapping[str, float] | None = None,
) -> list[float | None]:
    """Squared error of each network's outputs, relative to their variance; None without any to compare."""
    found = [OutputComparison(weights, caller="convert") for _ in networks]
    with torch.no_grad():
        for x in images.batches(JUDGED):
            wanted = run(old, x)
            for network, comparison in zip(networks, found, strict=True):
                comparison.add(wanted, run(network, x), len(x))
    results = [comparison.result() for comparison in found]
    return [None if result is None else result.relative_error for result in results]


def finish(
    fit: Fit, ranks: dict[str, int], reestimate_bn: bool, weights: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Re-estimate batch norms if asked, and report the closed form with the same ranks, the method, and that."""
    if fit.images is None:
        return []
    judged = fit.held_out or fit.images
    names, networks = ["closed form"], [fit.closed_form(ranks)]
    if fit.manner.method != "svd":
        names.append(fit.manner.method.replace("_", " "))
        networks.append(fit.new)
    errors = output_errors(fit.old, networks, judged, weights)
    if reestimate_bn and reestimate(fit.old, fit.new, fit.images):
        names.append("batch norm statistics")
        errors += output_errors(fit.old, [fit.new], judged, weights)
    return [{"name": n, "output_error": e} for n, e in zip(names, errors, strict=True) if e is not None]
