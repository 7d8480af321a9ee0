"""A network in float32, bfloat16 and int8 side by side: time, bytes of its weights, and what it is then worth."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sepconv.compile import CompiledModel, compile
from sepconv.data import Data, SampleData
from sepconv.leaves import Closeness, Inputs
from sepconv.quantize import quantize
from sepconv.runs.judge import Judge
from sepconv.system.threads import threads_set_to
from sepconv.system.timing import in_turn
from sepconv.train import Metrics

FLOAT32, BFLOAT16, INT8 = "float32", "bfloat16", "int8"
BYTES = {FLOAT32: 4, BFLOAT16: 2, INT8: 1}
"""Of a weight of a convolution or a linear layer; everything else stays in float32."""

ROUNDS = (10, 100)
SECONDS = 2.0
IMAGES = 256
"""Calibration images that scales are found on."""


@dataclass(frozen=True)
class Candidate:
    """A network in one kind of numbers; without ``run`` the ``reason`` says why it cannot be had."""

    network: str
    precision: str
    module: nn.Module
    run: CompiledModel | None
    reason: str = ""


def precisions(
    networks: Mapping[str, nn.Module],
    known: Mapping[str, Metrics | Closeness],
    judge: Judge,
    data: Data | SampleData,
    x: Inputs,
    threads: int,
) -> list[dict[str, Any]]:
    """Rows for result.json: both networks in float32, and the separable one in fewer bits.

    Args:
        networks: "normal" and "separable", in evaluation mode on the CPU.
        known: what is known of them in float32.
        x: an example; times are of one call with it.
    """
    found = [
        *(_candidate(name, FLOAT32, model, x) for name, model in networks.items()),
        _candidate("separable", BFLOAT16, networks["separable"], x),
        _quantized(networks["separable"], data, x),
    ]
    times = _times(found, x, threads)
    return [
        {
            "network": one.network,
            "precision": one.precision,
            "ms": times.get(i),
            "bytes": weight_bytes(one.module, one.precision) if one.run else None,
            **(_score(one, known, judge, data) if one.run else {}),
            "reason": one.reason,
        }
        for i, one in enumerate(found)
    ]


def _candidate(network: str, precision: str, module: nn.Module, x: Inputs) -> Candidate:
    run = compile(module, x.kwargs or x.args, precision=precision)
    return Candidate(network, precision, module, run, run.explain().reason)


def _quantized(module: nn.Module, data: Data | SampleData, x: Inputs) -> Candidate:
    try:
        quantized, plan = quantize(module, data.calibration(min(IMAGES, len(data.train))))
    except ValueError as error:  # a network that cannot be captured, or that loses too much
        return Candidate("separable", INT8, module, None, str(error).splitlines()[0])
    run = compile(quantized, x.kwargs or x.args)
    left = f"{len(plan.left)} layers stay in float32: {', '.join(plan.left)}" if plan.left else ""
    return Candidate("separable", INT8, quantized, run, "; ".join(filter(None, (run.explain().reason, left))))


def weight_bytes(module: nn.Module, precision: str) -> int:
    """Bytes of all parameters where the weights of layers have this precision."""
    return sum(BYTES[precision if p.dim() > 1 else FLOAT32] * p.numel() for p in module.parameters())


@torch.inference_mode()
def _times(found: list[Candidate], x: Inputs, threads: int) -> dict[int, float]:
    """Median milliseconds of one call, all called in turn."""
    calls: dict[int, Callable[[], object]] = {
        i: partial(one.run, *x.args, **x.kwargs) for i, one in enumerate(found) if one.run
    }
    fewest, most = ROUNDS
    with threads_set_to(threads):
        in_turn(calls, 3)
        measured = in_turn(calls, most, fewest=fewest, budget=SECONDS)
    return {i: round(1e3 * statistics.median(seconds), 5) for i, seconds in measured.items()}


class _Compiled(nn.Module):
    """A compiled network where a module is asked for."""

    def __init__(self, run: CompiledModel) -> None:
        super().__init__()
        self._run = run

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        return self._run(*args, **kwargs)


def _score(
    one: Candidate, known: Mapping[str, Metrics | Closeness], judge: Judge, data: Data | SampleData
) -> dict[str, float]:
    assert one.run is not None
    found = known[one.network] if one.precision == FLOAT32 else judge.on(_Compiled(one.run), data.test)
    return {"accuracy": found.accuracy} if isinstance(found, Metrics) else {"error": found.relative_error}
