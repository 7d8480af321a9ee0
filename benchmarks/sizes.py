"""`python -m benchmarks.sizes`: 300 images of 300 sizes through MobileNet v1 0.5, by our layers and by PyTorch's.

As in detection or progressive resizing, where hardly a size comes twice. Each run is a process of its own: the first
with no kernel on disk, the second with those that the first has left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from torch import nn

from benchmarks.record import save, stamped
from sepconv.kernels.halide.jit import code_cache
from sepconv.models import MobileNetV1

NAME = "sizes"
COUNT, SMALLEST, LARGEST = 300, 224, 448


def sizes() -> list[tuple[int, int]]:
    """Height and width, none twice."""
    choose = random.Random(0)
    found: dict[tuple[int, int], None] = {}
    while len(found) < COUNT:
        found[choose.randint(SMALLEST, LARGEST), choose.randint(SMALLEST, LARGEST)] = None
    return list(found)


def plain(module: nn.Module) -> nn.Module:
    """The same network of `nn.Conv2d`."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and type(child) is not nn.Conv2d:
            conv = nn.Conv2d(
                child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding, child.dilation,
                child.groups, child.bias is not None,
            )  # fmt: skip
            conv.load_state_dict(child.state_dict())
            setattr(module, name, conv)
        else:
            plain(child)
    return module


def stream(threads: int) -> dict[str, float]:
    """Seconds of all images, in turn by both networks; both in channels_last."""
    torch.set_num_threads(threads)
    networks = {}
    for name in ("sepconv", "torch"):
        torch.manual_seed(0)
        model = MobileNetV1(0.5).eval()
        networks[name] = (model if name == "sepconv" else plain(model)).to(memory_format=torch.channels_last)
    seconds = dict.fromkeys(networks, 0.0)
    for height, width in sizes():
        x = torch.randn(1, 3, height, width).contiguous(memory_format=torch.channels_last)
        results = []
        for name, model in networks.items():
            begin = time.perf_counter()
            with torch.no_grad():
                results.append(model(x))
            seconds[name] += time.perf_counter() - begin
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    return seconds


def measure(threads: int, folder: str, kernels: str) -> dict[str, Any]:
    """One process."""
    command = [sys.executable, "-m", "benchmarks.sizes", "--stream", str(threads)]
    variables = os.environ | {code_cache.VARIABLE: folder}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    seconds = json.loads(done.stdout.splitlines()[-1])
    ratio = round(seconds["sepconv"] / seconds["torch"], 3)
    return {"threads": threads, "kernels": kernels, "seconds": seconds, "over_torch": ratio}


def table(record: dict[str, Any]) -> str:
    lines = ["| threads | kernels | sepconv, s | torch, s | sepconv / torch |", "| --- | --- | ---: | ---: | ---: |"]
    for row in record["rows"]:
        ours, theirs = row["seconds"]["sepconv"], row["seconds"]["torch"]
        lines.append(
            f"| {row['threads']} | {row['kernels']} | {ours:.2f} | {theirs:.2f} | **{row['over_torch']:.2f}** |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sizes", description=__doc__)
    parser.add_argument("--stream", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stream:
        print(json.dumps({name: round(value, 3) for name, value in stream(options.stream).items()}))
        return
    rows = []
    for threads in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            rows += [measure(threads, folder, kernels) for kernels in ("compiled meanwhile", "on disk")]
    record = stamped(
        command="python -m benchmarks.sizes",
        network="mobilenet_v1, width 0.5, channels_last",
        sizes=[SMALLEST, LARGEST, COUNT],
        rows=rows,
    )
    save(NAME, record)
    print(table(record))


if __name__ == "__main__":
    main()
