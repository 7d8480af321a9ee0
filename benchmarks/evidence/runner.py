"""Steps that are done once: a finished record is skipped, a running step is left to the process that runs it."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import record

RUNS = record.RESULTS.parent / "runs"
"""Weights and checkpoints: not kept in the repository, made again by the steps that need them."""


@dataclass(frozen=True)
class Step:
    """One measurement.

    Args:
        name: of its record, `results/evidence-NAME.json`, and of its folder, `runs/NAME`.
        work: makes the measurement; goes on where an interrupted call stopped, with what its folder holds.
        needs: names of the steps that have to be finished first.
    """

    name: str
    work: Callable[[Path], dict[str, Any]]
    needs: tuple[str, ...] = ()


def record_path(name: str) -> Path:
    return record.path(f"evidence-{name}")


def finished(name: str) -> bool:
    return record_path(name).exists()


def read(name: str) -> dict[str, Any]:
    """The record of a finished step."""
    return record.read(f"evidence-{name}")


def run(steps: Sequence[Step]) -> None:
    """Do the steps in their order; several processes that do the same steps share them out."""
    left = [step for step in steps if not finished(step.name)]
    while left:
        ready = [step for step in left if all(finished(need) for need in step.needs)]
        if not any(_attempt(step) for step in ready):
            # Everything that can be done now is being done elsewhere.
            time.sleep(10)
        left = [step for step in left if not finished(step.name)]


def _attempt(step: Step) -> bool:
    """Do one step, unless another process is at it or has done it."""
    folder = RUNS / step.name
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock") as mine:
        if not mine or finished(step.name):
            return False
        print(f"{time.strftime('%H:%M:%S')} {step.name} begins", flush=True)
        begin, work = time.perf_counter(), time.process_time()
        result = step.work(folder)
        found = record.stamped(
            step=step.name,
            seconds_of_last_call=round(time.perf_counter() - begin, 1),
            cpu_seconds_of_last_call=round(time.process_time() - work, 1),
            threads=torch.get_num_threads(),
            **result,
        )
        record.save(f"evidence-{step.name}", found)
        print(f"{time.strftime('%H:%M:%S')} {step.name} ends", flush=True)
    return True


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether this process got the lock, which the system takes back when the process ends in any way."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
