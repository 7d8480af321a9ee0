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
from sepconv.kernels.halide.conv import depthwise, depthwise_plan, pointwise, separable
from sepconv.kernels.halide.conv.depthwise_plan import Problem
from sepconv.kernels.halide.jit import code_cache, runtime
from sepconv.kernels.halide.schedule import tuned
from sepconv.kernels.halide.schedule.tuned import Asked
from sepconv.kernels.layout import new_output
from sepconv.system.files import check_folder
from sepconv.system.threads import threads_set_to
from sepconv.system.timing import interleaved

# A schedule must win by this factor, or noise would choose.
MARGIN = 1.03
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}

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
    _forget_plans()
    with threads_set_to(threads), tuned.asking() as found:
        compile(model, example)
    return {key: asked for key, asked in found.items() if asked.kind != "depthwise" or asked.problem[0] == "forward"}


def _forget_plans() -> None:
    for plan in (separable.plan, pointwise.plan_strided, depthwise_plan.plan):
        plan.cache_clear()


def _random(shape: Sequence[int], channels_last: bool) -> Tensor:
    x = torch.randn(tuple(shape))
    return x.contiguous(memory_format=_FORMATS[x.dim()]) if channels_last and x.dim() in _FORMATS else x


def _separable(problem: tuple[Any, ...]) -> Callable[[], Ready]:
    shape, weight_shape, out_channels, _, _, _, _, residual, _ = problem
    x, weight = _random(shape, True), torch.randn(weight_shape)
    second = torch.randn(out_channels, weight_shape[0], 1, 1)

    def make() -> Ready:
        found = separable.plan.__wrapped__(*problem)
        out = _random((shape[0], out_channels, *found.size), True)
        packed = separable.pack(found, weight, None, second, None)
        return separable.bind(found, x, packed, out.clone() if residual else None, out), out

    return make


def _pointwise(problem: tuple[Any, ...]) -> Callable[[], Ready]:
    shape, stride, _, out_channels, _, residual, _ = problem
    x = torch.empty_strided(shape, stride).normal_()
    weight = torch.randn(out_channels, shape[1], *[1] * (len(shape) - 2))

    def make() -> Ready:
        found = pointwise.plan_strided.__wrapped__(*problem)
        assert found is not None  # a plan was found for it before
        out = new_output(x, out_channels, shape[2:])
        added = torch.zeros_like(out) if residual else None
        return pointwise.bind(found, x, pointwise.pack(found, weight, None), added, out), out

    return make


def _depthwise(problem: tuple[Any, ...]) -> Callable[[], Ready]:
    p, threads = Problem(*problem[:-1]), problem[-1]

    def sizes(values: Sequence[int]) -> tuple[int, ...]:
        return tuple(values[: p.dims][::-1])

    filters = p.channels * p.multiplier
    x = _random((p.batch, p.channels, *sizes(p.image)), p.channels_last)
    weight = torch.randn(filters, 1, *sizes(p.kernel))
    bias = torch.randn(filters) if p.bias else None

    def make() -> Ready:
        chosen = depthwise_plan.plan.__wrapped__(p, threads)
        out = _random((p.batch, filters, *sizes(p.output)), p.channels_last)
        return depthwise.bind_plan(chosen, p, x, weight, bias, out), out

    return make


_MAKERS: dict[str, Callable[[tuple[Any, ...]], Callable[[], Ready]]] = {
    "separable": _separable,
    "pointwise": _pointwise,
    "depthwise": _depthwise,
}


def tune(asked: Asked, seconds: float) -> Tuned:
    """Time all schedules of one problem; each has to give what the usual one gives.

    Raises:
        ValueError: a schedule gives something else.
        BuildError: the usual schedule cannot be built.
    """
    threads = asked.problem[-1]
    torch.manual_seed(0)
    with threads_set_to(threads):
        make = _MAKERS[asked.kind](asked.problem)
        calls: dict[str, Callable[[], None]] = {}
        schedules = {str(i): schedule for i, schedule in enumerate(dict.fromkeys([asked.usual, *asked.others]))}
        expected = None
        for name, schedule in schedules.items():
            try:
                with tuned.trying(schedule):
                    call, out = make()
            except runtime.BuildError:
                if schedule == asked.usual:
                    raise
                continue
            out.fill_(torch.nan)  # what a schedule leaves out must not be there from another one
            call()
            expected = out if expected is None else expected
            if not torch.allclose(out, expected, rtol=1e-4, atol=1e-4):
                raise ValueError(f"bench tune: {schedule} of {asked.kind} {asked.problem} gives another result")
            calls[name] = call
        timings = interleaved(calls, seconds)
    usual = timings["0"].median_ms
    name = min(timings, key=lambda name: timings[name].median_ms)
    if timings[name].median_ms * MARGIN > usual:
        name = "0"
    return Tuned(
        asked.kind,
        "x".join(map(str, _shape(asked))),
        threads,
        len(calls),
        usual,
        timings[name].median_ms,
        asked.usual,
        schedules[name],
    )


def _shape(asked: Asked) -> tuple[int, ...]:
    if asked.kind != "depthwise":
        return tuple(asked.problem[0])
    p = Problem(*asked.problem[:-1])
    return (p.batch, p.channels, *p.image[: p.dims][::-1])


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
        _forget_plans()
