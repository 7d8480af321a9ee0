"""Checkpoints that are complete or absent, and refused with a reason when they do not fit.

A file is one line (`sepconv checkpoint 1 SHA256`) and then what torch.save writes; the checksum is that of the rest.
It is loaded with `weights_only=True`: nothing in a file is ever executed.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sepconv.layers.replace import class_of
from sepconv.system.files import replacing

MAGIC = "sepconv checkpoint 1"
KEPT = 2
PATTERN = "checkpoint-*.pt"
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class CheckpointRefused(ValueError):
    """A checkpoint that is damaged or belongs to another run; the message names the file and the reason."""


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    return sorted(folder.glob(PATTERN), reverse=True)


def save(folder: Path, epoch: int, state: dict[str, Any]) -> Path:
    """Write the checkpoint of the finished `epoch` (counted from 1) and remove all but the last two.

    Raises:
        OSError: no space or no permission; the earlier checkpoints are still there.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    path = folder / f"checkpoint-{epoch:05d}.pt"
    with replacing(path) as file:
        file.write(f"{MAGIC} {hashlib.sha256(payload).hexdigest()}\n".encode())
        file.write(payload)
    for old in checkpoints(folder)[KEPT:]:
        old.unlink(missing_ok=True)
    return path


def is_ours(path: Path) -> bool:
    """Whether a file begins as a checkpoint does, whole or not."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC.encode()


def read(path: Path) -> dict[str, Any]:
    """The state in one file, on the CPU; CheckpointRefused where it is damaged or no checkpoint."""
    line, _, payload = path.read_bytes().partition(b"\n")
    name, _, checksum = line.decode("ascii", "replace").rpartition(" ")
    if name != MAGIC:
        raise CheckpointRefused(f"{path}: not a checkpoint of this version (no line '{MAGIC} ...')")
    if hashlib.sha256(payload).hexdigest() != checksum:
        raise CheckpointRefused(f"{path}: damaged (its checksum does not fit its {len(payload)} bytes)")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointRefused(f"{path}: holds something other than tensors and numbers") from error
    if not isinstance(state, dict) or "identity" not in state:
        raise CheckpointRefused(f"{path}: not the state of a training run")
    return state


def newest(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The newest checkpoint in `folder` that is whole and of the run `identity`; None where there are none at all.

    Each refused file is named in a warning.

    Raises:
        CheckpointRefused: there are checkpoints and none can be used.
    """
    refused = []
    for path in checkpoints(folder):
        try:
            state = read(path)
            difference = first_difference(state["identity"], identity)
            if difference:
                raise CheckpointRefused(f"{path}: of another run ({difference})")
        except CheckpointRefused as error:
            refused.append(str(error))
            continue
        for reason in refused:
            warnings.warn(f"resume: refused {reason}; using {path.name}", stacklevel=3)
        return state
    if refused:
        raise CheckpointRefused(f"resume: no checkpoint can be used: {'; '.join(refused)}")
    return None


def describe(model: nn.Module) -> dict[str, str]:
    """What the model is made of: one line for each module without children and for each tensor in its state."""
    layers = {
        name: f"{class_of(module).__name__}({ADDRESS.sub('', module.extra_repr())})"
        for name, module in model.named_modules()
        if not any(True for _ in module.children())
    }
    tensors = {
        name: f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        for name, value in model.state_dict().items()
    }
    return layers | tensors


def first_difference(found: Any, expected: Any, name: str = "") -> str:
    """Where two nested dicts first differ, in words; "" where they do not."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in [*found, *(key for key in expected if key not in found)]:
            where = f"{name}.{key}" if name else str(key)
            difference = first_difference(found.get(key), expected.get(key), where)
            if difference:
                return difference
        return ""
    return "" if found == expected else f"{name} is {found} there and {expected} here"
