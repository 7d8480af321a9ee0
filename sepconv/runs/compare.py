"""What is compared of two networks, as plain data: cost, score, time, and where they disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sepconv.compile import CompiledModel
from sepconv.convert.plan import LayerPlan, Plan
from sepconv.cost import Cost, count
from sepconv.data import Data, SampleData, Split
from sepconv.data.samples import first_of
from sepconv.layers.borrowed import copied, evaluating
from sepconv.leaves import Closeness, Inputs
from sepconv.runs import latency, png
from sepconv.runs.latency import Latency
from sepconv.runs.limits import limits
from sepconv.system import environment
from sepconv.train import Metrics

MOST_DISAGREEMENTS = 24
BATCH = 256


@dataclass(frozen=True)
class Judged:
    """What was found of one network on the test samples: by the task, and by the user's own function."""

    score: Metrics | Closeness
    metrics: Mapping[str, float]


def compare(
    normal: nn.Module,
    separable: nn.Module,
    plan: Plan,
    judged: Mapping[str, Judged],
    data: Data | SampleData,
    batch: int,
) -> dict[str, Any]:
    """Both networks as they stand in result.json: cost, score and time, whole and by layer, on the CPU."""
    threads = torch.get_num_threads()
    before = limits(threads)
    networks = {"normal": normal, "separable": separable}
    x = first_of(data.test, batch)
    answers = _answers(normal, separable, judged, data)
    networks = {name: copied(model, "compare").cpu() for name, model in networks.items()}
    costs = {name: count(model, x) for name, model in networks.items()}
    contenders = {name: latency.contenders(model, x) for name, model in networks.items()}
    compiled = {name: found["sepconv"] for name, found in contenders.items()}
    latencies, untimed = _latencies(contenders, x, threads)
    layer_ms = latency.layer_ms(compiled, [layer.name for layer in plan.layers], threads=threads)
    after = limits(threads)
    return {
        **{
            name: network_record(costs[name], judged[name], latencies[name], compiled[name], threads, batch)
            for name in networks
        },
        "layers": [layer_record(layer, costs, layer_ms) for layer in plan.layers],
        "other_ms": [layer_ms[name].get("") for name in networks],
        "test_images": len(data.test),
        "untimed": untimed,
        **answers,
        # Another program may have had the cores during one of the two measurements.
        "machine": {**environment.machine(), **{name: max(before[name], after[name], key=_largest) for name in after}},
    }


def _latencies(
    contenders: Mapping[str, Mapping[str, Any]], x: Inputs, threads: int
) -> tuple[dict[str, dict[str, Latency]], str]:
    """Times by network and contender, or why there are none: a network is worth its keep without them."""
    try:
        return latency.latency_ms(contenders, x, threads=threads), ""
    except ValueError as error:
        return {name: {} for name in contenders}, str(error)


def _answers(
    normal: nn.Module, separable: nn.Module, judged: Mapping[str, Judged], data: Data | SampleData
) -> dict[str, Any]:
    """Where there are classes which are confused and where the networks disagree, else how close the outputs are."""
    found = judged["separable"].score
    if isinstance(found, Closeness):
        return {"closeness": found.to_dict()}
    assert isinstance(data, Data)
    matrices = {name: one.score.confusion for name, one in judged.items() if isinstance(one.score, Metrics)}
    return {**confusions(matrices, data.classes), **disagreements(normal, separable, data)}


def confusions(matrices: Mapping[str, Tensor], classes: Sequence[str]) -> dict[str, Any]:
    """The matrices, of the classes alone that images show or that a network names, and the names of those."""
    seen = torch.stack([matrix.sum(0) + matrix.sum(1) for matrix in matrices.values()]).sum(0).nonzero().flatten()
    if len(seen) == len(classes):
        return {"confusion": {name: matrix.tolist() for name, matrix in matrices.items()}}
    cut = {name: matrix[seen][:, seen].tolist() for name, matrix in matrices.items()}
    return {"confusion": cut, "confusion_classes": seen.tolist()}


def _largest(by_threads: dict[str, float]) -> float:
    return max(by_threads.values())


def network_record(
    cost: Cost, judged: Judged, times: Mapping[str, Latency], compiled: CompiledModel, threads: int, batch: int
) -> dict[str, Any]:
    """One network's numbers as they stand in result.json."""
    return {
        "conv_params": cost.conv_params,
        "params": cost.params,
        "macs": cost.macs,
        "bytes": cost.bytes,
        **scores(judged),
        "latency_ms": {name: measured.median_ms for name, measured in times.items()},
        "latency_batch": batch,
        "latency_layout": {name: measured.layout for name, measured in times.items()},
        "threads": threads,
        "kernels": kernels(compiled),
    }


def scores(judged: Judged) -> dict[str, Any]:
    """What a network is worth, as it stands in result.json: right answers of classes, the user's numbers."""
    found = judged.score
    right = {"accuracy": found.accuracy, "loss": found.loss} if isinstance(found, Metrics) else {}
    return {**right, **({"metrics": judged.metrics} if judged.metrics else {})}


def kernels(compiled: CompiledModel) -> dict[str, str]:
    """What computes each kind of step of a compiled network."""
    found: dict[str, set[str]] = {}
    for group in compiled.explain().groups:
        found.setdefault(group.kind, set()).add(group.kernel)
    return {kind: " and ".join(sorted(names)) for kind, names in found.items()}


def layer_record(layer: LayerPlan, costs: Mapping[str, Cost], ms: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """One layer before and after, as it stands in result.json; pairs are [normal, separable]."""
    before, after = (cost_below(costs[name], layer.name) for name in ("normal", "separable"))
    return {
        "name": layer.name,
        "kind": "separable" if layer.rank else "normal",
        "kernel": list(layer.kernel_size),
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "rank": layer.rank or None,
        "error": layer.error,
        "error_closed_form": layer.error_closed_form,
        **{name: [before[name], after[name]] for name in before},
        "ms": [ms[name].get(layer.name) for name in ("normal", "separable")],
        "reason": layer.reason,
    }


def cost_below(cost: Cost, path: str) -> dict[str, int]:
    """Cost of the module at `path` with everything in it."""
    layers = [layer for layer in cost.layers if layer.name == path or layer.name.startswith(f"{path}.")]
    return {name: sum(getattr(layer, name) for layer in layers) for name in ("params", "macs", "bytes")}


@torch.no_grad()
def answers(model: nn.Module, split: Split) -> Tensor:
    """The class that the model gives to each image: int64 (N,)."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with evaluating(model):
        found = [model(images.to(device)).argmax(1).cpu() for images, _ in split.batches(BATCH)]
    return torch.cat(found)


def disagreements(normal: nn.Module, separable: nn.Module, data: Data) -> dict[str, Any]:
    """How many test images the networks answer differently, and the first of them as small pictures."""
    before, after = answers(normal, data.test), answers(separable, data.test)
    different = (before != after).nonzero().flatten()
    shown = different[:MOST_DISAGREEMENTS]
    images = data.test.images.take(shown) if len(shown) else torch.empty(0)
    rows = [
        {
            "image": png.data_uri(image),
            "name": f"test image {index}",
            "label": int(data.test.labels[index]),
            "normal": int(before[index]),
            "separable": int(after[index]),
        }
        for index, image in zip(shown.tolist(), images, strict=True)
    ]
    return {"disagreement_count": len(different), "disagreements": rows}
