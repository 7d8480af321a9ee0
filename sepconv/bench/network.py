"""``sepconv bench network``: whole MobileNets by sepconv, by PyTorch and by other runtimes.

All get the same network with the same random weights and the same threads. Each is compared with PyTorch in float64
first; then all are called in turn in one process.
"""

from __future__ import annotations

import copy
import gc
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sepconv.bench import footprint, records
from sepconv.bench.footprint import Footprint
from sepconv.bench.peers import CONTENDERS, Network, absent
from sepconv.bench.peers.source import NETWORKS, source_of
from sepconv.bench.records import Record
from sepconv.cost import count
from sepconv.kernels.halide.schedule.peak import fma_peak_gflops
from sepconv.system import environment
from sepconv.system.threads import threads_set_to
from sepconv.system.timing import interleaved

Progress = Callable[[str], None]

BATCHES = (1, 8)
TOLERANCE = 1e-4
"""Largest error allowed, relative to the largest score in float64."""

PACKAGES = ("openvino", "ncnn", "pnnx", "mnn", "executorch")


@dataclass(frozen=True)
class NetworkCase:
    """A network (version, width multiplier, image side) and a batch size."""

    network: str
    batch: int

    @property
    def name(self) -> str:
        return f"{self.network} b{self.batch}"


CASES = tuple(NetworkCase(network, batch) for batch in BATCHES for network in NETWORKS)


@dataclass(frozen=True)
class _Ready:
    """A contender that computed the right scores; ``error`` is relative to the tolerance."""

    call: Callable[[], Any]
    error: float


def _verified(name: str, case: NetworkCase, call: Callable[[], Any], truth: Tensor) -> _Ready:
    found = call()
    scores = found if isinstance(found, Tensor) else torch.as_tensor(np.array(found))
    scores = scores.double().reshape(truth.shape)
    error = float((scores - truth).abs().max() / truth.abs().max() / TOLERANCE)
    if not error <= 1:
        raise ValueError(f"bench network: {name} on {case.name} differs from float64 by {error:.3g} times {TOLERANCE}")
    return _Ready(call, error)


def _truth(source: Network, x: Tensor) -> Tensor:
    scores: Tensor = copy.deepcopy(source.model).double()(x.double())
    return scores


def run_case(
    case: NetworkCase,
    source: Network,
    threads: int,
    names: Sequence[str],
    seconds: float,
    missing: dict[str, str],
) -> Iterator[Record]:
    """Verify all contenders, then time them; who cannot run is entered in ``missing`` with the reason.

    Raises:
        ValueError: a contender computed something else; nothing of the case was timed.
    """
    x = source.images(case.batch)
    cost = count(source.model, (3, source.side, source.side))
    least_bytes = 4 * (cost.params + x.numel() + case.batch * 1000)
    torch._dynamo.reset()
    with threads_set_to(threads), torch.inference_mode():
        truth = _truth(source, x)
        ready = {}
        for name in names:
            if case.batch > 1 and CONTENDERS[name].single:
                continue
            if name not in missing and (call := _built(name, source, x, threads, missing)) is not None:
                ready[name] = _verified(name, case, call, truth)
        timings = interleaved({name: found.call for name, found in ready.items()}, seconds)
    for name, t in timings.items():
        layout = CONTENDERS[name].layout
        yield Record(
            "network", case.name, name, threads, layout, t.median_ms, t.low_ms, t.high_ms, t.samples,
            case.batch * cost.macs, least_bytes, round(ready[name].error, 4), _kernel(name, ready[name].call),
        )  # fmt: skip


def _built(name: str, source: Network, x: Tensor, threads: int, missing: dict[str, str]) -> Callable[[], Any] | None:
    """The call, None where the contender is absent or fails to take the network: a foreign runtime may do so."""
    reason = absent(CONTENDERS[name])
    if not reason:
        try:
            call = CONTENDERS[name].build(source, x, threads)
            call()
            return call
        except Exception as error:
            if not CONTENDERS[name].packages:
                raise
            reason = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    missing[name] = reason
    return None


def _kernel(name: str, call: Any) -> str:
    """What ran, as ``explain`` says; the contender's name where only it knows."""
    if name != "sepconv":
        return name
    return " and ".join(sorted({group.kernel for group in call.func.explain().groups}))


def run(
    threads: Sequence[int],
    seconds: float,
    match: str,
    names: Sequence[str],
    footprints: bool,
    path: Path,
    command: str,
    progress: Progress,
) -> list[Record]:
    """Every case whose name contains ``match``, and the footprints of its networks, into one file.

    Raises:
        ValueError: there is no such case or contender, or a contender computed something else; nothing is written.
    """
    cases = [case for case in CASES if match in case.name]
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown or not cases:
        what = f"contender {unknown[0]!r}, only {', '.join(CONTENDERS)}" if unknown else f"case with {match!r}"
        raise ValueError(f"bench network: there is no {what}")
    if not threads or min(threads) < 1 or not 0 < seconds < math.inf:
        raise ValueError(f"bench: threads must be positive, seconds above 0, got {list(threads)} and {seconds}")
    names = list(names) or list(CONTENDERS)
    missing: dict[str, str] = {}
    peaks = {n: fma_peak_gflops(n) for n in threads}
    with tempfile.TemporaryDirectory() as folder:
        sources = {case.network: source_of(case.network, Path(folder)) for case in cases}
        found: list[Record] = []
        for done, (n, case) in enumerate((n, case) for n in threads for case in cases):
            progress(f"{done}/{len(cases) * len(threads)} {case.name}, threads={n}")
            found += run_case(case, sources[case.network], n, names, seconds, missing)
            gc.collect()
        measured = [] if not footprints else _footprints(sources, max(threads), names, missing, Path(folder), progress)
    peaks = {n: max(peak, fma_peak_gflops(n)) for n, peak in peaks.items()}
    more = {"absent": missing, "footprints": [one.to_dict() for one in measured]}
    more["peer_versions"] = {name: environment.installed(name) for name in PACKAGES}
    records.write(path, found, peaks, command, more=more)
    return found


def _footprints(
    sources: dict[str, Network],
    threads: int,
    names: Sequence[str],
    missing: dict[str, str],
    folder: Path,
    say: Progress,
) -> list[Footprint]:
    """Of MobileNet v1 in full size."""
    found = []
    for network in (network for network in sources if network == NETWORKS[0]):
        weight_bytes = 4 * count(sources[network].model, (3, 224, 224)).params
        for name in (name for name in names if name not in missing):
            say(f"memory and time to be ready: {name}, {network}")
            found.append(footprint.measure(network, name, threads, weight_bytes, folder))
    return found
