"""Conversion without any training: accuracy after each stage, for every M, for budgets, and for the rivals."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.evidence import rivals
from benchmarks.evidence.runner import RUNS, Step
from benchmarks.evidence.teachers import CONVERTED, SMALL, data_of, teacher
from sepconv.convert import convert
from sepconv.convert.forms import FORMS
from sepconv.cost import count
from sepconv.runs.model_file import FILE, open_model, read_card, write
from sepconv.train import evaluate

IMAGES = {"mixed": 5000}
"""Images that the conversions of a teacher see, 1000 of all others: layers of nine pixels an image want more."""
FEWER_IMAGES = (1000,)
MULTIPLIERS = {"separable": (1, 2, 3, 4), "bottleneck": (1, 2)}
BUDGETS = {
    **{f"macs-1-{n}": ("macs", 1 / n) for n in (2, 3)},
    **{f"params-1-{n}": ("conv_params", 1 / n) for n in (8, 2, 3, 4)},
}
BUDGETS_OF = {"vgg": tuple(BUDGETS), "wide": ("params-1-8",)}
"""Of the other teachers the three that say whether it holds there too."""
FEW_BUDGETS = ("macs-1-2", "macs-1-3", "params-1-8")
FORMS_OF = {"wide": ("separable",)}
"""That teacher was measured before there was another form; `mixed` took its place."""
RIVAL_MULTIPLIERS = (1, 2)
STAGES: dict[str, dict[str, Any]] = {
    "closed form": {"method": "svd"},
    "least squares": {"method": "least_squares", "sweeps": 0},
    "alternating": {"method": "least_squares"},
    "sequential targets": {"method": "sequential"},
    "batch norm statistics": {"method": "sequential", "reestimate_bn": True},
}


def calibration(name: str) -> Tensor:
    return data_of(name).calibration(IMAGES.get(name, 1000), 0)


def fewer_images(name: str, budget_name: str, images: int, folder: Path) -> dict[str, Any]:
    """The conversion under one budget that sees so many images; the network is not kept."""
    metric, share = BUDGETS[budget_name]
    begin = time.process_time()
    new, _ = convert(teacher(name), data_of(name).calibration(images, 0), share, metric=metric, form="separable")
    return {"teacher": name, "budget": share, "images": images, **measured(name, new, time.process_time() - begin)}


def measured(name: str, model: nn.Module, seconds: float) -> dict[str, Any]:
    """Accuracy and cost of a teacher's conversion, and the processor seconds that it took."""
    data = data_of(name)
    cost = count(model, data.input_shape)
    accuracy = evaluate(model, data.test).accuracy
    return {
        "accuracy": accuracy,
        "conv_params": cost.conv_params,
        "macs": cost.macs,
        "cpu_seconds": round(seconds, 1),
    }


def stages(name: str, form: str, multiplier: int, folder: Path) -> dict[str, Any]:
    """Accuracy after each stage of a conversion with one depth multiplier, or its weights, for all layers."""
    model, images = teacher(name), calibration(name)
    rows = []
    for stage, arguments in STAGES.items():
        begin = time.process_time()
        settings = {"form": form, "reestimate_bn": False, **arguments}
        new, _ = convert(model, images, depth_multiplier=multiplier, **settings)
        rows.append({"stage": stage, **measured(name, new, time.process_time() - begin)})
    return {"teacher": name, "form": form, "depth_multiplier": multiplier, "images": len(images), "rows": rows}


def budget(name: str, budget_name: str, form: str, folder: Path) -> dict[str, Any]:
    """A conversion under one budget with images and without; the network stays in `folder` for the distillation."""
    model, images = teacher(name), calibration(name)
    metric, share = BUDGETS[budget_name]
    begin = time.process_time()
    new, plan = convert(model, images, share, metric=metric, form=form)
    result = {"with images": measured(name, new, time.process_time() - begin)}
    card = read_card(RUNS / f"teacher-{name}" / FILE)
    assert card is not None
    write(folder / FILE, new, card.changed_to(new))
    begin = time.process_time()
    free, _ = convert(model, None, share, metric=metric, form=form, method="svd", example_input=images[:2])
    result["without images"] = measured(name, free, time.process_time() - begin)
    ranks = {row.name: row.rank for row in plan.layers}
    about = {"teacher": name, "metric": metric, "budget": share, "form": form, "images": len(images)}
    return {**about, "ranks": ranks, **result}


def converted(name: str, budget_name: str, form: str) -> nn.Module:
    """The network of the finished step `FORM-NAME-BUDGET`."""
    return open_model(str(RUNS / f"{form}-{name}-{budget_name}"))[0]


def contenders(model: nn.Module, multiplier: int, images: Tensor) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """What takes each 3x3 convolution's place, with the weights of M = `multiplier` or (Tucker, CP) at most as many."""
    same = dict(form="separable", depth_multiplier=multiplier, skip=["stem"])
    each = partial(rivals.replaced, model)
    yield "depthwise first, closed form", lambda: convert(model, None, method="svd", **same)[0]
    yield "pointwise first, closed form", lambda: each(lambda c: rivals.pointwise_first_svd(c, multiplier))
    yield "Tucker", lambda: each(lambda c: rivals.tucker(c, rivals.separable_weights(c, multiplier)))
    yield "CP", lambda: each(lambda c: rivals.canonical(c, rivals.separable_weights(c, multiplier)))
    yield "depthwise first, sequential", lambda: convert(model, images, reestimate_bn=False, **same)[0]
    yield "pointwise first, sequential", lambda: rivals.pointwise_first_sequential(model, images, multiplier)


def norms(name: str, form: str, folder: Path) -> dict[str, Any]:
    """Accuracy at an eighth of the weights with batch norm statistics taken anew, and with the original's."""
    model, original, test = converted(name, "params-1-8", form), teacher(name), data_of(name).test
    found = {"teacher": name, "form": form, "anew": evaluate(model, test).accuracy}
    for path, norm in original.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            statistics = {"running_mean": norm.running_mean, "running_var": norm.running_var}
            model.get_submodule(path).load_state_dict(statistics, strict=False)
    return {**found, "original": evaluate(model, test).accuracy}


def fitted(model: nn.Module, multiplier: int, images: Tensor) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """The CP decomposition of `contenders`, but fitted to images."""
    same = dict(form="bottleneck", depth_multiplier=multiplier, skip=["stem"])
    yield "bottleneck, sequential", lambda: convert(model, images, reestimate_bn=False, **same)[0]


def compared(
    name: str,
    multiplier: int,
    who: Callable[[nn.Module, int, Tensor], Iterator[tuple[str, Callable[[], nn.Module]]]],
    folder: Path,
) -> dict[str, Any]:
    """What takes the 3x3 convolutions' place at the same weights, without training."""
    model, images = teacher(name), calibration(name)
    rows = []
    for contender, make in who(model, multiplier, images):
        begin = time.process_time()
        rows.append({"contender": contender, **measured(name, make(), time.process_time() - begin)})
    return {"teacher": name, "depth_multiplier": multiplier, "images": len(images), "rows": rows}


CONTENDERS = {"rivals": contenders, "rivals-fitted": fitted}
"""Of each name of steps, who takes part."""


def steps() -> list[Step]:
    found = []
    for name in CONVERTED:
        needs = (f"teacher-{name}",)
        for key, form in product(BUDGETS_OF.get(name, FEW_BUDGETS), FORMS_OF.get(name, FORMS)):
            found.append(Step(f"{form}-{name}-{key}", partial(budget, name, key, form), needs))
        if name not in FORMS_OF:
            found += [
                Step(f"norms-{form}-{name}", partial(norms, name, form), (f"{form}-{name}-params-1-8",))
                for form in FORMS
            ]
        few = partial(fewer_images, name, "params-1-8")
        found += [Step(f"images-{name}-{n}", partial(few, n), needs) for n in FEWER_IMAGES if name in IMAGES]
        if name in SMALL:
            for form, multipliers in MULTIPLIERS.items():
                for m in multipliers:
                    found.append(Step(f"stages-{form}-{name}-m{m}", partial(stages, name, form, m), needs))
            for m, (title, who) in product(RIVAL_MULTIPLIERS, CONTENDERS.items()):
                found.append(Step(f"{title}-{name}-m{m}", partial(compared, name, m, who), needs))
    return found
