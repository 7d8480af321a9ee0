"""What every run leaves in its folder, whose folder it may be, and the room that it needs there."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn

from sepconv.data import Data, SampleData
from sepconv.data.samples import first_of
from sepconv.runs import fitted, model_file, onnx_file
from sepconv.system import environment
from sepconv.system.files import (
    alone_in,
    check_folder,
    nearest_folder,
    refuse_inputs,
    remove_partial_files,
    replacing,
)
from sepconv.train import checkpoint, history
from sepconv.train.processes import processes

RESULT = "result.json"
ONNX = "model.onnx"
CHECKPOINTS = "checkpoints"
EXPLANATION = "explanation.json"
LIVE = "live.json"
INT8 = "int8"
"""In the folder of a conversion that of its network in 8-bit integers."""
KINDS = ("train", "convert", "demo", "quantize")
_LEARNS_FROM_ANOTHER = ("convert", "quantize")
FILES = (model_file.FILE, ONNX, RESULT, EXPLANATION, LIVE, "report.html", history.LOG)
"""What runs write to their folder, beside checkpoints."""
SPACE = 32 << 20
"""Bytes that the page and the JSON files may need, beside the weights."""
LARGEST_LIVE = 32 << 20
"""Characters of all networks that the page runs: they stand in a file of their own and in the page."""


def claim(out: Path, kind: str, inputs: Iterable[Path] = ()) -> None:
    """See that a run of this kind may write to `out`, before any work: that what it would replace is its own.

    Args:
        kind: "train", "convert", "demo" or "quantize".
        inputs: files and folders that the run reads.

    Raises:
        ValueError: `out` holds an input or lies in one, it holds a run of another kind, or files called as those of a
            run that no run has written.
    """
    for source in inputs:
        if source.is_dir() and source.resolve() in (out.resolve(), *out.resolve().parents):
            raise ValueError(f"{kind}: --out {out} lies in the folder that is read, {source}: give another --out")
        for name in FILES:
            refuse_inputs("--out", out / name, [source])
    found = _kind_in(out, kind)
    if found not in (kind, ""):
        raise ValueError(f"{kind}: {out} holds what sepconv {found} wrote: give another --out")


def claim_beside(out: Path, inputs: Iterable[Path] = ()) -> None:
    """The same for the folder of the network in 8-bit integers that a conversion in `out` may write.

    Raises:
        ValueError: see :func:`claim` and :func:`refuse_earlier`.
    """
    claim(out / INT8, "quantize", inputs)
    refuse_earlier(out / INT8, "quantize", False)


def _kind_in(out: Path, asked: str) -> str:
    """The kind of the run that wrote to `out`, by what is there; "" if there is nothing that a run would touch.

    Checkpoints alone do not say which of two kinds they are of: then it is the one that is asked for.
    """
    ended, trained, distilled = out / RESULT, checkpoint.checkpoints(out), checkpoint.checkpoints(out / CHECKPOINTS)
    kept = out / CHECKPOINTS / fitted.FILE
    if ended.exists():
        kind = _kind_of(ended)
    elif trained:
        kind = "train" if all(map(checkpoint.is_ours, trained)) else None
    elif kept.exists():
        kind = "convert" if fitted.is_ours(kept) else None
    elif distilled:
        either = asked if asked in _LEARNS_FROM_ANOTHER else "convert"
        kind = either if all(map(checkpoint.is_ours, distilled)) else None
    elif (out / model_file.FILE).exists():
        # A run that was killed while it wrote its results: the network is the first of them.
        kind = _kind_of_network(out / model_file.FILE)
    else:
        kind = None if any((out / name).exists() for name in FILES) else ""
    if kind is None:
        names = [*(name for name in (*FILES, CHECKPOINTS) if (out / name).exists()), *(path.name for path in trained)]
        raise ValueError(f"{out} has files that no run of sepconv wrote, {', '.join(names)}: give another --out")
    return kind


def _kind_of_network(path: Path) -> str | None:
    """The kind of run that wrote a network; None if none did."""
    try:
        card = model_file.read_card(path)
    except ValueError:
        return None
    if card is None:
        return None
    return "quantize" if card.quantized else "convert" if card.changes else "train"


def _kind_of(result: Path) -> str | None:
    """The kind of run that wrote a record; None if none did."""
    try:
        record = json.loads(result.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not {"model", "data", "normal", "versions"} <= record.keys():
        return None
    # Earlier records do not say it.
    demo = str(record.get("command")).startswith("sepconv demo")
    kind = record.get("kind", "demo" if demo else "convert" if "separable" in record else "train")
    return kind if kind in KINDS else None


def refuse_earlier(out: Path, kind: str, resume: bool) -> None:
    """See that a run that begins here replaces nothing that another one of its kind has worked for.

    A demo replaces a demo. A conversion that was interrupted goes on, if it is the same; whether it is, is found out
    when its data are known.

    Raises:
        ValueError: `out` holds results or checkpoints, and `resume` is off; or results of a training without the
            checkpoints to go on from.
    """
    if kind == "demo" or (out / CHECKPOINTS / fitted.FILE).exists():
        return
    ended, begun = (out / RESULT).exists(), checkpoint.checkpoints(out if kind == "train" else out / CHECKPOINTS)
    if (ended or begun) and not resume:
        found = "checkpoints" if begun else "results"
        raise ValueError(f"{kind}: {out} holds {found} of an earlier run: resume it, or {fitted.ELSEWHERE}")
    if kind == "train" and ended and not begun:
        raise ValueError(f"{kind}: {out} holds results of a run without its checkpoints: {fitted.ELSEWHERE}")


def finished(out: Path, kind: str, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a run that is over; None where it is not.

    Raises:
        ValueError: it is of another run.
    """
    kept = out / CHECKPOINTS
    if not (out / RESULT).exists() or checkpoint.checkpoints(kept) or (kept / fitted.FILE).exists():
        return None
    record: dict[str, Any] = json.loads((out / RESULT).read_bytes())
    if difference := fitted.difference_in_words(record.get("identity"), identity):
        raise ValueError(f"{kind}: {out} holds results of another run ({difference}): {fitted.ELSEWHERE}")
    return record


def prepare(
    out: Path,
    kind: str,
    model: nn.Module | None = None,
    *,
    resume: bool = False,
    int8: bool = False,
    live: bool = False,
) -> None:
    """See that the folder is this run's to write, can be written and has room, before any long work.

    Args:
        resume: whether it may hold a run that is gone on with.
        int8: whether a network in 8-bit integers will lie in a folder of its own there.
        live: whether the page will run networks.

    Raises:
        ValueError: see :func:`claim` and :func:`refuse_earlier`.
        OSError: it cannot be written, or has no room.
    """
    claim(out, kind)
    refuse_earlier(out, kind, resume)
    if int8:
        claim_beside(out)
    check_folder(out)
    weights = 0 if model is None else sum(t.numel() * t.element_size() for t in model.state_dict().values())
    room = SPACE + (2 * LARGEST_LIVE if live else 0)
    needed, free = 2 * weights + room, shutil.disk_usage(nearest_folder(out)).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"the results need {needed >> 20} MB but {out} has {free >> 20} MB left")


@contextmanager
def owned(out: Path, kind: str) -> Iterator[None]:
    """Inside the block the folder is this run's alone; of several processes the first stands for all."""
    if not processes().is_main_process:
        yield
        return
    with alone_in(out, kind):
        yield


def remove_checkpoints(out: Path) -> None:
    """Remove those of a distillation; whatever else lies beside them stays."""
    folder = out / CHECKPOINTS
    if processes().is_main_process and folder.is_dir():
        remove_partial_files(folder)
        for path in (*filter(checkpoint.is_ours, checkpoint.checkpoints(folder)), folder / history.LOG):
            path.unlink(missing_ok=True)
        if fitted.is_ours(folder / fitted.FILE):
            (folder / fitted.FILE).unlink()
        with suppress(OSError):
            folder.rmdir()
    processes().wait_for_everyone()


def about(model: str, data: Data | SampleData, kind: str, command: str, seconds: float) -> dict[str, Any]:
    return {
        "kind": kind,
        "model": model,
        "data": data.name,
        "command": command,
        "seconds": round(seconds, 2),
        "classes": data.classes,
        "skipped_images": len(data.skipped) if isinstance(data, Data) else 0,
        "machine": environment.machine(),
        "versions": environment.versions(),
    }


def export_onnx(model: nn.Module, data: Data | SampleData, out: Path) -> dict[str, Any]:
    """What was exported, or the reason why not: the network is usable without it."""
    try:
        exported = onnx_file.export_onnx(model, first_of(data.test, 2), out / ONNX)
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
