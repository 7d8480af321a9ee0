"""What a compiled model does with each part of the network, where the time goes and why something fell back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sepconv.compile.plan import Plan
from sepconv.kernels.halide.schedule.peak import fma_peak_gflops

_REPEATS = 20


@dataclass(frozen=True)
class Group:
    """One step of the network.

    Attributes:
        name: the modules it comes from, "" if it has no parameters.
        kind: "separable", "depthwise", "pointwise", "normal", "grouped", "linear", "pool", "copy", or the ATen name.
        fused: what is computed in the same pass, in order ("norm", "relu6", "add", ...).
        kernel: "halide" or "torch".
        reason: why not Halide.
        shape: of the result.
        macs: multiply-adds, batch included.
        time_us: measured time, None if not asked for.
        share_of_peak: measured multiply-adds per second over the most that the processor can do.
    """

    name: str
    kind: str
    fused: tuple[str, ...]
    kernel: str
    reason: str
    shape: tuple[int, ...]
    macs: int
    time_us: float | None = None
    share_of_peak: float | None = None


@dataclass(frozen=True)
class Explanation:
    """The steps in order. ``reason`` says why the model runs through PyTorch as a whole, "" if it does not."""

    groups: tuple[Group, ...]
    reason: str = ""

    @property
    def macs(self) -> int:
        return sum(group.macs for group in self.groups)

    @property
    def time_us(self) -> float | None:
        times = [group.time_us for group in self.groups]
        return None if not times or None in times else sum(time for time in times if time is not None)

    def __str__(self) -> str:
        if self.reason:
            return f"the whole model runs through PyTorch: {self.reason}"
        measured = self.time_us is not None
        header = f"{'kind':10} {'result':>18} {'MACs':>13}" + (f" {'us':>8} {'peak':>5}" if measured else "")
        lines = [f"{header} kernel  name (fused)"]
        for g in self.groups:
            shape, fused = "x".join(map(str, g.shape)), f" ({', '.join(g.fused)})" if g.fused else ""
            time = "" if g.time_us is None else f" {g.time_us:8.1f} {_percent(g.share_of_peak):>5}"
            reason = f": {g.reason}" if g.reason else ""
            lines.append(f"{g.kind:10} {shape:>18} {g.macs:13,}{time} {g.kernel:7} {g.name}{fused}{reason}")
        ours = sum(g.macs for g in self.groups if g.kernel == "halide")
        total = f", {self.time_us:,.1f} us" if measured else ""
        return "\n".join([*lines, f"{self.macs:,} multiply-adds, {ours:,} of them by Halide kernels{total}"])


def _percent(share: float | None) -> str:
    return "" if not share else f"{share:.0%}"


def explain_plan(plan: Plan, measure: bool) -> Explanation:
    """The steps of a plan; measured on random inputs if asked for."""
    instance = plan.take()
    try:
        inputs = [_random(given) for given in plan.layout.given]
        times = instance.measure(inputs, _REPEATS) if measure else [None] * len(instance.calls)
        calls = list(instance.calls)
    finally:
        plan.give_back(instance)
    peak = fma_peak_gflops(torch.get_num_threads()) * 1e9 if measure else 0.0
    groups = []
    for step, call, seconds in zip(plan.layout.steps, calls, times, strict=True):
        target = step.target
        shape = tuple(step.outputs[0].meta.shape) if step.outputs else ()
        macs = target.macs(shape) if hasattr(target, "macs") else 0
        kind = "copy" if target is None else getattr(target, "kind", str(target))
        name, fused = getattr(target, "name", ""), getattr(target, "fused", ())
        time_us = None if seconds is None else seconds * 1e6
        share = 2 * macs / seconds / peak if seconds and peak else None
        name = name if isinstance(name, str) else ""
        groups.append(Group(name, kind, fused, call.kernel, call.reason, shape, macs, time_us, share))
    return Explanation(tuple(groups))


def _random(like: Tensor) -> Tensor:
    x = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    return x.normal_(generator=torch.Generator().manual_seed(0)) if x.is_floating_point() else x.zero_()
