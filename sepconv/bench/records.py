"""Benchmark files: what was measured, on which machine, with which versions."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sepconv.system import environment
from sepconv.system.files import replacing


@dataclass(frozen=True)
class Record:
    """One contender in one case and pass.

    Attributes:
        macs: multiply-adds of the pass; 1 MAC = 2 FLOP where GFLOP/s are printed.
        bytes: of inputs, weights and outputs, each once: the least that must move.
        max_error: largest error against the float64 truth, in units of the rounding bound (at most 1 passes).
        kernel: what ran, as ``sepconv.explain`` says.
        precision: in which networks are computed; None where the suite says it.
        top1, relative_error: how far the answers to held-out images agree with those in float32 (see ``agreement``);
            None where nothing has answers.
        images_per_second: of training, as the parts of its step: forward, backward, optimizer.
    """

    suite: str
    case: str
    contender: str
    threads: int
    layout: str
    median_ms: float
    low_ms: float
    high_ms: float
    samples: int
    macs: int
    bytes: int
    max_error: float
    kernel: str
    # "pass" is a word of Python's own.
    pass_: str = "forward"
    precision: str | None = None
    top1: float | None = None
    relative_error: float | None = None
    images_per_second: float | None = None
    forward_ms: float | None = None
    backward_ms: float | None = None
    optimizer_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        row = {key: value for key, value in asdict(self).items() if value is not None}
        row["pass"] = row.pop("pass_")
        return row


def write(
    path: Path,
    records: Iterable[Record],
    peaks: dict[int, float],
    command: str,
    counts: dict[str, int] | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write one run as JSON, under a temporary name first.

    ``counts`` says how often a network has each case, ``more`` holds what one suite alone records.
    """
    content = {
        "machine": {**environment.machine(), "fma_peak_gflops": {str(n): round(p, 1) for n, p in peaks.items()}},
        "versions": environment.versions(),
        "commit": commit(),
        "command": command,
        "counts": counts or {},
        **(more or {}),
        "records": [record.to_dict() for record in records],
    }
    with replacing(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def commit() -> str:
    """The checked-out commit, with "+changes" where files differ from it; empty outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    revision = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{revision}+changes" if revision and changed else revision
