"""``sepconv bench training``: one optimizer step of whole networks, by our layers and by PyTorch's in both layouts.

All contenders have the same network with the same random weights. Loss and gradients of each are compared with those of
PyTorch in float64 first; then all take steps in turn in one process. The memory of each is measured in a process of its
own (``training_memory``).
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

import torch

from sepconv.bench import records, training_memory
from sepconv.bench.records import Record
from sepconv.bench.trained import CASES, TrainingCase, in_pytorch
from sepconv.bench.trainee import PARTS, Trainee, trainee
from sepconv.cost import count
from sepconv.kernels.halide.schedule.peak import fma_peak_gflops
from sepconv.ops.explain import record
from sepconv.system.threads import threads_set_to
from sepconv.system.timing import Timing, in_turn, summary

Progress = Callable[[str], None]

CONTENDERS = ("sepconv", "torch-nhwc", "torch-nchw", "torch.compile")
PRECISIONS = ("float32", "bfloat16")
_FEWEST, _MOST = 5, 100
# Of the gradients, as a multiple of PyTorch's own error: sums in another order err in another direction.
_TIMES_PYTORCHS = 4
_ROUNDING = 1e-5


def _errors(case: TrainingCase, ready: Mapping[str, Trainee]) -> dict[str, float]:
    """Of loss and gradients against float64, relative to their size.

    Raises:
        ValueError: ours err more than a few times what PyTorch's do.
    """
    images = case.images().double()
    truth = Trainee(in_pytorch(case.model()).double(), images, "float64").gradients()
    found = {name: float((copy_of(one).gradients() - truth).norm() / truth.norm()) for name, one in ready.items()}
    plain = [error for name, error in found.items() if name.startswith("torch-")]
    allowed = _TIMES_PYTORCHS * max(plain, default=0.0) + _ROUNDING
    if "sepconv" in found and plain and not found["sepconv"] <= allowed:
        raise ValueError(f"bench training: sepconv on {case.name} errs by {found['sepconv']:.3g}, PyTorch {max(plain)}")
    return found


def copy_of(one: Trainee) -> Trainee:
    """With the same weights and fresh statistics; what is compiled is tried itself."""
    compiled = hasattr(one.model, "_orig_mod")
    return Trainee(one.model if compiled else copy.deepcopy(one.model), one.images, one.precision)


def run_case(
    case: TrainingCase, threads: int, precision: str, names: Sequence[str], time_s: float, missing: dict[str, str]
) -> Iterator[Record]:
    """Verify all contenders, then time their steps; who cannot run is entered in ``missing`` with the reason.

    Raises:
        ValueError: a contender computed something else; nothing of the case was timed.
    """
    torch._dynamo.reset()
    with threads_set_to(threads):
        ready = {name: trainee(case, name, precision) for name in names if name != "torch.compile"}
        if "torch.compile" in names:
            compiled = _compiled(case, precision, _better(ready), missing)
            ready |= {} if compiled is None else {"torch.compile": compiled}
        errors = _errors(case, ready)
        kernels = {name: _kernels(one) if name == "sepconv" else name for name, one in ready.items()}
        times = _timed(ready, time_s)
    macs = count(in_pytorch(case.model()).eval(), tuple(case.images().shape[1:])).macs
    for name, t in times.items():
        one = ready[name]
        parts = {f"{part}_ms": summary([1e3 * s for s in one.parts[part]]).median_ms for part in PARTS}
        weights = sum(p.numel() for p in one.model.parameters())
        yield Record(
            "training", case.name, name.removesuffix("-nhwc").removesuffix("-nchw"), threads, _layout(one),
            t.median_ms, t.low_ms, t.high_ms, t.samples, 3 * case.batch * macs, 4 * (2 * weights + one.images.numel()),
            float(f"{errors[name]:.3g}"), kernels[name], "step", precision,
            images_per_second=round(1e3 * case.batch / t.median_ms, 1), **parts,
        )  # fmt: skip


def _layout(one: Trainee) -> str:
    return "nchw" if one.images.is_contiguous() else "nhwc"


def _timed(ready: Mapping[str, Trainee], time_s: float) -> dict[str, Timing]:
    for one in ready.values():
        for _ in range(2):
            one.step()
        for taken in one.parts.values():
            taken.clear()
    calls = {name: one.step for name, one in ready.items()}
    times = in_turn(calls, _MOST, fewest=_FEWEST, budget=time_s, sample=lambda name, call: ready[name].step())
    return {name: summary([1e3 * s for s in found]) for name, found in times.items()}


def _better(ready: Mapping[str, Trainee]) -> str:
    """PyTorch's layout that takes less time, by a few steps."""
    plain = {name: copy_of(one) for name, one in ready.items() if name.startswith("torch-")}
    if not plain:
        return "torch-nhwc"
    fastest = {name: min(one.step() for _ in range(4)) for name, one in plain.items()}
    return min(fastest, key=lambda name: fastest[name])


def _compiled(case: TrainingCase, precision: str, better: str, missing: dict[str, str]) -> Trainee | None:
    """None where its compiler is missing or fails."""
    one = trainee(case, "torch.compile", precision, better)
    try:
        one.gradients()
        return one
    except Exception as error:  # a foreign compiler may fail in any way
        lines = str(error).strip().splitlines() or [""]
        missing[f"torch.compile, {case.name} in {precision}"] = f"{type(error).__name__}: {lines[0]}"
        return None


def _kernels(one: Trainee) -> str:
    """How many passes of stages our kernels computed, of all convolutions and norms; the reasons of the others."""
    with record() as choices:
        copy_of(one).gradients()
    ours = sum(choice.kernel == "halide" for choice in choices)
    return f"halide in {ours} of {len(choices)} passes"


def run(
    threads: Sequence[int],
    time_s: float,
    match: str,
    names: Sequence[str],
    precisions: Sequence[str],
    memory: bool,
    path: Path,
    command: str,
    progress: Progress,
) -> list[Record]:
    """Every case whose name contains ``match``, in every precision and with every number of threads, into one file.

    Raises:
        ValueError: there is no such case, contender or precision, or ours computed something else; nothing is written.
    """
    cases = [case for case in CASES if match in case.name]
    if not cases:
        raise ValueError(f"bench training: there is no case with {match!r}, only {', '.join(c.name for c in CASES)}")
    for kind, given, known in (("contender", names, CONTENDERS), ("precision", precisions, PRECISIONS)):
        unknown = [one for one in given if one not in known]
        if unknown:
            raise ValueError(f"bench training: there is no {kind} {unknown[0]!r}, only {', '.join(known)}")
    if not threads or min(threads) < 1 or not 0 < time_s < math.inf or not precisions:
        raise ValueError(f"bench: threads must be positive, seconds above 0, got {list(threads)} and {time_s}")
    chosen = [name for name in CONTENDERS if not names or name in names]
    missing: dict[str, str] = {}
    peaks = {n: fma_peak_gflops(n) for n in threads}
    found: list[Record] = []
    jobs = list(product(threads, cases, precisions))
    for done, (n, case, precision) in enumerate(jobs):
        progress(f"{done}/{len(jobs)} {case.name} in {precision}, threads={n}")
        found += run_case(case, n, precision, chosen, time_s, missing)
        gc.collect()
    peaks = {n: max(peak, fma_peak_gflops(n)) for n, peak in peaks.items()}
    held = training_memory.measure(found, max(threads), progress) if memory else []
    records.write(path, found, peaks, command, more={"absent": missing, "memory": held})
    return found
