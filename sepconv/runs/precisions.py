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
from sepconv.data.samples import first_of
from sepconv.layers.borrowed import copied
from sepconv.leaves import Inputs
from sepconv.runs.compare import Judged
from sepconv.runs.judge import Judge
from sepconv.runs.quantized import QuantizedNetwork
from sepconv.system.threads import threads_set_to
from sepconv.system.timing import in_turn
from sepconv.train import Metrics

FLOAT32, BFLOAT16, INT8 = "float32", "bfloat16", "int8"
ROUNDS = (10, 100)
SECONDS = 2.0


@dataclass(frozen=True)
class InPrecision:
    """A network in one kind of numbers; without ``run`` the ``reason`` says why it cannot be had."""

    network: str
    precision: str
    module: nn.Module
    run: CompiledModel | None
    reason: str = ""


def precisions(
    networks: Mapping[str, nn.Module],
    quantized: QuantizedNetwork | str,
    judged: Mapping[str, Judged],
    judge: Judge,
    data: Data | SampleData,
    batch: int,
) -> list[dict[str, Any]]:
    """Rows for result.json: both networks in float32, and the separable one in fewer bits.

    Args:
        networks: "normal" and "separable".
        quantized: the latter in int8, or why there is none.
        judged: what they are worth in float32.
        batch: samples of the call that is timed.
    """
    threads, x = torch.get_num_threads(), first_of(data.test, batch)
    models = {name: copied(model, "precisions").cpu().eval() for name, model in networks.items()}
    found = [
        *(_candidate(name, FLOAT32, model, x) for name, model in models.items()),
        _candidate("separable", BFLOAT16, models["separable"], x),
        _in_int8(quantized, models["separable"], x),
    ]
    times = _times(found, x, threads)
    return [
        {
            "network": one.network,
            "precision": one.precision,
            "ms": times.get(i),
            "bytes": weight_bytes(one) if one.run else None,
            **(_score(one, judged, judge, data) if one.run else {}),
            "reason": one.reason,
        }
        for i, one in enumerate(found)
    ]


def _candidate(network: str, precision: str, module: nn.Module, x: Inputs) -> InPrecision:
    run = compile(module, x.kwargs or x.args, precision=precision)
    explained = run.explain()
    return InPrecision(network, precision, module, run, "; ".join(filter(None, (explained.note, explained.reason))))


def _in_int8(quantized: QuantizedNetwork | str, separable: nn.Module, x: Inputs) -> InPrecision:
    if isinstance(quantized, str):
        return InPrecision("separable", INT8, separable, None, quantized)
    module = copied(quantized.module, "precisions").cpu().eval()
    run, left = compile(module, x.kwargs or x.args), quantized.plan.left
    explained = run.explain()
    other = "" if explained.precision == INT8 else f"computed in {explained.precision}"
    stay = f"{len(left)} layers stay in float32: {', '.join(left)}" if left else ""
    return InPrecision("separable", INT8, module, run, "; ".join(filter(None, (other, stay, explained.reason))))


def weight_bytes(one: InPrecision) -> int:
    """Bytes of all weights as they are computed with: a step that stays in float32 has four for each. Norms are part
    of the weights in front of them. What PyTorch runs, as a whole or between parts, it keeps as the module does."""
    explained = one.run.explain() if one.run else None
    if explained is None or explained.reason:
        return sum(p.nbytes for p in one.module.parameters())
    return explained.weight_bytes


@torch.inference_mode()
def _times(found: list[InPrecision], x: Inputs, threads: int) -> dict[int, float]:
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


def _score(one: InPrecision, judged: Mapping[str, Judged], judge: Judge, data: Data | SampleData) -> dict[str, float]:
    assert one.run is not None
    found = judged[one.network].score if one.precision == FLOAT32 else judge.on(_Compiled(one.run), data.test)
    return {"accuracy": found.accuracy} if isinstance(found, Metrics) else {"error": found.relative_error}
