"""`python -m benchmarks.conversion_cost NETWORK ...`: what a conversion costs, and how far it is from the original.

Each network is converted in a process of its own: processor seconds, the highest memory in use, and the squared error
of the outputs, relative to their variance, on images that the conversion has not seen. Networks have random weights,
with batch norms that have seen such images; images are random with the spectrum of natural ones. Those of torchvision
need it installed. Rows of networks that are not asked for stay in the record.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.record import path, read, save, stamped
from sepconv import convert, count
from sepconv.models import create

NAME = "conversion_cost"
TEST_IMAGES = 64
BATCH = 16
ROUNDING = 1 + 1e-9


def torchvision(name: str) -> nn.Module:
    # Its compiled operators are missing where it was built for another PyTorch, but it must know of this one.
    with contextlib.suppress(RuntimeError):
        torch.library.Library("torchvision", "DEF").define("nms(Tensor a, Tensor b, float c) -> Tensor")
    model: nn.Module = getattr(importlib.import_module("torchvision.models"), name)(weights=None)
    return model


def stack(depth: int, width: int = 128) -> nn.Module:
    """So many convolutions of equal width on a quarter of the pixels."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 4)]
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(torchvision, name) for name in ("resnet18", "resnet50", "vgg16")},
    **{f"stack{depth}": partial(stack, depth) for depth in (4, 8, 16)},
    **{name: partial(create, name) for name in ("resnet_quick", "vgg_quick")},
}


BUDGETS = {"resnet50": 0.6}
"""In the place of an eighth: half of its weights are in 1x1 convolutions, which stay."""


def images(count: int, size: int, seed: int) -> Tensor:
    """Noise of every scale, the coarser the stronger, with channels that hang together; each value has variance 1."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, 3, size, size)
    cells = 2
    while cells < size:
        noise = torch.randn(count, 3, cells, cells, generator=generator) + torch.randn(
            count, 1, cells, cells, generator=generator
        )
        total += F.interpolate(noise, size=(size, size), mode="bilinear") / cells**0.5
        cells *= 2
    return total / total.std()


def network(name: str, size: int) -> nn.Module:
    """With random weights, and batch norms of random scale that have seen images."""
    torch.manual_seed(0)
    model = NETWORKS[name]().train()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = None
        nn.init.uniform_(norm.weight, 0.5, 1.2)
        nn.init.normal_(norm.bias, 0, 0.1)
    with torch.no_grad():
        for batch in images(2 * BATCH, size, 2).split(BATCH) if norms else []:
            model(batch)
    return model.eval()


def output_error(old: nn.Module, new: nn.Module, test: Tensor) -> float:
    with torch.no_grad():
        wanted, given = (torch.cat([model(x) for x in test.split(BATCH)]).double() for model in (old, new))
    return float((wanted - given).square().sum() / (wanted - wanted.mean(0)).square().sum())


def digests(model: nn.Module) -> dict[str, bytes]:
    """A hash of each tensor, which takes no memory as a copy would."""
    tensors = model.state_dict().items()
    return {key: hashlib.sha256(value.flatten().numpy().data).digest() for key, value in tensors}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """In this process, which should have done nothing before."""
    torch.set_num_threads(options.threads)
    model, x = network(options.network[0], options.size), images(options.images, options.size, 0)
    state = digests(model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    new, plan = convert(model, x, options.budget, form=options.form)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert digests(model) == state
    shape = (3, options.size, options.size)
    left = count(new, shape).conv_params / count(model, shape).conv_params
    assert left <= options.budget * ROUNDING, f"{left} of the weights are left, the budget is {options.budget}"
    error = output_error(model, new, images(TEST_IMAGES, options.size, 1))
    return {
        **{key: getattr(options, key) for key in ("form", "size", "images", "budget", "threads")},
        "network": options.network[0],
        "cpu_seconds": round(cpu_seconds, 1),
        "seconds": round(seconds, 1),
        "peak_mb": round(peak / 1024),
        "peak_before_mb": round(before / 1024),
        "output_error": round(error, 6),
        "plan_output_error": round(plan.stages[-1]["output_error"], 6),
        "conv_params_left": round(left, 6),
        "ranks": {row.name: row.rank for row in plan.layers},
    }


def measured_apart(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """In a fresh process."""
    command = [sys.executable, __file__, "--here", name]
    for key in ("form", "size", "images", "budget", "threads"):
        command += [f"--{key}", str(getattr(options, key))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What two rows have in common if one takes the other's place."""
    return tuple(row[key] for key in ("network", "form", "size", "images", "budget", "threads"))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| network | form | pixels | images | budget | core-minutes | peak, GB | output error | in the plan |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['network']} | {row['form']} | {row['size']} | {row['images']} | {row['budget']:g} | "
            f"{row['cpu_seconds'] / 60:.1f} | {row['peak_mb'] / 1000:.1f} | {row['output_error']:.4f} | "
            f"{row['plan_output_error']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversion_cost", description=__doc__)
    parser.add_argument("network", nargs="+", choices=NETWORKS)
    parser.add_argument("--form", default="bottleneck", choices=["bottleneck", "separable"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--budget", type=float, help="an eighth, for ResNet-50 0.6, unless given")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="print rows, and leave the record as it is")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options)))
        return
    rows = {identity(row): row for row in (read(NAME)["rows"] if path(NAME).exists() else [])}
    for name in options.network:
        budget = options.budget or BUDGETS.get(name, 1 / 8)
        row = measured_apart(name, argparse.Namespace(**{**vars(options), "budget": budget}))
        rows[identity(row)] = row
        print(json.dumps(row) if options.dry else table([row]), flush=True)
        if not options.dry:
            save(NAME, stamped(command="python -m benchmarks.conversion_cost NETWORK ...", rows=list(rows.values())))


if __name__ == "__main__":
    main()
