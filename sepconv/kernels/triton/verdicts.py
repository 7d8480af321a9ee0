"""What proofs came to: for this process in memory, for the next ones on disk.

A file holds one verdict as JSON, for one case on one kind of device, with one driver and these versions; its name is a
hash of all that. It says which of the tiles that this version tries is used, and times; nothing in it is executed, and
one that is not exactly as it should be is made again.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from sepconv import activations
from sepconv.kernels import case as cases
from sepconv.kernels import layout
from sepconv.kernels.case import Case, Outline
from sepconv.kernels.halide.jit import code_cache
from sepconv.kernels.torch import aten, prepared
from sepconv.kernels.triton.events import Times
from sepconv.kernels.triton.proof import Verdict
from sepconv.system import timing
from sepconv.system.files import replacing

MAX_VERDICTS = 4096
MAX_FILES = 4096

_known: dict[Case, Verdict] = {}


def find(case: Case, tiles: int) -> Verdict | None:
    """The verdict on a case for which so many tiles are tried; None where it is still to be proven."""
    if case not in _known:
        found = _read(case, tiles)
        if found is None:
            return None
        _remember(case, found)
    return _known[case]


def keep(case: Case, verdict: Verdict) -> None:
    _remember(case, verdict)
    if verdict.lasting:
        _write(case, verdict)


def forget() -> None:
    """What is in memory; the files stay."""
    _known.clear()


def _remember(case: Case, verdict: Verdict) -> None:
    if len(_known) >= MAX_VERDICTS:
        _known.clear()
    _known[case] = verdict


def _outline(outline: Outline | None) -> str:
    return "none" if outline is None else f"{outline.shape} {outline.stride} {outline.dtype}"


@lru_cache(maxsize=1)
def _sources() -> str:
    """A hash of all that the kernels are made of, and of what they are compared with and timed by."""
    total = hashlib.sha256()
    others = (Path(str(module.__file__)) for module in (activations, cases, layout, aten, prepared, timing))
    for path in (*others, *sorted(Path(__file__).parent.rglob("*.py"))):
        total.update(path.read_bytes())
    return total.hexdigest()


def triton_version() -> str:
    """Builds of PyTorch for AMD bring it in a package of another name, so that the module is asked."""
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


_DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))


def _driver() -> str:
    """What Linux says of the driver; PyTorch knows only up to which CUDA it reaches."""
    found = [str(getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)())]
    for path in _DRIVERS:
        with suppress(OSError, ValueError):
            found.append(path.read_text())
    return " ".join(found)


@lru_cache(maxsize=16)
def _device(device: torch.device) -> str:
    """The device, its driver, and the versions of what runs on it."""
    if device.type != "cuda":
        return f"{device.type} {torch.__version__} {triton_version()}"
    found = torch.cuda.get_device_properties(device)
    kind = (found.name, found.major, found.minor, found.multi_processor_count, found.total_memory)
    return f"{kind} {_driver()} {torch.version.cuda} {torch.version.hip} {torch.backends.cudnn.version()} " + (
        f"{torch.__version__} {triton_version()}"
    )


def _settings() -> str:
    """What PyTorch's choice of a kernel depends on besides."""
    cudnn = torch.backends.cudnn
    flags = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, getattr(cudnn, "depthwise_kernel", ""))
    # Where precision was set by operation, as PyTorch 2.9 and later can, it refuses to tell allow_tf32.
    conv: Any = getattr(cudnn, "conv", None)
    precision = cudnn.allow_tf32 if conv is None else conv.fp32_precision
    return f"{flags} {precision} {torch.are_deterministic_algorithms_enabled()}"


def _text(case: Case) -> str:
    tensors = " | ".join(map(_outline, (case.x, case.weight, case.y, case.bias)))
    what = f"{case.which} {case.activation!r} {tuple(case.geometry)}"
    return f"{what} | {tensors} | {_device(case.x.device)} | {_settings()} | {_sources()}"


def folder() -> Path | None:
    """Where the files lie, beside those of compiled kernels; None where none are kept."""
    kernels = code_cache.folder()
    return None if kernels is None else kernels.parent / "gpu"


def _path(text: str) -> Path | None:
    place = folder()
    return None if place is None else place / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def _read(case: Case, tiles: int) -> Verdict | None:
    text = _text(case)
    path = _path(text)
    try:
        content: Any = json.loads(path.read_bytes()) if path else None
        if not isinstance(content, dict) or content.pop("case") != text:
            return None
        return _verdict(content, tiles)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _verdict(content: dict[str, Any], tiles: int) -> Verdict:
    """ValueError, KeyError or TypeError unless it is one."""
    schedule, fault = content["schedule"], content["fault"]
    if type(schedule) is not int or not 0 <= schedule < tiles or not isinstance(fault, str):
        raise ValueError("not a verdict")
    ours, pytorch = (Times(*map(_milliseconds, content[name])) for name in ("ours", "pytorch"))
    if not fault and not min(*ours, *pytorch) > 0:
        raise ValueError("not timed")
    return Verdict(schedule, ours, pytorch, fault)


def _milliseconds(value: object) -> float:
    if type(value) is not float or not 0 <= value < 1e9:
        raise ValueError("not a time")
    return value


def _write(case: Case, verdict: Verdict) -> None:
    """Without a file the next process proves again."""
    text = _text(case)
    path = _path(text)
    if path is None:
        return
    content = {"case": text, **verdict._asdict()}
    del content["lasting"]
    with suppress(OSError):
        with replacing(path) as file:
            file.write(json.dumps(content).encode())
        _forget_oldest(path.parent)


def _forget_oldest(place: Path) -> None:
    files = list(place.glob("*.json"))
    if len(files) > MAX_FILES:
        for file in sorted(files, key=lambda file: file.stat().st_mtime)[: len(files) - MAX_FILES * 3 // 4]:
            file.unlink(missing_ok=True)
