"""Verify, then time: contenders for the same network, interleaved in one process."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from sepconv.compile import CompiledModel, compile
from sepconv.compile.explain import Group
from sepconv.layers.borrowed import evaluating
from sepconv.leaves import Inputs, leaves
from sepconv.system.threads import threads_set_to
from sepconv.system.timing import in_turn, summary

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WARM_UP = 3
SAMPLES = (10, 200)
"""Fewest and most samples of each contender."""

TOLERANCE = 1e-4
"""Largest difference allowed between the contenders of a network, relative to the largest output."""

Contender = Callable[..., Any]
CPU = torch.device("cpu")
_TORCH_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Latency:
    """How long one call takes: median, and the range that holds the middle 60 %.

    Attributes:
        layout: memory layout of images and weights in which the contender was fastest.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    samples: int
    layout: str


@dataclass(frozen=True)
class _Entry:
    network: str
    contender: str
    layout: str
    call: Contender
    x: Inputs
    times: list[float]


def with_torch_layers(model: nn.Module) -> nn.Module:
    """A copy of `model` in which PyTorch computes every convolution: the same weights, none of our kernels."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        base = next((base for base in _TORCH_CONVOLUTIONS if isinstance(module, base)), None)
        if base is not None and type(module).__module__.startswith("sepconv."):
            # Our layers are nn.ConvNd with another computation; the base class gives back PyTorch's.
            module.__class__ = base
    return plain


def contenders(model: nn.Module, x: Inputs) -> dict[str, Any]:
    """The network in PyTorch's layers as it stands in a program, and by ``sepconv.compile`` for inputs like `x`."""
    with evaluating(model):
        return {"torch": with_torch_layers(model), "sepconv": compile(model, x.kwargs or x.args)}


@torch.inference_mode()
def latency_ms(
    networks: Mapping[str, Mapping[str, Contender]], x: Inputs, *, threads: int, seconds: float = 3.0
) -> dict[str, dict[str, Latency]]:
    """Median time of one call of every contender, after checking that contenders of a network agree.

    All are called in turn, so that whatever else the machine does meets them alike. Each is tried with contiguous
    and with channels_last images; its better layout counts.

    Args:
        networks: by name, the contenders for each network by name; the first one's output is what the others must give.
        x: what the networks are called with.
        threads: that PyTorch uses meanwhile.
        seconds: of measuring, in all; fewer where the most samples are reached before.

    Raises:
        ValueError: contenders of a network disagree; nothing was timed.
    """
    with threads_set_to(threads):
        entries = [
            _Entry(network, contender, layout, _copied(call, fmt), x.to(CPU, memory_format=fmt), [])
            for network, contenders in networks.items()
            for contender, call in contenders.items()
            for layout, fmt in LAYOUTS.items()
        ]
        for network in networks:
            _verify([entry for entry in entries if entry.network == network])
        _time(entries, seconds)
    return {
        network: {contender: _best(entries, network, contender) for contender in contenders}
        for network, contenders in networks.items()
    }


@torch.inference_mode()
def layer_ms(
    networks: Mapping[str, CompiledModel], layers: Sequence[str], *, threads: int, rounds: int = 3
) -> dict[str, dict[str, float]]:
    """Median time of the steps of a compiled network that compute each named layer, all its calls together.

    What a step computes in the same pass (batch norm, activation, the addition of a shortcut) counts for its layer.
    Under the name "" stand all other steps together. The networks are measured in turn. A network that runs through
    PyTorch as a whole has no steps, and so no entries.

    Args:
        networks: by name; each has modules of the names in `layers`.
    """
    times: dict[str, dict[str, list[float]]] = {name: {} for name in networks}
    with threads_set_to(threads):
        for _ in range(rounds):
            for name, model in networks.items():
                for layer, ms in _by_layer(model.explain(measure=True).groups, layers).items():
                    times[name].setdefault(layer, []).append(ms)
    return {
        name: {layer: round(statistics.median(found), 4) for layer, found in rows.items()}
        for name, rows in times.items()
    }


def _by_layer(groups: Sequence[Group], layers: Sequence[str]) -> dict[str, float]:
    """Milliseconds by layer; a group's name holds the paths of its modules, joined by " + "."""
    found = dict.fromkeys([*layers, ""], 0.0) if groups else {}
    for group in groups:
        paths = group.name.split(" + ")
        of = (layer for layer in layers for path in paths if f"{path}.".startswith(f"{layer}."))
        found[next(of, "")] += (group.time_us or 0.0) / 1e3
    return found


def _copied(call: Contender, fmt: torch.memory_format) -> Contender:
    """A module with its weights in this layout, the caller's left alone; anything else lays out its weights itself."""
    if not isinstance(call, nn.Module):
        return call
    module: nn.Module = copy.deepcopy(call).eval()
    for tensor in module.parameters():
        if tensor.dim() == 4:  # signals and volumes have no layout by this name
            tensor.data = tensor.data.contiguous(memory_format=fmt)
    return module


def _verify(entries: list[_Entry]) -> None:
    first = entries[0]
    expected = leaves(first.x.run(first.call))
    for entry in entries:
        found = leaves(entry.x.run(entry.call))
        for name, want in expected.items():
            limit = TOLERANCE * float(want.abs().max().clamp_min(1e-30))
            error = float((found[name] - want).abs().max())
            if error <= limit:
                continue
            raise ValueError(
                f"latency_ms: {entry.contender} ({entry.layout}) differs from {first.contender} on the network "
                f"{entry.network} by {error:.2g}, more than {limit:.2g}; nothing was timed"
            )


def _time(entries: list[_Entry], seconds: float) -> None:
    calls = {i: partial(entry.call, *entry.x.args, **entry.x.kwargs) for i, entry in enumerate(entries)}
    in_turn(calls, WARM_UP)
    fewest, most = SAMPLES
    for i, times in in_turn(calls, most, fewest=fewest, budget=seconds).items():
        entries[i].times.extend(times)


def _best(entries: list[_Entry], network: str, contender: str) -> Latency:
    layouts = [entry for entry in entries if (entry.network, entry.contender) == (network, contender)]
    return min((_summary(entry) for entry in layouts), key=lambda latency: latency.median_ms)


def _summary(entry: _Entry) -> Latency:
    found = summary([seconds * 1e3 for seconds in entry.times])
    return Latency(**asdict(found), layout=entry.layout)
