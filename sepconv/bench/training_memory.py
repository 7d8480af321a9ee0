"""How much memory one step of training needs, each contender in a process of its own.

What is told is the most that the process holds during some steps, less what it holds between two: activations kept for
the way back and gradients count; weights, images, the optimizer's state, libraries and generated code do not.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sepconv.bench.records import Record
from sepconv.bench.trained import CASES_BY_NAME
from sepconv.bench.trainee import trainee
from sepconv.system.threads import threads_set_to

_STEPS = 3
_PROCESS = Path("/proc/self")


def measure(found: Sequence[Record], threads: int, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """Of every case, contender and precision among the records; ``bytes`` is None where the system does not tell."""
    rows = []
    for case, contender, layout, precision in dict.fromkeys(
        (r.case, r.contender, r.layout, r.precision or "float32") for r in found if r.threads == threads
    ):
        progress(f"memory: {case}, {contender} {layout} in {precision}")
        held = _in_a_process(case, contender, layout, precision, str(threads))
        rows.append({"case": case, "contender": contender, "layout": layout, "precision": precision, "bytes": held})
    return rows


def _in_a_process(*given: str) -> int | None:
    command = [sys.executable, "-m", "sepconv.bench.training_memory", *given]
    done = subprocess.run(command, env=os.environ.copy(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"bench training: memory of {', '.join(given)}: {done.stderr.strip().splitlines()[-1:]}")
    held: int | None = json.loads(done.stdout.strip().splitlines()[-1])
    return held


def held_by_a_step(step: Callable[[], object]) -> int | None:
    """Bytes at the highest of a step over what is held before it."""
    for _ in range(2):
        step()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is None or not (_PROCESS / "clear_refs").exists():
        return None
    trim(0)
    before = _resident("VmRSS")
    (_PROCESS / "clear_refs").write_text("5")  # forget the peak so far
    for _ in range(_STEPS):
        step()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    line = next(line for line in (_PROCESS / "status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def main(case: str, contender: str, layout: str, precision: str, threads: str) -> None:
    name = contender if contender in ("sepconv", "torch.compile") else f"{contender}-{layout}"
    with threads_set_to(int(threads)):
        one = trainee(CASES_BY_NAME[case], name, precision, f"torch-{layout}")
        print(json.dumps(held_by_a_step(one.step)))


if __name__ == "__main__":
    main(*sys.argv[1:])
