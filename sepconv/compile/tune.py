"""Measured choices: a group by its own kernel, by two kernels where it is fused, or by PyTorch: the fastest wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median

from torch import Tensor

from sepconv.compile.groups import Convolution, Pool, Separable
from sepconv.compile.lower import Call
from sepconv.system.timing import in_turn

_ROUNDS = 9
# An alternative must win by this factor, or noise would choose.
_MARGIN = 1.03


def alternatives(target: object) -> tuple[str, ...]:
    """What else could compute a group: "split" (depthwise and pointwise kernel in turn), "torch"."""
    if isinstance(target, Separable):
        return ("split", "torch")
    return ("torch",) if isinstance(target, (Convolution, Pool)) else ()


def fastest(calls: Mapping[str, Call], arguments: Sequence[Tensor]) -> str:
    """The name of the call that takes least time; "" (the usual kernel) unless another is clearly faster."""
    times = in_turn({name: partial(call.run, *arguments) for name, call in calls.items()}, _ROUNDS)
    usual = median(times.pop(""))
    name, best = min(((name, median(samples)) for name, samples in times.items()), key=lambda pair: pair[1])
    return name if best * _MARGIN < usual else ""
