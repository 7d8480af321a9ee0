"""What the tests of Triton's kernels share: the device they run on, small tiles, and calls.

Without a GPU Triton interprets its programs on the CPU: slowly, but with the same result. ``conftest`` says so before
Triton is imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_checks import depthwise_case
from torch import Tensor

from sepconv.kernels.case import Case
from sepconv.kernels.triton import plan
from sepconv.kernels.triton.forms import Patch, Schedule

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
MISSING = "" if importlib.util.find_spec("triton") else "the package triton is not installed: pip install triton"
needs_triton = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def small(case: Case) -> Schedule:
    """Tiles of 16 channels, 8 rows and 8 columns, as far as the case allows. An interpreted program takes as long
    whatever its size, so they are as large as they can be without holding a whole case."""
    rows = plan.view(case.y).rows
    deep = 2 if rows % 2 == 0 or (case.which != "grad_weight" and rows > 1) else 1
    return Schedule(Patch(16, 32, 8, deep, 4), plan.schedules(case)[0].taps)


def _without_checks_of_overflow() -> None:
    """They take half of the interpreter's time, and compiled programs have none."""
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)


def kernel(case: Case, schedule: Schedule | None = None) -> Callable[..., Tensor]:
    from sepconv.kernels.triton.compiled import launch

    _without_checks_of_overflow()
    assert plan.launch(case, schedule or small(case)).programs > 0
    return launch.kernel(case, schedule or small(case))


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *walk: Any) -> Tensor:
    return kernel(depthwise_case("forward", x, weight, *walk, bias=bias))(x, weight, bias)


def grad_input(grad: Tensor, weight: Tensor, size: Any, *walk: Any) -> Tensor:
    return kernel(depthwise_case("grad_input", grad, weight, *walk, size=size))(grad, weight)


def grad_weight(grad: Tensor, x: Tensor, size: Any, *walk: Any) -> Tensor:
    return kernel(depthwise_case("grad_weight", grad, x, *walk, size=size))(grad, x)
