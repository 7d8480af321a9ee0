"""What the second part of the report shows: a few layers of two networks on one image, as numbers of bounded size.

Nothing that the page can compute is stored: a layer is its padded input, the filters of a few output channels of the
normal convolution, and the depthwise and pointwise weights of the separable one; of a bottleneck also those of the
pointwise convolution before it. Batch norms that directly follow a convolution are folded into its weights and bias,
as an inference engine does, so that maps of both networks mean the same.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconv.layers.borrowed import evaluating
from sepconv.norms import fold, scale_and_shift_of
from sepconv.runs import png
from sepconv.runs.layer_pairs import activation_between, convolutions, pairs_of, split

VALUES_PER_LAYER = 100_000
"""Numbers stored for one layer: 400 kB as float32, 533 kB as base64."""


def collect(
    normal_model: nn.Module,
    separable_model: nn.Module,
    image: Tensor,
    *,
    layers: Sequence[str] | None = None,
    max_layers: int = 6,
    channels: int = 6,
    label: str = "",
) -> dict[str, Any]:
    """Run an image through the normal network and keep what explains its converted layers.

    Both layers of a pair are shown on the same input, the one the normal network gives to that layer. Layers with more
    numbers than ``VALUES_PER_LAYER`` are cut to a window in the middle of their output, all input channels kept.

    Args:
        normal_model: the network before conversion.
        separable_model: the converted one: where it has a layer with ``.depthwise`` and ``.pointwise``, or an
            ``nn.Sequential`` of a pointwise convolution and such a layer, `normal_model` has an ``nn.Conv2d``
            (groups 1) of the same name.
        image: one image, prepared as for the network.
        layers: names of the layers to keep; by default `max_layers` of the converted ones, evenly from first to last.
        channels: at most so many output channels of each layer, those that vary most over the image.
        label: what the image shows, if known.

    Shape:
        image: (C, H, W) or (1, C, H, W)

    Returns:
        What ``json.dump`` takes: "image" {png, width, height, label}, "layers", and "left_out" [{name, reason}], the
        other convolutions of the normal network. Arrays of a layer are base64 of little-endian float32: "input"
        (C, h, w) padded; "normal_weight" (K, C, kH, kW); "depthwise_weight" (C*M, kH, kW); "pointwise_weight" (K, C*M);
        the three biases; K is the number of "channels" kept. A bottleneck has "reduce_weight" (R, C) as well, and
        R instead of C*M in the others; elsewhere it is "".

    Raises:
        ValueError: the image has another shape; a name in `layers` is not a converted layer.
    """
    batch = image if image.dim() == 4 else image[None]
    if batch.dim() != 4 or batch.shape[0] != 1:
        raise ValueError(f"collect: image must have shape (C, H, W) or (1, C, H, W), got {tuple(image.shape)}")
    pairs, left_out = pairs_of(normal_model, separable_model)
    names = _spread(list(pairs), max_layers) if layers is None else list(layers)
    unknown = [name for name in names if name not in pairs]
    if unknown:
        known = ", ".join(pairs) or "none"
        raise ValueError(f"collect: layer {unknown[0]!r} is not a converted layer; those that can be shown: {known}")
    chosen = {name: pairs[name] for name in names}
    normal_calls = _watch(normal_model, [conv for conv, _ in chosen.values()], batch)
    layers_of = {name: split(layer)[1] for name, (_, layer) in chosen.items()}
    parts = [part for layer in layers_of.values() for part in (layer.depthwise, layer.pointwise)]
    separable_calls = _watch(separable_model, parts, batch)
    left_out |= {name: f"one of {len(pairs) - len(names)} more of the same kind" for name in pairs.keys() - set(names)}
    described = []
    for name, (conv, layer) in chosen.items():
        if conv in normal_calls and layers_of[name].pointwise in separable_calls:
            described.append(_describe(name, conv, layer, normal_calls, separable_calls, channels))
        else:
            left_out[name] = "it did not run on this image"
    height, width = batch.shape[2:]
    picture = {"png": png.data_uri(batch[0]), "height": height, "width": width, "label": label}
    reasons = [{"name": name, "reason": left_out[name]} for name, _ in convolutions(normal_model) if name in left_out]
    return {"image": picture, "layers": described, "left_out": reasons}


@dataclass
class _Call:
    """The first call of a convolution: what went in, what came out, and the batch norm that took it, if one did."""

    x: Tensor
    y: Tensor
    norm: Any = None


def _spread(names: list[str], count: int) -> list[str]:
    """At most `count` names, evenly spaced, first and last included."""
    if len(names) <= count:
        return names
    if count == 1:
        return names[:1]
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]


def _watch(model: nn.Module, convs: Sequence[nn.Module], batch: Tensor) -> dict[nn.Module, _Call]:
    """Run the model and note the first call of each convolution, and whether a batch norm took its very output."""
    calls: dict[nn.Module, _Call] = {}
    inputs: dict[nn.Module, Tensor] = {}

    def before_conv(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # An activation in place may later overwrite what came in.
        inputs.setdefault(module, next(iter((*args, *kwargs.values()))).clone())

    def after_conv(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        calls.setdefault(module, _Call(inputs[module], output))

    def before_norm(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for call in calls.values():
            if call.y is next(iter((*args, *kwargs.values()))):
                call.norm = module

    handles = [conv.register_forward_pre_hook(before_conv, with_kwargs=True) for conv in convs]
    handles += [conv.register_forward_hook(after_conv) for conv in convs]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.running_var is not None]
    handles += [norm.register_forward_pre_hook(before_norm, with_kwargs=True) for norm in norms]
    parameter = next(model.parameters())
    try:
        with evaluating(model), torch.no_grad():
            model(batch.to(parameter.device, parameter.dtype, copy=True))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _folded(conv: Any, call: _Call) -> tuple[Tensor, Tensor]:
    """Weight and bias with the batch norm in them: (O, C, kH, kW) and (O,), float32."""
    weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
    if call.norm is not None:
        weight, bias = fold(weight, bias, *scale_and_shift_of(call.norm))
    return weight.float().cpu(), torch.zeros(len(weight)) if bias is None else bias.float().cpu()


def _describe(
    name: str,
    conv: nn.Conv2d,
    layer: Any,
    normal_calls: dict[nn.Module, _Call],
    separable_calls: dict[nn.Module, _Call],
    channels: int,
) -> dict[str, Any]:
    call = normal_calls[conv]
    reduce, layer = split(layer)
    weight, bias = _folded(conv, call)
    depthwise, depthwise_bias = _folded(layer.depthwise, separable_calls[layer.depthwise])
    pointwise, pointwise_bias = _folded(layer.pointwise, separable_calls[layer.pointwise])
    taps = weight[0, 0].numel()
    kept = max(1, min(channels, weight.shape[0], VALUES_PER_LAYER // 3 // (weight.shape[1] * taps)))
    # Pixels get what the weights leave, and a third at the least.
    stored = kept * weight[0].numel() + depthwise.numel() + kept * pointwise.shape[1]
    window = _window(conv, call, max(VALUES_PER_LAYER - stored, VALUES_PER_LAYER // 3))
    top, left, height, width = window
    seen = call.y[0, :, top : top + height, left : left + width].float()
    strongest = seen.flatten(1).std(1, correction=0).argsort(descending=True)[:kept].sort().values.cpu()
    return {
        "name": name,
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel": list(conv.kernel_size),
        "stride": list(conv.stride),
        "dilation": list(conv.dilation),
        "depth_multiplier": layer.depthwise.out_channels // layer.depthwise.in_channels,
        "activation": activation_between(layer),
        "batch_norm": call.norm is not None,
        "output_size": list(call.y.shape[2:]),
        "window": window._asdict(),
        "channels": strongest.tolist(),
        "input": _base64(_input_window(conv, call.x, window)),
        "normal_weight": _base64(weight[strongest]),
        "normal_bias": _base64(bias[strongest]),
        "reduce_weight": "" if reduce is None else _base64(reduce.weight.float().flatten(1)),
        "depthwise_weight": _base64(depthwise[:, 0]),
        "depthwise_bias": _base64(depthwise_bias),
        "pointwise_weight": _base64(pointwise[strongest].flatten(1)),
        "pointwise_bias": _base64(pointwise_bias[strongest]),
    }


def _input_side(conv: nn.Conv2d, d: int, outputs: int) -> int:
    """Padded input pixels under `outputs` neighbouring outputs in dimension d."""
    return (outputs - 1) * conv.stride[d] + conv.dilation[d] * (conv.kernel_size[d] - 1) + 1


class _Window(NamedTuple):
    """Of the output of a convolution, in pixels."""

    top: int
    left: int
    height: int
    width: int


def _window(conv: nn.Conv2d, call: _Call, values: int) -> _Window:
    """The largest in the middle whose input is at most `values` numbers."""
    height, width = call.y.shape[2:]
    side = max(height, width)
    while side > 1:
        pixels = _input_side(conv, 0, min(side, height)) * _input_side(conv, 1, min(side, width))
        if pixels * conv.in_channels <= values:
            break
        side -= 1
    rows, columns = min(side, height), min(side, width)
    return _Window((height - rows) // 2, (width - columns) // 2, rows, columns)


def _input_window(conv: nn.Conv2d, x: Tensor, window: _Window) -> Tensor:
    """The padded input under a window of the output: (C, h, w)."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)[0]
    top, left, height, width = window
    y, x0 = top * conv.stride[0], left * conv.stride[1]
    return padded[:, y : y + _input_side(conv, 0, height), x0 : x0 + _input_side(conv, 1, width)].float()


def _base64(values: Tensor) -> str:
    data = values.detach().cpu().contiguous().numpy().astype("<f4").tobytes()
    return base64.b64encode(data).decode()
