"""``sepconv bench network``: whole MobileNets by sepconv, by PyTorch and by other runtimes.

All get the same network with the same random weights and the same threads. Each is compared with PyTorch in float64
first; then all of one precision are called in turn in one process.

Integers need to know the ranges of activations: every contender finds them on the same images, by its own tool. Noise
of every size stands for photographs, and statistics of batch norms are as such images have them, so that random weights
neither overflow nor fade.
"""

from __future__ import annotations

import copy
import gc
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sepconv.bench import footprint, records
from sepconv.bench.agreement import TOLERANCES, Agreement, on_held_out, relative_error
from sepconv.bench.footprint import Footprint
from sepconv.bench.peers import BY_PRECISION, PRECISIONS, Contender, Network, absent
from sepconv.bench.peers.source import NETWORKS, source_of
from sepconv.bench.records import Record
from sepconv.cost import count
from sepconv.kernels.halide.schedule.peak import fma_peak_gflops
from sepconv.system import environment
from sepconv.system.threads import threads_set_to
from sepconv.system.timing import interleaved

Progress = Callable[[str], None]

BATCHES = (1, 8)
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
PACKAGES = ("openvino", "nncf", "ncnn", "pnnx", "mnn", "executorch", "torchao")


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
    """A contender that computes the network."""

    contender: Contender
    call: Callable[[], Any]
    agreement: Agreement


def _verified(contender: Contender, case: NetworkCase, call: Callable[[], Any], truth: Tensor) -> float:
    """The error in units of the tolerance; of others in fewer bits than float32 it may be any."""
    tolerance = TOLERANCES[contender.precision]
    error = relative_error(call, truth) / tolerance
    if not error <= 1 and (contender.ours or contender.precision == "float32"):
        name = contender.title
        raise ValueError(f"bench network: {name} on {case.name} differs from float64 by {error:.3g} times {tolerance}")
    return error


def _truth(source: Network, x: Tensor) -> Tensor:
    scores: Tensor = copy.deepcopy(source.model).double()(x.double())
    return scores


def run_case(
    case: NetworkCase,
    source: Network,
    threads: int,
    contenders: Sequence[Contender],
    seconds: float,
    missing: dict[str, str],
) -> Iterator[Record]:
    """Verify all contenders, then time them; who cannot run is entered in ``missing`` with the reason.

    Raises:
        ValueError: a contender computed something else; nothing of the case was timed.
    """
    x = source.images(case.batch)
    layouts = {"nchw": x, "nhwc": x.contiguous(memory_format=torch.channels_last)}
    cost = count(source.model, (3, source.side, source.side))
    torch._dynamo.reset()
    with threads_set_to(threads), torch.inference_mode():
        truth, images = _truth(source, x), source.held_out()
        ready = {}
        for one in sorted(contenders, key=lambda one: one.by_dynamo):
            if (case.batch > 1 and one.single) or not {one.title, _failing(one, source)}.isdisjoint(missing):
                continue
            call = _built(one, source, layouts[one.layout], threads, missing)
            if call is not None:
                error = _verified(one, case, call, truth)
                answers = on_held_out(call, layouts[one.layout], images, source.scores)
                ready[one.title] = _Ready(one, call, Agreement(error, *answers))
        timings = interleaved({name: found.call for name, found in ready.items()}, seconds)
    for name, t in timings.items():
        one, found = ready[name].contender, ready[name].agreement
        least_bytes = WEIGHT_BYTES[one.precision] * cost.params + 4 * (x.numel() + case.batch * 1000)
        yield Record(
            "network", case.name, one.name, threads, one.layout, t.median_ms, t.low_ms, t.high_ms, t.samples,
            case.batch * cost.macs, least_bytes, round(found.error, 4), _kernel(one, ready[name].call),
            precision=one.precision, top1=round(found.top1, 4), relative_error=float(f"{found.relative_error:.3g}"),
        )  # fmt: skip


def _built(
    contender: Contender, source: Network, x: Tensor, threads: int, missing: dict[str, str]
) -> Callable[[], Any] | None:
    """The call, None where the contender is absent or fails to take the network: a foreign runtime may do so."""
    reason = absent(contender)
    if reason:
        missing[contender.title] = reason
        return None
    try:
        call = contender.build(source, x, threads)
        call()
        return call
    except Exception as error:
        if not contender.packages:
            raise
        said = " ".join(str(error).split("\n\n")[0].split())
        missing[_failing(contender, source)] = f"failed: {type(error).__name__}: {said}"
        return None


def _failing(contender: Contender, source: Network) -> str:
    """What stands among the absent for a contender that cannot run one network."""
    return f"{contender.title} on {source.name}"


def _kernel(contender: Contender, call: Any) -> str:
    """What ran, as ``explain`` says; the contender's name where only it knows."""
    if contender.name != "sepconv":
        return contender.name
    return " and ".join(sorted({group.kernel for group in call.func.explain().groups}))


def _chosen(names: Sequence[str], precisions: Sequence[str]) -> dict[str, list[Contender]]:
    """Contenders by precision: those of these names, all where there are none."""
    if not precisions or not set(precisions) <= set(PRECISIONS):
        raise ValueError(
            f"bench network: precisions are {', '.join(PRECISIONS)}, got {', '.join(precisions) or 'none'}"
        )
    known = dict.fromkeys(name for precision in precisions for name in BY_PRECISION[precision])
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"bench network: there is no contender {unknown[0]!r}, only {', '.join(known)}")
    return {
        precision: [one for name, one in BY_PRECISION[precision].items() if not names or name in names]
        for precision in dict.fromkeys(precisions)
    }


def run(
    threads: Sequence[int],
    seconds: float,
    match: str,
    names: Sequence[str],
    precisions: Sequence[str],
    footprints: bool,
    path: Path,
    command: str,
    progress: Progress,
) -> list[Record]:
    """Every case whose name contains ``match`` in every precision, and the footprints of its networks, into one file.

    Raises:
        ValueError: there is no such case or contender, or a contender computed something else; nothing is written.
    """
    cases, chosen = [case for case in CASES if match in case.name], _chosen(names, precisions)
    if not cases:
        raise ValueError(f"bench network: there is no case with {match!r}")
    if not threads or min(threads) < 1 or not 0 < seconds < math.inf:
        raise ValueError(f"bench: threads must be positive, seconds above 0, got {list(threads)} and {seconds}")
    missing: dict[str, str] = {}
    peaks = {n: fma_peak_gflops(n) for n in threads}
    with tempfile.TemporaryDirectory() as folder:
        sources = {case.network: source_of(case.network, Path(folder)) for case in cases}
        found: list[Record] = []
        jobs = list(product(threads, cases, chosen))
        for done, (n, case, precision) in enumerate(jobs):
            progress(f"{done}/{len(jobs)} {case.name} in {precision}, threads={n}")
            found += run_case(case, sources[case.network], n, chosen[precision], seconds, missing)
            gc.collect()
        present = [one for of in chosen.values() for one in of if one.title not in missing]
        measured = (
            [] if not footprints else _footprints(sources, max(threads), present, missing, Path(folder), progress)
        )
    peaks = {n: max(peak, fma_peak_gflops(n)) for n, peak in peaks.items()}
    more = {"absent": missing, "footprints": [one.to_dict() for one in measured]}
    more["peer_versions"] = {name: environment.installed(name) for name in PACKAGES}
    records.write(path, found, peaks, command, more=more)
    return found


def _footprints(
    sources: dict[str, Network],
    threads: int,
    contenders: Sequence[Contender],
    missing: Collection[str],
    folder: Path,
    say: Progress,
) -> list[Footprint]:
    """Of MobileNet v1 in full size."""
    found = []
    for network in (network for network in sources if network == NETWORKS[0]):
        params = count(sources[network].model, (3, 224, 224)).params
        for one in (one for one in contenders if _failing(one, sources[network]) not in missing):
            say(f"memory and time to be ready: {one.title}, {network}")
            found.append(footprint.measure(network, one, threads, WEIGHT_BYTES[one.precision] * params, folder))
    return found
