"""A trained normal network in, a separable one out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sepconv.convert.accept import (
    check_kind,
    check_outputs,
    check_values,
    leave_those_read,
    narrow,
    own_copy,
    undisturbed,
    widen,
)
from sepconv.convert.fit import METHODS, Errors, Fit, Manner
from sepconv.convert.forms import FORMS, AnyForm
from sepconv.convert.frontier import follow
from sepconv.convert.images import CalibrationImages
from sepconv.convert.moments import LARGEST
from sepconv.convert.outputs import output_scales
from sepconv.convert.plan import LayerPlan, Plan
from sepconv.convert.ranks.budget import Costs, ranks_for_budget, within_reach
from sepconv.convert.ranks.cost import METRICS, costs, macs, weights
from sepconv.convert.ranks.sensitivity import enough, norm_metric, output_metrics
from sepconv.convert.sites import Site, Skip, find_sites, reasons, record, trace_norms
from sepconv.convert.stages import finish
from sepconv.convert.work import Work
from sepconv.layers.borrowed import evaluating
from sepconv.leaves import Inputs

HELD_OUT_OF, MOST_HELD_OUT = 16, 64
"""One image of so many is not fitted to: the errors that the plan tells are of these. And that many at most."""

ENOUGH_TO_HOLD_OUT = 64
"""Of fewer images all are fitted to."""


def convert(
    model: nn.Module,
    calibration: Tensor | Inputs | Iterable[Any] | None = None,
    budget: float = 1 / 8,
    *,
    metric: str = "conv_params",
    form: str = "bottleneck",
    method: str = "sequential",
    depth_multiplier: int | None = None,
    skip: Skip = (),
    example_input: Any = None,
    output_weights: Mapping[str, float] | None = None,
    reestimate_bn: bool = True,
    sweeps: int = 10,
    ridge: float = 1e-3,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[nn.Module, Plan]:
    """Turn the normal convolutions of a trained network into depthwise separable ones.

    No labels and no training: ranks and weights come from closed forms on the weights and on unlabelled images. The
    model itself is left as it is. Fine-tune or distil the result for what a small budget loses.

    Args:
        model: any module, with inputs and outputs of any structure; its ``nn.Conv1d/2d/3d`` layers with groups=1 and
            more than one tap are candidates. Of what ``torch.compile`` returned, the module inside is converted;
            bfloat16 and float16 are float32 meanwhile.
        calibration: unlabelled data as the model takes it, some hundreds to thousands of samples: a float tensor
            (N, C, *), or batches (an iterable, a ``DataLoader``). A batch is a tensor, a tuple of inputs and targets of
            which the first counts, or a dict or dataclass of the model's arguments without "labels" and "targets";
            several positional arguments are ``((left, right),)``. None only with ``method="svd"``.
        budget: part of the whole network's cost in ``metric`` that may remain, over 0 and at most 1.
        metric: "conv_params" (weights of all convolutions), "macs" (their multiply-adds) or "latency" (their measured
            time for one image on this machine, as ``compile`` runs them).
        form: "bottleneck" makes three layers of a convolution: a pointwise one that reduces the channels, a depthwise
            and a pointwise one; "separable" makes the last two. No norm or activation stands between them.
        method: "sequential" regresses each layer's original output on the converted network's input, "least_squares"
            on the original network's, "svd" uses the weights alone.
        depth_multiplier: one M for every candidate layer instead of a budget; a bottleneck has at most as many weights.
        skip: names of modules that stay as they are (with all they contain), or ``skip(name, module) -> bool``.
        example_input: a batch of one or more samples, a tuple of positional or a dict of keyword arguments; needed
            where there is no calibration but the metric needs shapes.
        output_weights: how much each floating point output counts, by its place in what the model returns, such as
            "boxes" or "heads.0"; 1 where it is not named. The error of each is relative to its own variance.
        reestimate_bn: give batch norms behind converted layers the statistics of the converted network.
        sweeps: rounds of alternating least squares per layer; fewer for bottlenecks of many channels.
        ridge: how strongly directions that the images hardly show are held to the original weights.
        on_progress: is told after each fit of a layer how much of the work is done and how much there is, in parts of
            about equal time; a layer that stays normal after all leaves some undone.

    Returns:
        The converted copy and the :class:`Plan` that says what was done to each layer and why.

    Raises:
        ValueError: an argument is out of range, the model cannot be run, changed or copied (the message names the
            layer), the budget cannot be reached (what can, and what stays and why), or no convolution can be converted.
    """
    _check_arguments(calibration, budget, metric, form, method, depth_multiplier, example_input)
    _check_numbers(sweeps, ridge)
    old, new, halves = _copies(model)
    images = None if calibration is None else CalibrationImages.of(old, calibration)
    example = _example(old, example_input) if images is None else next(images.batches(2))
    manner = Manner(FORMS[form], method, sweeps, ridge)
    with undisturbed(old), evaluating(old, new):
        sites, notes = _sites(old, skip, example, halves)
        fit = _fit(old, new, sites, images, manner)
        priced = _prices(fit, metric, example, halves)
        _require_some(model, sites, priced, fixed=depth_multiplier is not None)
        if on_progress is not None:
            tried = {} if depth_multiplier else within_reach(priced, budget * sum(cost[0] for cost in priced.values()))
            fit.work = _work(fit, tried, on_progress)
        notes += _prepare(fit, example, output_weights)
        ranks = (
            {site.name: manner.form.of_multiplier(site.conv, depth_multiplier) for site in fit.candidates}
            if depth_multiplier
            else ranks_for_budget(fit, priced, budget, metric)
        )
        errors = fit.run(ranks)
        stages = finish(fit, ranks, reestimate_bn, output_weights)
    if fit.courses.reason:
        notes.append(f"slower: the model ran from its beginning for each layer; not followed: {fit.courses.reason}")
    _finish_layers(old, new, sites, halves)
    rows = [_row(site, manner.form, ranks.get(site.name, 0), errors.get(site.name)) for site in sites]
    share = None if depth_multiplier else budget
    counts = [part.count if part else 0 for part in (images, fit.held_out)]
    return new, Plan(rows, form, method, metric, share, counts[0], stages, notes, counts[1])


def closed_form(model: nn.Module, plan: Plan, example_input: Any = None) -> nn.Module:
    """The conversion of `plan` as the weights alone give it: the same ranks, no images. What calibration improves on.

    Args:
        model: the one that the plan was made for; it is left as it was.
        example_input: a batch of one or more images, with which batch norms are found in any model.
    """
    old, new, halves = _copies(model)
    with undisturbed(old), evaluating(old, new):
        sites, _ = _sites(old, (), _example(old, example_input), halves)
        Fit(old, new, sites, None, Manner(FORMS[plan.form])).run({row.name: row.rank for row in plan.converted})
    _finish_layers(old, new, sites, halves)
    return new


class _Copies(NamedTuple):
    """Of a model: one that stays, one whose layers are replaced, and the types of what was half precision."""

    old: nn.Module
    new: nn.Module
    halves: dict[str, torch.dtype]


def _copies(model: nn.Module) -> _Copies:
    check_kind(model)
    with undisturbed(model):
        old = own_copy(model)
        check_values(old)
        halves = widen(old)
        new = copy.deepcopy(old)
        old.requires_grad_(False)
    return _Copies(old, new, halves)


def _fit(old: nn.Module, new: nn.Module, sites: list[Site], images: CalibrationImages | None, manner: Manner) -> Fit:
    """With some of the images held out, if there are enough and any are fitted to."""
    if images is None or manner.method == "svd" or images.count < ENOUGH_TO_HOLD_OUT:
        return Fit(old, new, sites, images, manner)
    fitted, held_out = images.divided(max(HELD_OUT_OF, math.ceil(images.count / MOST_HELD_OUT)))
    if not held_out.count:  # batches that cannot be divided
        return Fit(old, new, sites, images, manner)
    return Fit(old, new, sites, fitted, manner, held_out)


def _prices(fit: Fit, metric: str, example: Inputs | None, halves: dict[str, torch.dtype]) -> Costs:
    """What each rank of each site costs, after all sites that must stay have got their reason."""
    if fit.calibration is not None:
        _leave_large(fit.sites)
    if example is not None:
        leave_those_read(fit.new, fit.sites, fit.form, example)
        check_outputs(fit.old, fit.sites, example)
    return {site.name: costs(site, fit.form, metric, halves.get(f"{site.name}.weight")) for site in fit.sites}


def _work(fit: Fit, trials: Costs, on_progress: Callable[[int, int], None]) -> Work:
    tried = {name: len(fit.form.trials([rank for rank in prices if rank])) for name, prices in trials.items()}
    return Work(fit.candidates, {} if fit.calibration is None else tried, on_progress)


def _prepare(fit: Fit, example: Inputs | None, output_weights: Mapping[str, float] | None) -> list[str]:
    """How the network is passed through and what errors cost, where images are used. Returns notes for the plan."""
    if fit.calibration is None or example is None:
        return []
    fit.scales = output_scales(fit.old, fit.calibration.batches(enough(example.values_per_sample)), output_weights)
    fit.courses = follow(fit.old, fit.candidates, example)
    few = enough(example.values_per_sample)
    fit.metrics = output_metrics(fit.old, fit.candidates, fit.calibration.batches(few), scales=fit.scales)
    if all(site.name in fit.metrics for site in fit.candidates):
        return []
    fit.differentiable = False
    fit.metrics = {site.name: norm_metric(fit.old, site) for site in fit.candidates}
    return ["the model's outputs are not differentiable: errors are weighed by batch norms, not by outputs"]


def _finish_layers(old: nn.Module, new: nn.Module, sites: list[Site], halves: dict[str, torch.dtype]) -> None:
    """New layers have the mode of the convolutions that they stand for, and all tensors the type that they came in."""
    for site in sites:
        new.get_submodule(site.name).train(old.get_submodule(site.name).training)
    narrow(new, halves, sites)


def _check_arguments(
    calibration: object,
    budget: float,
    metric: str,
    form: str,
    method: str,
    depth_multiplier: int | None,
    example_input: object,
) -> None:
    if not 0 < budget <= 1:
        raise ValueError(f"convert: budget must be over 0 and at most 1, got {budget!r}")
    if metric not in METRICS:
        raise ValueError(f"convert: metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if form not in FORMS:
        raise ValueError(f"convert: form must be one of {', '.join(FORMS)}, got {form!r}")
    if method not in METHODS:
        raise ValueError(f"convert: method must be one of {', '.join(METHODS)}, got {method!r}")
    if depth_multiplier is not None and depth_multiplier < 1:
        raise ValueError(f"convert: depth_multiplier must be at least 1, got {depth_multiplier!r}")
    if calibration is None and method != "svd":
        raise ValueError(f"convert: method={method!r} needs calibration images; without any, use method='svd'")
    if calibration is None and example_input is None and metric != "conv_params" and depth_multiplier is None:
        raise ValueError(f"convert: metric={metric!r} needs calibration images or an example_input")


def _check_numbers(sweeps: int, ridge: float) -> None:
    if not isinstance(sweeps, int) or sweeps < 0:
        raise ValueError(f"convert: sweeps must be a whole number, at least 0, got {sweeps!r}")
    if not 0 <= ridge < math.inf:
        raise ValueError(f"convert: ridge must be at least 0 and finite, got {ridge!r}")


def _example(model: nn.Module, example_input: Any) -> Inputs | None:
    if example_input is None:
        return None
    if isinstance(example_input, tuple):  # as for ``compile``: positional arguments
        example_input = Inputs(example_input)
    return next(CalibrationImages.of(model, [example_input], "convert: example_input").batches(2))


def _sites(
    model: nn.Module, skip: Skip, example: Inputs | None, halves: dict[str, torch.dtype]
) -> tuple[list[Site], list[str]]:
    """The convolutions, recorded on an example if there is one, else traced; with what could not be found out."""
    sites = find_sites(model, skip)
    if example is not None:
        hint = ", in float32 instead of half precision" if halves else ""
        return record(model, sites, example, hint), []
    failure = trace_norms(model, sites)
    if not failure:
        return sites, []
    return sites, [f"batch norms were not used to weigh errors: without images the model must be traceable ({failure})"]


def _leave_large(sites: list[Site]) -> None:
    for site in sites:
        values = site.conv.weight[0].numel()
        if values > LARGEST:
            site.reason = site.reason or f"too large to calibrate: {values} values in a patch, at most {LARGEST}"


def _require_some(model: nn.Module, sites: list[Site], priced: Costs, fixed: bool) -> None:
    """Give sites that no rank makes cheaper their reason; at least one site must be left."""
    for site in sites:
        if not site.reason and not fixed and len(priced[site.name]) == 1:
            site.reason = "no rank makes it cheaper"
    if any(not site.reason for site in sites):
        return
    why = reasons(sites) or "it has no nn.Conv1d/2d/3d at all"
    if any(type(module).__module__.startswith("torch.ao.nn.quantized") for module in model.modules()):
        why += "; some of its layers are quantized: convert the model before it is"
    raise ValueError(f"convert: {type(model).__name__} has no convolution to convert ({why})")


def _row(site: Site, form: AnyForm, rank: int, errors: Errors | None) -> LayerPlan:
    conv = site.conv
    known = bool(site.outputs)
    return LayerPlan(
        name=site.name,
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel_size=tuple(conv.kernel_size),
        rank=rank,
        weights_before=weights(site, form, 0),
        weights_after=weights(site, form, rank),
        macs_before=macs(site, form, 0) if known else None,
        macs_after=macs(site, form, rank) if known else None,
        error_closed_form=errors.closed_form if errors else None,
        error=errors.fitted if errors else None,
        reason="" if rank else site.reason or "the budget is better spent on other layers",
    )
