"""What a compiled model does with each part of the network, where the time goes and why something fell back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sepconv.compile.bind import BoundStep
from sepconv.compile.instance import filled
from sepconv.compile.network import PreparedNetwork
from sepconv.compile.precision import FLOAT32, precision_of
from sepconv.compile.program import Copy, ProgramStep
from sepconv.compile.weights import weight_bytes
from sepconv.kernels.halide.schedule.peak import fma_peak_gflops

_REPEATS = 20


@dataclass(frozen=True)
class Group:
    """One step of the network.

    Attributes:
        name: the modules it comes from, "" if it has no parameters.
        kind: "separable", "depthwise", "pointwise", "normal", "grouped", "linear", "pool", "max_pool", "avg_pool",
            "elementwise", "convert", "row_norm", "group_norm", "resize", "shuffle", "softmax", "log_softmax", "sum",
            "mean", "amax", "amin", "pad", "roll", "flip", "index", "copy", or the ATen name.
        fused: what is computed in the same pass, in order ("norm", "relu6", "add", ...).
        kernel: "halide", "torch" or "copy".
        reason: why not Halide, or why two kernels in turn.
        shape: of the result.
        macs: multiply-adds, batch included.
        time_us: measured time, None if not asked for.
        share_of_peak: measured multiply-adds per second over the most that the processor can do.
        number: in which numbers the result is kept: "float32", "bfloat16", or "uint8 x SCALE from ZERO_POINT".
        weight_bytes: of weights and biases in the numbers in which the step is computed; what an earlier step has
            counted, not again.
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
    number: str = FLOAT32
    weight_bytes: int = 0


@dataclass(frozen=True)
class NetworkExplanation:
    """The steps in order.

    Attributes:
        groups: beside a reason those of the model's parts; PyTorch runs what is between them.
        reason: why the model was not captured as a whole, "" if it was.
        precision: "float32"; "bfloat16" or "int8" where some values between layers are kept so.
        note: why it is not the precision that was asked for, "" if it is.
    """

    groups: tuple[Group, ...]
    reason: str = ""
    precision: str = FLOAT32
    note: str = ""

    @property
    def macs(self) -> int:
        return sum(group.macs for group in self.groups)

    @property
    def weight_bytes(self) -> int:
        """Of all steps; what PyTorch computes between parts is not among them."""
        return sum(group.weight_bytes for group in self.groups)

    @property
    def time_us(self) -> float | None:
        times = [group.time_us for group in self.groups]
        return None if not times or None in times else sum(time for time in times if time is not None)

    def __str__(self) -> str:
        if self.reason and not self.groups:
            return f"the whole model runs through PyTorch: {self.reason}"
        measured = self.time_us is not None
        wide = 0 if self.precision == FLOAT32 else max(len(group.number) for group in self.groups)
        header = f"{'kind':10} {'result':>18} {_column('numbers', wide)}{'MACs':>13}"
        header += f" {'us':>8} {'peak':>5}" if measured else ""
        lines = [f"in parts, and between them through PyTorch: {self.reason}"] if self.reason else []
        lines += [f"{header} kernel  name (fused)"]
        for g in self.groups:
            shape, fused = "x".join(map(str, g.shape)), f" ({', '.join(g.fused)})" if g.fused else ""
            time = "" if g.time_us is None else f" {g.time_us:8.1f} {_percent(g.share_of_peak):>5}"
            reason = f": {g.reason}" if g.reason else ""
            number = _column(g.number, wide)
            lines.append(f"{g.kind:10} {shape:>18} {number}{g.macs:13,}{time} {g.kernel:7} {g.name}{fused}{reason}")
        ours = sum(g.macs for g in self.groups if g.kernel == "halide")
        total = f", {self.time_us:,.1f} us" if measured else ""
        lines.append(f"{self.macs:,} multiply-adds, {ours:,} of them by Halide kernels{total}")
        lines += [f"in {self.precision}" + (f": {self.note}" if self.note else "")] * bool(wide or self.note)
        return "\n".join(lines)


def _column(text: str, wide: int) -> str:
    """Nothing where the column has no width."""
    return f"{text:<{wide}} " if wide else ""


def _percent(share: float | None) -> str:
    return "" if not share else f"{share:.0%}"


def explain_network(network: PreparedNetwork, measure: bool) -> NetworkExplanation:
    """The steps of a prepared network; measured on random inputs if asked for."""
    instance = network.take()
    try:
        inputs = [filled(given) for given in network.program.given]
        times = instance.measure(inputs, _REPEATS) if measure else [None] * len(instance.calls)
        calls = list(instance.calls)
    finally:
        network.give_back(instance)
    peak = fma_peak_gflops(torch.get_num_threads()) * 1e9 if measure else 0.0
    kept = weight_bytes(network.program.steps, network.lowered)
    steps = zip(network.program.steps, calls, times, kept, strict=True)
    groups = tuple(
        replace(_explained(step, call, seconds, peak), weight_bytes=size) for step, call, seconds, size in steps
    )
    return NetworkExplanation(groups, precision=precision_of(network.program.numbers), note=network.note)


def explain_parts(parts: Sequence[tuple[str, NetworkExplanation]], reason: str) -> NetworkExplanation:
    """The steps of all parts, by the names of the whole model, and why a part ran through PyTorch last time."""
    groups = [
        replace(group, name=" + ".join(f"{part}.{name}" for name in group.name.split(" + ")) if group.name else part)
        for part, explanation in parts
        for group in explanation.groups
    ]
    said = [f"{part} runs through PyTorch: {explanation.reason}" for part, explanation in parts if explanation.reason]
    notes = dict.fromkeys(explanation.note for _, explanation in parts if explanation.note)
    precisions = {explanation.precision for _, explanation in parts} - {FLOAT32}
    return NetworkExplanation(
        tuple(groups), "; ".join([reason, *said]), next(iter(sorted(precisions)), FLOAT32), "; ".join(notes)
    )


def _explained(step: ProgramStep, call: BoundStep, seconds: float | None, peak: float) -> Group:
    shape, group = step.outputs[0].form.shape if step.outputs else (), step.group
    macs = 0 if group is None else group.macs(shape)
    name, fused = ("", ()) if group is None else (group.name, group.fused)
    if isinstance(step.work, Copy) and step.work.what:
        fused = (step.work.what,)
    time_us = None if seconds is None else seconds * 1e6
    share = 2 * macs / seconds / peak if seconds and peak else None
    number = str(step.outputs[0].form.number) if step.outputs else ""
    return Group(name, step.kind, fused, call.kernel, call.reason, shape, macs, time_us, share, number)
