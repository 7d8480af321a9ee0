"""How far the network's output is from the original's after each step of a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sepconv.convert.batch_norm import reestimate
from sepconv.convert.fit import Fit, Manner
from sepconv.convert.images import CalibrationImages
from sepconv.convert.passes import run
from sepconv.layers.borrowed import copied
from sepconv.leaves.closeness import OutputComparison


def output_error(
    old: nn.Module, new: nn.Module, images: CalibrationImages, weights: Mapping[str, float] | None = None
) -> float | None:
    """Squared error of the outputs, relative to their variance over the images; None without any to compare."""
    found = OutputComparison(weights, caller="convert")
    with torch.no_grad():
        for x in images.batches():
            found.add(run(old, x), run(new, x), len(x))
    result = found.result()
    return None if result is None else result.relative_error


def finish(
    fit: Fit, ranks: dict[str, int], reestimate_bn: bool, weights: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Re-estimate batch norms if asked, and report the closed form with the same ranks, the method, and that."""
    if fit.images is None:
        return []
    closed_form = Fit(fit.old, copied(fit.old, "convert"), fit.sites, None, Manner(fit.form))
    closed_form.run(ranks)
    stages = [("closed form", output_error(fit.old, closed_form.new, fit.images, weights))]
    if fit.manner.method != "svd":
        stages.append((fit.manner.method.replace("_", " "), output_error(fit.old, fit.new, fit.images, weights)))
    if reestimate_bn and reestimate(fit.old, fit.new, fit.images):
        stages.append(("batch norm statistics", output_error(fit.old, fit.new, fit.images, weights)))
    return [{"name": name, "output_error": error} for name, error in stages if error is not None]
