"""`python -m benchmarks.published`: convert every network at every budget that has no record yet."""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import record
from benchmarks.published.networks import Published, networks
from benchmarks.published.rivals import RIVALS, replaced
from sepconv.bench.records import commit
from sepconv.compile import compile
from sepconv.convert import convert
from sepconv.convert.forms import FORMS
from sepconv.cost import count
from sepconv.system import environment
from sepconv.system.allocator import keep_freed_memory
from sepconv.system.threads import threads_set_to
from sepconv.system.timing import interleaved
from sepconv.train import Recipe, train

BUDGETS = {"1-2": 1 / 2, "1-4": 1 / 4, "1-8": 1 / 8}
THREADS = 1
SECONDS = 4.0


EPOCHS, BATCH = 10, 16
DISTILLED = "bottleneck, distilled"
"""Afterwards the outputs are learned from the original's, on the images of the calibration."""


def name_of(network: str, form: str, budget: str) -> str:
    return f"published-{network}-{form.replace(', ', '-').lower()}-{budget}"


@torch.inference_mode()
def relative_error(original: nn.Module, converted: nn.Module, inputs: Tensor) -> float:
    """Mean squared difference of the outputs over the original's variance."""
    pairs = [(original(part), converted(part)) for part in inputs.split(16)]
    truth, found = (torch.cat(parts).double() for parts in zip(*pairs, strict=True))
    return float((found - truth).square().mean() / (truth - truth.mean()).square().mean())


def run(network: Published, form: str, budget: float) -> dict[str, Any]:
    """Convert without labels; what is left on inputs that took no part.

    A rival gets as many weights in each layer as the bottleneck has there.
    """
    model = network.make()
    calibration, test = network.calibration(), network.test()
    start = _cpu_seconds()
    converted, plan = convert(model, calibration, budget, form=form if form in FORMS else "bottleneck")
    if form in RIVALS:
        start = _cpu_seconds()
        converted = replaced(model, calibration, {row.name: row.weights_after for row in plan.converted}, RIVALS[form])
    if form == DISTILLED:
        recipe = Recipe(epochs=EPOCHS, optimizer="adamw", lr=0.001)
        train(converted, DataLoader(calibration, BATCH, shuffle=True), recipe, teacher=model)  # type: ignore[arg-type]
    spent = _cpu_seconds() - start
    shape = tuple(test.shape[1:])
    return {
        "title": network.title,
        "package": f"{network.package} {environment.installed(network.package)}",
        "form": form,
        "budget": budget,
        "inputs": list(calibration.shape),
        "core_seconds": round(spent, 1),
        "relative_error": relative_error(model, converted, test),
        "unit": network.unit,
        "original": {"score": network.score(model), **_costs(model, shape)},
        "converted": {"score": network.score(converted), **_costs(converted, shape)},
        "ms": _times({"original": model, "converted": converted}, test[:1]),
        "threads": THREADS,
        "commit": commit(),
        "layers": [[layer.name, layer.rank, layer.reason] for layer in plan.layers],
    }


def _costs(model: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    found = count(model, shape)
    return {"conv_params": found.conv_params, "params": found.params, "bytes": 4 * found.params, "macs": found.macs}


@torch.inference_mode()
def _times(models: dict[str, nn.Module], x: Tensor) -> dict[str, float]:
    """Of one input: each by PyTorch in its better layout and by ``sepconv.compile``, in turn."""
    last = torch.channels_last
    calls: dict[str, Callable[[], object]] = {}
    with threads_set_to(THREADS):
        for name, model in models.items():
            compiled = compile(model, x)
            calls[f"{name}, sepconv"] = lambda compiled=compiled: compiled(x)
            calls[f"{name}, torch-nchw"] = lambda model=model: model(x)
            if x.dim() == 4:
                nhwc, image = _copy(model).to(memory_format=last), x.contiguous(memory_format=last)  # type: ignore[call-overload]
                calls[f"{name}, torch-nhwc"] = lambda nhwc=nhwc, image=image: nhwc(image)
        timings = interleaved(calls, SECONDS)
    return {name: timing.median_ms for name, timing in timings.items()}


def _copy(model: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(model)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published", description=__doc__)
    parser.add_argument("names", nargs="*", help="beginnings of names of networks (default: all)")
    parser.add_argument("--cifar10", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("--budget", choices=BUDGETS, nargs="*", default=list(BUDGETS), help="parts of the weights")
    parser.add_argument("--threads", type=int, default=1, help="for the conversions; times are of one thread")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    found = [
        (name, network)
        for name, network in networks(options.cifar10)
        if not options.names or name.startswith(tuple(options.names))
    ]
    for (name, network), budget, form in product(found, options.budget, (*FORMS, DISTILLED, *RIVALS)):
        title = name_of(name, form, budget)
        if record.path(title).exists():
            continue
        begin = time.perf_counter()
        try:
            result = run(network, form, BUDGETS[budget])
        except ValueError as error:
            if "cannot be reached" not in str(error):
                raise
            print(f"{title}: {error}", flush=True)
            continue
        record.save(title, record.stamped(**result))
        new, old = result["converted"]["score"], result["original"]["score"]
        print(
            f"{title}: {old:.4g} -> {new:.4g} {network.unit}, error {result['relative_error']:.3g}, "
            f"{time.perf_counter() - begin:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
