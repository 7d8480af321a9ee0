"""What every run leaves in its folder: the record and the ONNX file; and the room that it needs there."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from sepconv import environment, export
from sepconv.data import Data
from sepconv.files import check_folder, nearest_folder, replacing
from sepconv.train.processes import processes

RESULT = "result.json"
ONNX = "model.onnx"
CHECKPOINTS = "checkpoints"
SPACE = 32 << 20
"""Bytes that the page and the JSON files may need, beside the weights."""


def prepare(out: Path, model: nn.Module | None = None) -> None:
    """See that the folder can be written and has room, before any long work.

    Raises:
        OSError: it cannot, or has not.
    """
    check_folder(out)
    weights = 0 if model is None else sum(t.numel() * t.element_size() for t in model.state_dict().values())
    needed, free = 2 * weights + SPACE, shutil.disk_usage(nearest_folder(out)).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"the results need {needed >> 20} MB but {out} has {free >> 20} MB left")


def remove_checkpoints(out: Path) -> None:
    if processes().is_main_process:
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    processes().wait_for_everyone()


def about(model: str, data: Data, command: str, seconds: float) -> dict[str, Any]:
    return {
        "model": model,
        "data": data.name,
        "command": command,
        "seconds": round(seconds, 2),
        "classes": data.classes,
        "skipped_images": len(data.skipped),
        "machine": environment.machine(),
        "versions": environment.versions(),
    }


def export_onnx(model: nn.Module, data: Data, out: Path) -> dict[str, Any]:
    """What was exported, or the reason why not: the network is usable without it."""
    try:
        exported = export.export_onnx(model, data.input_shape, out / ONNX)
    except (ModuleNotFoundError, ValueError) as error:
        return {"written": False, "reason": str(error)}
    return {
        "written": True,
        "bytes": exported.size,
        "convolutions": exported.convolutions,
        "max_error": exported.max_error,
        "checked_with": exported.checked_with,
    }


def write_json(path: Path, record: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write((json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
