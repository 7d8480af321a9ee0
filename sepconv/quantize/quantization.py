"""A trained network in, one whose layers compute with integers out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sepconv.convert.accept import undisturbed, widen
from sepconv.convert.images import CalibrationImages
from sepconv.data import Data, SampleData
from sepconv.layers.borrowed import copied, evaluating, is_exported
from sepconv.leaves import Inputs
from sepconv.leaves.closeness import Closeness, OutputComparison
from sepconv.quantize import equalize as equalization
from sepconv.quantize.capture import capture, check_agreement
from sepconv.quantize.fake import FakeQuantize
from sepconv.quantize.joints import find_joints
from sepconv.quantize.layers import GraphLayer, compute_constants, fold_norms
from sepconv.quantize.placement import VALUES, place
from sepconv.quantize.plan import QuantizationPlan, QuantizedLayer, QuantizedValue
from sepconv.quantize.ranges import RANGES
from sepconv.quantize.rounding import ROUNDINGS
from sepconv.quantize.sweep import LARGEST_VALUE, LayerErrors, Options, Sweep

IMAGES = 1000
"""Of a data set so many are looked at."""

HELD_OUT_OF, MOST_HELD_OUT, ENOUGH_TO_HOLD_OUT = 16, 64, 64
"""One image of so many is only measured on, that many at most, and none of fewer than that."""

MOST_OF_A_LAYER = 0.02
"""Squared error that a layer's integers may add to its output, relative to the output's variance."""

MOST_OF_ALL = 0.1
"""The same of the network's outputs."""


def quantize(
    model: nn.Module,
    calibration: Tensor | Inputs | Data | SampleData | Iterable[Any],
    *,
    skip: Collection[str] = (),
    equalize: bool = True,
    bias_correction: bool = True,
    ranges: str = "mse",
    rounding: str = "moments",
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[fx.GraphModule, QuantizationPlan]:
    """Make a network whose convolutions and linear layers compute with 8-bit integers.

    No labels and no training: weights (signed, a scale for each output channel) and activations (unsigned, with a zero
    point) become multiples of scales that are found on unlabelled images. The model itself is left as it is. The result
    is a module in float32 on these steps: it can be trained (gradients go straight through the rounding), saved,
    exported, and compiled to integer kernels by ``sepconv.compile``.

    Args:
        model: any module that ``torch.export`` can capture; of what ``torch.compile`` returned, the module inside.
        calibration: unlabelled data as for ``convert``, some hundreds of samples; or a data set of ``sepconv.data``.
        skip: names of layers that stay in float32, as the plan has them.
        equalize: bring channels to like ranges, across layers.
        bias_correction: take the mean error of each channel from the bias of its layer.
        ranges: "mse", those with the least squared error, or "minmax".
        rounding: of weights, "moments" (by the second moments of the inputs) or "nearest".
        force: return the network even if its outputs move too far.
        on_progress: is told the layers done and their number.

    Returns:
        The quantized network in evaluation mode, and the plan that says what was done to each layer and why.

    Raises:
        ValueError: an argument is out of range, the model cannot be captured, holds NaN or has no layer to quantize, or
            its outputs move too far.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
        >>> quantized, plan = quantize(model, torch.randn(64, 1, 8, 8))
        >>> plan.left
        []
    """
    options = Options(equalize, bias_correction, ranges, rounding)
    _check_arguments(model, options, skip)
    with undisturbed(model):
        original = _own_copy(model)
        images = CalibrationImages.of(original, _source(calibration), "quantize: calibration")
        with evaluating(original):
            return _quantize(original, images, options, tuple(skip), force, on_progress or _ignore)


def _quantize(
    original: nn.Module,
    images: CalibrationImages,
    options: Options,
    skip: tuple[str, ...],
    force: bool,
    on_progress: Callable[[int, int], None],
) -> tuple[fx.GraphModule, QuantizationPlan]:
    fitted, held_out = _divided(images)
    example = _example(images)
    base = prepared(copy.deepcopy(original), example)
    check_agreement(original, base, example)
    batches = list(fitted.batches(_most_images(base, example)))
    equalized = _equalize(base, batches) if options.equalize else []
    reasons = dict.fromkeys(skip, "skipped")
    tried = _attempt(base, batches, options, reasons, on_progress)
    _check_names(tried, skip)
    if too_bad := {name: errors for name, errors in tried.errors.items() if errors.own > MOST_OF_A_LAYER}:
        reasons |= {name: _too_bad(errors) for name, errors in too_bad.items()}
        tried = _attempt(base, batches, options, reasons, on_progress)
    judged = held_out or fitted
    found = _closeness(original, tried.module, judged)
    error, agreement = found.relative_error, found.leaves[0].agreement if len(found.leaves) == 1 else None
    plan = QuantizationPlan(
        [_row(layer, tried, reasons, equalized) for layer in tried.layers],
        _values(tried.module),
        asdict(options),
        sum(map(len, batches)),
        held_out.count if held_out else 0,
        error,
        agreement,
    )
    if not force and not error <= MOST_OF_ALL:
        raise ValueError(
            f"quantize: the outputs would move by {error:.2g} of their variance, more than {MOST_OF_ALL:g}"
            + ("" if agreement is None else f" (the same class for {agreement:.1%})")
            + f"; leave its worst layers in float32 (skip, on the command line --skip NAME): {_worst(tried.errors)}"
            + "; or take it as it is (force=True, --force)"
        )
    return tried.module.eval(), plan


@dataclass
class _Attempt:
    module: fx.GraphModule
    layers: list[GraphLayer]
    errors: dict[str, LayerErrors]


def _attempt(
    base: fx.GraphModule,
    batches: list[Inputs],
    options: Options,
    left: Collection[str],
    on_progress: Callable[[int, int], None],
) -> _Attempt:
    module = copy.deepcopy(base)
    layers = place(module, left)
    total = sum(not layer.reason for layer in layers)
    if not total and not left:
        raise ValueError("quantize: the model has no convolution or linear layer that can compute with integers")
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    sweep = Sweep(module, layers, options, step)
    sweep.run(batches)
    return _Attempt(module, layers, sweep.errors)


def prepared(model: nn.Module, example: Inputs) -> fx.GraphModule:
    """A model's graph with its norms folded, before any quantizer; the model's own tensors are used and changed."""
    base = capture(model, example)
    compute_constants(base)
    fold_norms(base)
    return base


def _equalize(base: fx.GraphModule, batches: list[Inputs]) -> list[str]:
    joints = find_joints(base)
    return equalization.equalize(base, joints, equalization.observe(base, joints, batches))


def _ignore(done: int, total: int) -> None:
    pass


def _check_arguments(model: object, options: Options, skip: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(skip, str):
        raise TypeError(f"quantize: skip must be a collection of names, got the text {skip!r}")
    if options.ranges not in RANGES:
        raise ValueError(f"quantize: ranges must be one of {', '.join(RANGES)}, got {options.ranges!r}")
    if options.rounding not in ROUNDINGS:
        raise ValueError(f"quantize: rounding must be one of {', '.join(ROUNDINGS)}, got {options.rounding!r}")
    if any(isinstance(module, FakeQuantize) for module in model.modules()):
        raise ValueError("quantize: the model is quantized already")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(f"quantize: {name} has no values (it is on the meta device); load the weights first")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"quantize: {name} holds NaN or infinity")


def _own_copy(model: nn.Module) -> nn.Module:
    while hasattr(model, "_orig_mod"):
        model = model._orig_mod  # type: ignore[assignment]
    if is_exported(model) or isinstance(model, torch.jit.ScriptModule):
        raise ValueError("quantize: the model was made by torch.export or TorchScript; quantize what it was made of")
    own: nn.Module = copied(model, "quantize")
    widen(own)
    return own


def _source(calibration: Any) -> Any:
    if isinstance(calibration, Data | SampleData):
        return calibration.calibration(min(IMAGES, len(calibration.train)))
    return calibration


def _divided(images: CalibrationImages) -> tuple[CalibrationImages, CalibrationImages | None]:
    """Those that are looked at, and those held out, if there are enough."""
    if images.count < ENOUGH_TO_HOLD_OUT:
        return images, None
    fitted, held_out = images.divided(max(HELD_OUT_OF, math.ceil(images.count / MOST_HELD_OUT)))
    return (fitted, held_out) if fitted.count and held_out.count else (images, None)


def _example(images: CalibrationImages) -> Inputs:
    """Two samples: a graph made of one would hold for one."""
    first = next(images.batches(2))
    if first.divisible and len(first) == 1:
        return first[torch.zeros(2, dtype=torch.long)]
    return first


@torch.no_grad()
def _most_images(base: fx.GraphModule, example: Inputs) -> int:
    """As many as make no value of the network larger than it may be."""
    largest = 1

    class Sizes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            nonlocal largest
            result = super().run_node(n)
            if isinstance(result, Tensor) and n.op != "get_attr":
                largest = max(largest, result.numel() * result.element_size())
            return result

    Sizes(base).run(*example.args, *example.kwargs.values())
    return max(1, LARGEST_VALUE * len(example) // largest)


@torch.no_grad()
def _closeness(original: nn.Module, quantized: nn.Module, images: CalibrationImages) -> Closeness:
    compared = OutputComparison(caller="quantize", approximated="a layer")
    for batch in images.batches():
        compared.add(batch.run(original), batch.run(quantized), len(batch))
    found = compared.result()
    if found is None:
        raise ValueError("quantize: the model returns no floating point numbers")
    return found


def _check_names(tried: _Attempt, skip: Collection[str]) -> None:
    known = [layer.name for layer in tried.layers]
    if unknown := [name for name in skip if name not in known]:
        raise ValueError(f"quantize: skip names {unknown[0]!r}, but the layers are {', '.join(known[:8])}, ...")


def _too_bad(errors: LayerErrors) -> str:
    return f"its integers would add {errors.own:.2g} of its output's variance, more than {MOST_OF_A_LAYER:g}"


def _worst(errors: dict[str, LayerErrors]) -> str:
    worst = sorted(errors, key=lambda name: -errors[name].own)[:3]
    return ", ".join(f"{name} ({errors[name].own:.2g})" for name in worst)


def _row(layer: GraphLayer, tried: _Attempt, reasons: dict[str, str], equalized: Collection[str]) -> QuantizedLayer:
    errors = tried.errors.get(layer.name)
    of_weight, of_input, of_output = (errors.weight, errors.input, errors.output) if errors else (None, None, None)
    return QuantizedLayer(
        layer.name,
        layer.kind,
        tuple(layer.tensor(tried.module).shape),
        errors is not None,
        layer.name in equalized,
        of_weight,
        of_input,
        of_output,
        reason="" if errors else reasons.get(layer.name, layer.reason),
    )


def _values(module: fx.GraphModule) -> list[QuantizedValue]:
    rows = []
    for name, quantizer in module.named_modules():
        if isinstance(quantizer, FakeQuantize) and name.startswith(f"{VALUES}."):
            scale, zero = float(quantizer.scale), int(quantizer.zero_point)
            ends = ((end - zero) * scale for end in (quantizer.low, quantizer.high))
            rows.append(QuantizedValue(name.removeprefix(f"{VALUES}."), scale, zero, *ends))
    return rows
