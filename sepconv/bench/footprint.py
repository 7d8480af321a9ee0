"""How long a contender takes to be ready and how much memory it needs, each in a process of its own.

Cold is the first process with empty caches on disk, warm the second. Memory is what the process holds at most while the
network runs (resident, after unused memory was handed back), less the same for a network of one small layer: so the
interpreter and the libraries do not count, but weights, activations and generated code do.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sepconv.bench.peers import BY_PRECISION, Contender, Network
from sepconv.bench.peers.source import source_of
from sepconv.kernels.halide.jit.code_cache import VARIABLE
from sepconv.system.threads import threads_set_to

_RUNS = 5
_PROCESS = Path("/proc/self")
_LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
SMALL = "small"


@dataclass(frozen=True)
class Footprint:
    """One contender on one network.

    Attributes:
        cold_s, warm_s: from the network (a module in memory, or a file in the runtime's own format) to the first
            scores, libraries imported before.
        memory_bytes: see above; None where the system does not tell.
    """

    network: str
    contender: str
    threads: int
    weight_bytes: int
    cold_s: float
    warm_s: float
    memory_bytes: int | None
    precision: str = "float32"

    def to_dict(self) -> dict[str, Any]:
        over = None if self.memory_bytes is None else self.memory_bytes - self.weight_bytes
        return {**asdict(self), "over_weights_bytes": over}


def small_network() -> nn.Module:
    """One convolution and a classifier."""
    layers = (nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8)).eval()


def measure(network: str, contender: Contender, threads: int, weight_bytes: int, folder: Path) -> Footprint:
    """Two processes for the small network, and two for the network of that name (see ``source.NETWORKS``).

    The first of each fills caches and makes files that the second one only reads; memory is that of the second ones.

    Raises:
        ValueError: a process failed.
    """
    with tempfile.TemporaryDirectory() as empty:
        environment = {
            VARIABLE: empty,
            "XDG_CACHE_HOME": empty,
            "TORCHINDUCTOR_CACHE_DIR": str(Path(empty, "inductor")),
        }
        run = partial(_in_a_process, contender=contender, threads=threads, folder=folder)
        _, small, cold, warm = (run(name, environment=environment) for name in (SMALL, SMALL, network, network))
    memory = None if warm["memory"] is None else warm["memory"] - small["memory"]
    times = cold["ready_s"], warm["ready_s"]
    return Footprint(network, contender.name, threads, weight_bytes, *times, memory, contender.precision)


def _in_a_process(
    network: str, contender: Contender, threads: int, folder: Path, environment: dict[str, str]
) -> dict[str, Any]:
    given = (network, contender.precision, contender.name, str(threads), str(folder))
    command = [sys.executable, "-m", "sepconv.bench.footprint", *given]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(
            f"bench network: {contender.title} on {network} failed: {done.stderr.strip().splitlines()[-1:]}"
        )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _run_once(source: Network, chosen: Contender, threads: int) -> dict[str, Any]:
    """What one process measures; the network's module is let go once the contender is ready."""
    for module in chosen.modules:
        importlib.import_module(module)
    x = source.images(1).contiguous(memory_format=_LAYOUTS[chosen.layout])
    if chosen.of_module:
        # Made before the clock starts, and not held by a name here.
        getattr(source, "quantized" if chosen.ours and chosen.precision == "int8" else "model")
    with threads_set_to(threads), torch.inference_mode():
        start = time.perf_counter()
        call = chosen.build(source, x, threads)
        call()
        ready = time.perf_counter() - start
        source.forget()
        return {"ready_s": round(ready, 3), "memory": _peak_memory(call)}


def _peak_memory(call: Any) -> int | None:
    """Most resident bytes of this process during some calls, None where the system does not tell."""
    call()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is None or not (_PROCESS / "clear_refs").exists():
        return None
    trim(0)
    (_PROCESS / "clear_refs").write_text("5")  # forget the peak so far
    for _ in range(_RUNS):
        call()
    line = next(line for line in (_PROCESS / "status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main(network: str, precision: str, contender: str, threads: str, folder: str) -> None:
    source = Network(SMALL, small_network, 16, Path(folder)) if network == SMALL else source_of(network, Path(folder))
    print(json.dumps(_run_once(source, BY_PRECISION[precision][contender], int(threads))))


if __name__ == "__main__":
    main(*sys.argv[1:])
