"""Triton's kernels behind the public functions, on a device that may be no GPU: there the CPU takes its place, programs
are interpreted, and what a proof measures is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from triton_checks import DEVICE, kernel

from sepconv.kernels import backends
from sepconv.kernels.backends import BACKENDS
from sepconv.kernels.halide.jit import code_cache
from sepconv.kernels.triton import depthwise, proof, verdicts
from sepconv.kernels.triton.events import Times
from sepconv.kernels.triton.proof import Workbench
from sepconv.ops import autograd, call

FASTER = {"torch": Times(0.5, 0.5), "0": Times(0.125, 0.25)}


def pretend(patch: pytest.MonkeyPatch, folder: Path, times: Mapping[str, Times]) -> list[str]:
    """The kernels for a GPU take this device's tensors, one tile each; returns the passes that are proven from now on.

    ``folder`` is for verdicts, ``times`` what is told of PyTorch and of the tile.
    """
    done: list[str] = []
    patch.setenv(code_cache.VARIABLE, str(folder))
    patch.setattr(call, "_calls", {})
    patch.setattr(autograd, "_in_one_walk", lambda *given: None)  # of the CPU's tensors alone
    patch.setattr(backends, "_choices", {})
    [entry] = [backend for backend in BACKENDS["depthwise"] if backend.name == "triton"]
    there = replace(entry, device=DEVICE.type, supports=depthwise.unsuitable)
    patch.setitem(BACKENDS, "depthwise", [there, BACKENDS["depthwise"][-1]])
    patch.setitem(BACKENDS, "separable", BACKENDS["separable"][-2:])

    def time(calls: Mapping[str, Callable[[], object]]) -> dict[str, Times]:
        return {name: times[name] for name in calls}

    patch.setattr(proof, "on_device", lambda device: Workbench(proof._run, proof.compare, time))
    patch.setattr(depthwise, "_kernels", lambda case, tried: [lambda: done.append(case.which) or kernel(case)])
    patch.setattr(depthwise, "_chosen", lambda case: kernel(case))
    verdicts.forget()
    depthwise._proofs.clear()
    return done
