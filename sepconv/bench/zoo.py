"""``sepconv bench zoo``: forty networks of timm and torchvision, compiled, against PyTorch and OpenVINO.

A process for each network and thread count, so that one which fails takes no other with it. The first process of a
network starts with no compiled kernel, and says how long it takes to be ready.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sepconv.bench import records
from sepconv.bench.records import Record
from sepconv.bench.zoo_network import Measured
from sepconv.kernels.halide.jit.code_cache import VARIABLE
from sepconv.kernels.halide.schedule.peak import fma_peak_gflops
from sepconv.system import environment

Progress = Callable[[str], None]

PACKAGES = ("timm", "torchvision", "openvino")

SEPARABLE = (
    "timm/mobilenetv1_100", "timm/mobilenetv2_100", "timm/mobilenetv3_large_100", "timm/mobilenetv4_conv_small",
    "timm/efficientnet_b0", "timm/ghostnet_100", "timm/repvit_m0_9", "timm/fastvit_t8", "timm/lcnet_100",
    "timm/mnasnet_100", "timm/rexnet_100", "timm/mixnet_s", "timm/hardcorenas_a",
)  # fmt: skip
"""Made of depthwise separable convolutions: these are measured against OpenVINO too."""

OTHERS = (
    "timm/convnext_tiny", "timm/convnextv2_atto", "timm/edgenext_xx_small", "timm/swiftformer_xs", "timm/mobileone_s0",
    "timm/repghostnet_100", "timm/convmixer_768_32", "timm/dla34", "timm/densenet121", "timm/resnet18",
    "timm/resnet50", "timm/resnext50_32x4d", "timm/regnety_008", "timm/resnetv2_50", "timm/nf_regnet_b0",
    "timm/cspdarknet53", "timm/vgg11_bn", "timm/mobilevit_xxs", "timm/efficientformer_l1", "timm/hgnet_tiny",
    "torchvision/googlenet", "torchvision/squeezenet1_1", "torchvision/shufflenet_v2_x1_0",
    "torchvision/fcn_resnet50", "torchvision/deeplabv3_mobilenet_v3_large",
    "torchvision/lraspp_mobilenet_v3_large", "torchvision/ssdlite320_mobilenet_v3_large",
)  # fmt: skip

NETWORKS = (*SEPARABLE, *OTHERS)


@dataclass(frozen=True)
class Failure:
    """A network that could not be measured, and why."""

    network: str
    threads: int
    reason: str


def run(
    threads: Sequence[int], seconds: float, match: str, path: Path, command: str, progress: Progress
) -> list[Record]:
    """Every network whose name contains ``match``, into one file.

    Raises:
        ValueError: there is no such network, or none could be measured; nothing is written.
    """
    names = [name for name in NETWORKS if match in name]
    if not names:
        raise ValueError(f"bench zoo: there is no network with {match!r}, only {', '.join(NETWORKS)}")
    if not threads or min(threads) < 1 or not 0 < seconds < math.inf:
        raise ValueError(f"bench: threads must be positive, seconds above 0, got {list(threads)} and {seconds}")
    before = {n: fma_peak_gflops(n) for n in threads}
    found = list(_measured(names, threads, seconds, progress))
    peaks = {n: max(before[n], fma_peak_gflops(n)) for n in threads}
    measured = [one for one in found if isinstance(one, Measured)]
    failed = [one for one in found if isinstance(one, Failure)]
    if not measured:
        raise ValueError(f"bench zoo: no network could be measured: {failed[0].reason}")
    more = {
        "networks": [one.facts() for one in measured],
        "failed": [asdict(one) for one in failed],
        "separable": list(SEPARABLE),
        "peer_versions": {name: environment.installed(name) for name in PACKAGES},
    }
    rows = [row for one in measured for row in one.rows()]
    records.write(path, rows, peaks, command, more=more)
    return rows


def _measured(
    names: Sequence[str], threads: Sequence[int], seconds: float, progress: Progress
) -> Iterator[Measured | Failure]:
    for done, name in enumerate(names):
        with tempfile.TemporaryDirectory() as folder:
            for n in threads:
                progress(f"{done}/{len(names)} {name}, threads={n}")
                yield _in_a_process(name, n, seconds, folder)


def _in_a_process(name: str, threads: int, seconds: float, folder: str) -> Measured | Failure:
    """``folder`` holds the kernels that an earlier process of the network compiled."""
    command = [sys.executable, "-m", "sepconv.bench.zoo_network", name, str(threads), str(seconds)]
    if name in SEPARABLE:
        command.append("openvino")
    done = subprocess.run(command, env=os.environ | {VARIABLE: folder}, capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode != 0:
        return Failure(name, threads, (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    content: dict[str, Any] = json.loads(last)
    return Measured.of(content)
