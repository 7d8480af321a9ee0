"""The machine and the package versions a number was measured with: part of every record."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import sepconv
from sepconv.kernels.halide.schedule import machine as kernel_machine

MEASURED = ("torch", "halide", "numpy", "onnx", "onnxruntime")
"""Packages whose versions go into records, where they are installed."""


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, and the widest instruction set PyTorch uses."""
    return {
        "cpu": kernel_machine.cpu_name(),
        "cores": cores(),
        "features": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }


def cores() -> int:
    """Cores that this process may run on, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Python, sepconv and what its numbers depend on."""
    found = {name: installed(name) for name in MEASURED}
    return {
        "python": platform.python_version(),
        "sepconv": sepconv.__version__,
        **{name: number for name, number in found.items() if number},
    }


def installed(package: str) -> str:
    """The version of an installed package; empty if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
