"""Measured choices: a group by its own kernel, by two kernels where it is fused, or by PyTorch: the fastest wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median

from torch import Tensor

from sepconv.compile.bind import BoundStep
from sepconv.compile.groups import SeparableGroup
from sepconv.compile.instance import Instance
from sepconv.compile.lower import SPLIT, TORCH, lower_step
from sepconv.compile.program import Program, ProgramStep
from sepconv.compile.slices import Slices
from sepconv.system.timing import in_turn

_ROUNDS = 9
# An alternative must win by this factor, or noise would choose.
_MARGIN = 1.03


def choose(program: Program, slices: Slices, instance: Instance) -> dict[int, str]:
    """Measure what else could compute each step of an instance; the choices that are faster than the usual one."""
    instance.fill()
    choices = {}
    for i, step in enumerate(program.steps):
        usual = instance.calls[i]
        others = alternatives(step) if usual.kernel != TORCH else ()
        if others:
            lowered = {choice: lower_step(program, slices, i, choice) for choice in others}
            calls = {"": usual, **{choice: instance.bind(i, found) for choice, found in lowered.items()}}
            choices[i] = fastest(calls, [instance.example()] if program.is_direct(i) else [])
    return choices


def alternatives(step: ProgramStep) -> tuple[str, ...]:
    """What else could compute a group: depthwise and pointwise kernel in turn, PyTorch."""
    if step.group is None:
        return ()
    return (SPLIT, TORCH) if isinstance(step.group, SeparableGroup) else (TORCH,)


def fastest(calls: Mapping[str, BoundStep], arguments: Sequence[Tensor]) -> str:
    """The name of the call that takes least time; "" (the usual kernel) unless another is clearly faster."""
    times = in_turn({name: partial(call.run, *arguments) for name, call in calls.items()}, _ROUNDS)
    usual = median(times.pop(""))
    name, best = min(((name, median(samples)) for name, samples in times.items()), key=lambda pair: pair[1])
    return name if best * _MARGIN < usual else ""
