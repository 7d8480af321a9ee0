"""How far the network's output is from the original's after each step of a conversion."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sepconv.convert.batch_norm import reestimate
from sepconv.convert.fit import Fit
from sepconv.convert.passes import Images
from sepconv.convert.sensitivity import tensors


def output_error(old: nn.Module, new: nn.Module, images: Images) -> float:
    """Squared error of the outputs, relative to their variance over the images."""
    error, squares, count = 0.0, 0.0, 0
    sums: list[Tensor] = []
    with torch.no_grad():
        for x in images.batches():
            wanted = [t.double().flatten(1) for t in tensors(old(x))]
            given = [t.double().flatten(1) for t in tensors(new(x))]
            error += sum(float((w - g).square().sum()) for w, g in zip(wanted, given, strict=True))
            squares += sum(float(w.square().sum()) for w in wanted)
            sums = [s + w.sum(0) for s, w in zip(sums or [torch.zeros_like(w[0]) for w in wanted], wanted, strict=True)]
            count += len(x)
    variance = squares - sum(float(s.square().sum()) for s in sums) / count
    return error / max(variance, 1e-300)


def finish(fit: Fit, ranks: dict[str, int], reestimate_bn: bool) -> list[dict[str, Any]]:
    """Re-estimate batch norms if asked, and report the closed form with the same ranks, the method, and that."""
    if fit.images is None:
        return []
    closed_form = Fit(fit.old, copy.deepcopy(fit.old), fit.sites, None, fit.form, "svd", 0, 0.0)
    closed_form.run(ranks)
    stages = [("closed form", output_error(fit.old, closed_form.new, fit.images))]
    if fit.method != "svd":
        stages.append((fit.method.replace("_", " "), output_error(fit.old, fit.new, fit.images)))
    if reestimate_bn and reestimate(fit.old, fit.new, fit.images):
        stages.append(("batch norm statistics", output_error(fit.old, fit.new, fit.images)))
    return [{"name": name, "output_error": error} for name, error in stages]
