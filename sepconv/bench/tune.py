"""``sepconv bench tune``: measure schedules near those of the rules, and keep the faster ones for this machine.

The kernels of a network are timed one by one, on random numbers of the sizes that they get there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sepconv.compile import compile
from sepconv.kernels.backends import BACKENDS
from sepconv.kernels.case import Case, Outline
from sepconv.kernels.halide.jit import code_cache, runtime
from sepconv.kernels.halide.schedule import tuned
from sepconv.kernels.halide.schedule.tuned import Asked
from sepconv.ops.call import forget
from sepconv.system.files import check_folder
from sepconv.system.threads import threads_set_to
from sepconv.system.timing import interleaved

# A schedule must win by this factor, or noise would choose.
MARGIN = 1.03

Ready = tuple[Callable[[], None], Tensor]


@dataclass(frozen=True)
class Tuned:
    """One problem: the time with the usual schedule, and with the best one, which may be the same."""

    kind: str
    size: str
    threads: int
    tried: int
    usual_ms: float
    best_ms: float
    usual: Any
    best: Any


def problems(model: nn.Module, example: Tensor, threads: int) -> dict[str, Asked]:
    """What a compiled network asks schedules for.

    Raises:
        ValueError: Halide's kernels cannot run here.
    """
    if runtime.missing():
        raise ValueError(f"bench tune: {runtime.missing()}")
    forget()
    with threads_set_to(threads), tuned.asking() as found:
        compile(model, example)
    return {key: asked for key, asked in found.items() if asked.case.which == "forward"}


def _maker(case: Case) -> Callable[[], Ready]:
    """Makes the call with the schedule that is then chosen, on random numbers."""
    kernels = [b for b in BACKENDS[case.op] if b.name == "halide" and b.numbers in (None, case.x.dtype)]
    [binder] = [kernel.binder for kernel in kernels if kernel.binder]
    x, out = _random(case.x), Outline.dense(case.result.shape, case.x)
    residual = torch.randn(out.shape) if (case.then or case).residual else None
    first, *others = (case.weight, case.bias) if case.then is None else _weights(case, case.then)
    weights = [None if outline is None else _random(outline) for outline in (first, *others)]

    def make() -> Ready:
        found = binder.plan(case)
        result = _random(out)
        added = None if residual is None else residual.clone(memory_format=out.memory_format)
        return binder.bind(found, x, binder.pack(found, weights), added, result), result

    return make


def _weights(first: Case, then: Case) -> tuple[Outline | None, ...]:
    return first.weight, then.weight, first.bias, then.bias


def _random(outline: Outline) -> Tensor:
    return torch.empty_strided(outline.shape, outline.stride, dtype=outline.dtype).normal_()


def tune(asked: Asked, seconds: float) -> Tuned:
    """Time all schedules of one problem; each has to give what the usual one gives.

    Raises:
        ValueError: a schedule gives something else.
        BuildError: the usual schedule cannot be built.
    """
    case = asked.case
    torch.manual_seed(0)
    with threads_set_to(case.threads):
        make = _maker(case)
        calls: dict[str, Callable[[], None]] = {}
        schedules = {str(i): schedule for i, schedule in enumerate(dict.fromkeys([asked.usual, *asked.others]))}
        expected = None
        for name, schedule in schedules.items():
            try:
                with tuned.trying(case, schedule):
                    call, out = make()
            except runtime.BuildError:
                if schedule == asked.usual:
                    raise
                continue
            out.fill_(torch.nan)  # what a schedule leaves out must not be there from another one
            call()
            expected = out if expected is None else expected
            if not torch.allclose(out, expected, rtol=1e-4, atol=1e-4):
                raise ValueError(f"bench tune: {schedule} of {case} gives another result")
            calls[name] = call
        timings = interleaved(calls, seconds)
    usual = timings["0"].median_ms
    name = min(timings, key=lambda name: timings[name].median_ms)
    if timings[name].median_ms * MARGIN > usual:
        name = "0"
    return Tuned(
        asked.kind,
        "x".join(map(str, case.x.shape)),
        case.threads,
        len(calls),
        usual,
        timings[name].median_ms,
        asked.usual,
        schedules[name],
    )


def run(model: nn.Module, example: Tensor, threads: Sequence[int], seconds: float) -> Iterator[tuple[int, int, Tuned]]:
    """Tune all kernels of a network: number done, number in all, and what came out. Keeps what is faster, one by one.

    Raises:
        ValueError: Halide's kernels cannot run here, nothing is kept on disk, or ``threads`` and ``seconds`` are not
            positive.
        OSError: the table cannot be written.
    """
    if not threads or min(threads) < 1 or not 0 < seconds < math.inf:
        raise ValueError(f"bench tune: threads must be positive, seconds above 0, got {list(threads)} and {seconds}")
    place = tuned.path()
    if place is None:
        raise ValueError(f"bench tune: what is found cannot be kept: {code_cache.VARIABLE} is empty")
    check_folder(place.parent)
    jobs = [(key, asked) for n in threads for key, asked in problems(model, example, n).items()]
    try:
        for done, (key, asked) in enumerate(jobs, 1):
            found = tune(asked, seconds)
            if found.best != found.usual:
                tuned.keep({key: found.best})
            yield done, len(jobs), found
    finally:
        forget()
