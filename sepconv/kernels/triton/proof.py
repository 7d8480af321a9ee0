"""Proof before use: a kernel runs beside PyTorch's on the device at hand, and is used only if right and faster.

Both get the same whole numbers, made for it. Their sums are exact in float32, so that nothing but the rounding of the
result, and of a curved activation, may differ: any tap that is missing, doubled or read elsewhere shows itself. Every
tile that is tried must be right; the fastest is then timed against PyTorch's kernel once more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from sepconv.activations import ACTIVATIONS
from sepconv.kernels.case import Case, Outline
from sepconv.kernels.torch import prepared
from sepconv.kernels.triton import events
from sepconv.kernels.triton.events import Times

GAIN = 1.03
"""So many times faster than PyTorch's a kernel must be on the device alone; and called in a row, no slower."""
_CURVE = 1e-5
_FEW_TERMS = 4096
_COMPARED = 2**24
"""So many numbers at once, or the comparison would take several times the memory of a large result."""

Kernel = Callable[..., Tensor]
Operands = tuple[Tensor | None, ...]


class Verdict(NamedTuple):
    """What a proof came to.

    Attributes:
        schedule: which of the tiles that were tried is used.
        ours, pytorch: how long the two take; zeros where nothing was timed.
        fault: why the kernel is not to be used however fast it is, in a sentence; "" if it is right.
        lasting: whether another attempt would come to the same.
    """

    schedule: int
    ours: Times
    pytorch: Times
    fault: str = ""
    lasting: bool = True

    @property
    def reason(self) -> str:
        """Why PyTorch's kernel is used, in a sentence; "" if this one is."""
        ours, theirs = self.ours, self.pytorch
        if self.fault:
            return self.fault
        # What is no time at all is none of a kernel that is faster.
        if not 0 < ours.device * GAIN <= theirs.device:
            return f"it takes {ours.device:.4f} ms on this device, PyTorch's kernel {theirs.device:.4f} ms"
        if not ours.call <= theirs.call:
            return f"called in a row it takes {ours.call:.4f} ms on this device, PyTorch's kernel {theirs.call:.4f} ms"
        return ""


@dataclass(frozen=True)
class Workbench:
    """The work on the device that a proof needs.

    Attributes:
        run: the result of a kernel, with whatever fails on the device raised here.
        compare: what is wrong with a result, in a sentence; "" if nothing is: ``compare(result, truth, activation)``.
        time: how long each call takes.
    """

    run: Callable[[Kernel, Operands], Tensor]
    compare: Callable[[Tensor, Tensor, str], str]
    time: Callable[[Mapping[str, Callable[[], object]]], dict[str, Times]]


def compare(result: Tensor, truth: Tensor, activation: str) -> str:
    """``truth``: in float32, whole numbers but for the activation."""
    if result.shape != truth.shape:
        return f"its result is wrong: sizes {tuple(result.shape)} instead of {tuple(truth.shape)}"
    curve = _CURVE if ACTIVATIONS[activation].limits is None else 0.0
    at_once = max(1, _COMPARED * len(result) // result.numel())
    parts = zip(result.split(at_once), truth.split(at_once), strict=True)
    count = sum(_wrong(ours, known, curve) for ours, known in parts)
    return f"its result is wrong: {count} of {result.numel()} numbers" if count else ""


def _wrong(result: Tensor, truth: Tensor, curve: float) -> int:
    """How many numbers differ by more than rounding; takes memory for several copies of them."""
    known, found = truth.to(result.dtype).float(), result.float()
    limit = torch.finfo(result.dtype).eps * known.abs() + curve * (1 + known.abs())
    return int((~((found - known).abs() <= limit) & ~(found == known)).sum())


def _run(kernel: Kernel, operands: Operands) -> Tensor:
    result = kernel(*operands)
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return result


def on_device(device: torch.device) -> Workbench:
    return Workbench(_run, compare, lambda calls: events.measure(calls, device))


def _laid_out(outline: Outline, most: int, generator: torch.Generator) -> Tensor:
    """Whole numbers in memory as a tensor of the case has it; along steps of 0 all are one.

    None of them is 0, which would hide what is read: of an expanded gradient there is but one.
    """
    shape = tuple(1 if step == 0 else size for size, step in zip(outline.shape, outline.stride, strict=True))

    def drawn(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator, device=outline.device, dtype=torch.int8)

    values = drawn(1, most) * (2 * drawn(0, 1) - 1)
    span = 1 + sum((size - 1) * step for size, step in zip(shape, outline.stride, strict=True))
    memory = torch.zeros(span, dtype=outline.dtype, device=outline.device)
    memory.as_strided(shape, outline.stride).copy_(values)
    return memory.as_strided(outline.shape, outline.stride)


def operands(case: Case) -> Operands:
    """Tensors as the case describes them, of whole numbers whose sums are exact and no larger than 16 bits can hold."""
    terms = prod(case.kernel_size) if case.which != "grad_weight" else prod(case.y.shape) // max(1, case.y.shape[1])
    most = 8 if terms <= _FEW_TERMS else 2
    generator = torch.Generator(case.x.device).manual_seed(0)  # the user's numbers stay as they are
    given = [_laid_out(outline, most, generator) for outline in case.given]
    if case.which != "forward":
        return tuple(given)
    return (*given[:2], given[2] if case.bias is not None else None)


def _truth(case: Case, given: Operands) -> Tensor:
    """PyTorch's, in float32, rounded to the whole numbers that it consists of before the activation."""
    single = replace(
        case, activation="", x=case.x.to(torch.float32), y=case.y.to(torch.float32),
        weight=case.weight.to(torch.float32), bias=None if case.bias is None else case.bias.to(torch.float32),
    )  # fmt: skip
    sums = prepared.depthwise(single)(*(None if tensor is None else tensor.float() for tensor in given))
    return ACTIVATIONS[case.activation].function(sums.round())


def _poison(result: Outline) -> None:
    """Where a kernel writes nothing is then no number: the next tensor of this size gets memory that was just freed,
    and the tile before may have left right results in it."""
    torch.empty_strided(result.shape, result.stride, dtype=result.dtype, device=result.device).fill_(torch.nan)


_UNTIMED = Times(0.0, 0.0)


def refused(reason: str) -> Verdict:
    """Of a kernel that is not tried."""
    return Verdict(0, _UNTIMED, _UNTIMED, reason, lasting=False)


def prove(case: Case, tried: Sequence[Callable[[], Kernel]], bench: Workbench) -> Verdict:
    """Weigh the kernels that ``tried`` makes, one a tile, against PyTorch's. What fails here reaches no user."""
    try:
        with torch.no_grad(), torch.autocast(case.x.device.type, enabled=False):
            return _prove(case, tried, bench)
    except torch.OutOfMemoryError:
        return refused("there is no memory to compare it with PyTorch's kernel")
    except Exception as error:  # of a compiler or a driver: PyTorch's kernel does not need them
        return refused(f"it could not be tried: {_first_line(error)}")


def _prove(case: Case, tried: Sequence[Callable[[], Kernel]], bench: Workbench) -> Verdict:
    given = operands(case)
    truth = bench.run(lambda *tensors: _truth(case, tensors), given)
    calls: dict[str, Callable[[], object]] = {}
    failures = []
    for number, make in enumerate(tried):
        try:
            kernel = make()
            _poison(case.result)
            result = bench.run(kernel, given)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a tile that does not fit this device is no reason against the others
            failures.append(_first_line(error))
            continue
        fault = bench.compare(result, truth, case.activation)
        del result  # or its memory would not be poisoned
        if fault:
            return Verdict(number, _UNTIMED, _UNTIMED, fault)
        calls[str(number)] = _call(kernel, given)
    if not calls:
        return refused(f"it could not be compiled: {failures[0]}")
    del truth
    times = bench.time(calls) if len(calls) > 1 else {}
    best = min(calls, key=lambda name: times[name].device if times else 0.0)
    final = bench.time({"torch": _call(prepared.depthwise(case), given), best: calls[best]})
    return Verdict(int(best), final[best], final["torch"])


def _call(kernel: Kernel, given: Operands) -> Callable[[], object]:
    return lambda: kernel(*given)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
