"""How far the network's output is from the original's after each step of a conversion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sepconv.convert.batch_norm import reestimate
from sepconv.convert.fit import Fit
from sepconv.convert.images import CalibrationImages
from sepconv.convert.outputs import OutputError, tensors
from sepconv.convert.passes import run

JUDGED = 256
"""Images that outputs are compared on at most."""


def output_errors(old: nn.Module, networks: Sequence[nn.Module], images: CalibrationImages) -> list[float | None]:
    """Squared error of each network's outputs, relative to their variance; None without any to compare."""
    found = [OutputError() for _ in networks]
    with torch.no_grad():
        for x in images.batches(JUDGED):
            wanted = tensors(run(old, x))
            for network, error in zip(networks, found, strict=True):
                error.add(wanted, tensors(run(network, x)))
    return [error.relative() if error.sums else None for error in found]


def finish(fit: Fit, ranks: dict[str, int], reestimate_bn: bool) -> list[dict[str, Any]]:
    """Re-estimate batch norms if asked, and report the closed form with the same ranks, the method, and that."""
    if fit.images is None:
        return []
    judged = fit.held_out or fit.images
    names, networks = ["closed form"], [fit.closed_form(ranks)]
    if fit.manner.method != "svd":
        names.append(fit.manner.method.replace("_", " "))
        networks.append(fit.new)
    errors = output_errors(fit.old, networks, judged)
    if reestimate_bn and reestimate(fit.old, fit.new, fit.images):
        names.append("batch norm statistics")
        errors += output_errors(fit.old, [fit.new], judged)
    return [{"name": n, "output_error": e} for n, e in zip(names, errors, strict=True) if e is not None]
