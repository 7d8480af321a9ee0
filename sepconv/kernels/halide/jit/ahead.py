"""Kernels that are all needed soon, compiled by several processes: a network is ready in less time.

They are asked for in the usual way, by code that binds kernels; while it is noted what is asked for, nothing is built.
Halide holds Python's lock while it compiles, so that threads would gain nothing: this process forks, and its children
leave object code in files. (Halide can write pipelines to files for other programs, but not all that a schedule says
comes back.) Whatever fails there is built later, in this process, where the reason is told.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import Buffer, arguments
from sepconv.kernels.halide.jit.machine_code import Bound, Kernel
from sepconv.kernels.halide.jit.runtime import Build, BuildError

# A fork takes some milliseconds, a kernel some tenths of a second.
_LEAST_KERNELS = 4
_MOST_PROCESSES = 4
# Seconds that a child may take for the last kernel: one that does not end is not waited for.
_PATIENCE = 60.0


class Wanted(NamedTuple):
    """A kernel as ``runtime.compiled`` is asked for it."""

    key: Hashable
    build: Build
    old: bool


class _Unbuilt(Kernel):
    """In the place of a kernel that is noted: it can be bound, not called."""

    def __init__(self) -> None:
        self.name, self._enter = "unbuilt", None

    def bind(self, *given: Buffer | int | float) -> Bound:
        return Bound(self, arguments(0, *given))


@contextmanager
def noted() -> Iterator[list[Wanted]]:
    """What is asked for in this context, and is not built meanwhile: nothing that is bound may be called."""
    asked: dict[tuple[Hashable, bool], Wanted] = {}
    found: list[Wanted] = []

    def note(key: Hashable, build: Build, old: bool) -> Kernel:
        asked.setdefault((key, old), Wanted(key, build, old))
        return _Unbuilt()

    with runtime.made_by(note):
        yield found
    found += asked.values()


def build(asked: Sequence[Wanted]) -> None:
    """Compile those that are new, if they are many, with the help of other processes."""
    new = [one for one in asked if not runtime.known(one.key, one.old)]
    children = min(_cores(), _MOST_PROCESSES, len(new) // (_LEAST_KERNELS // 2)) - 1
    if len(new) < _LEAST_KERNELS or children < 1:
        return
    with suppress(OSError), tempfile.TemporaryDirectory(prefix="sepconv-", ignore_cleanup_errors=True) as folder:
        _share_out(new, Path(folder), children)


def _cores() -> int:
    """As many as this process may use; one where a fork without another program is not safe."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def _share_out(new: Sequence[Wanted], folder: Path, children: int) -> None:
    """Kernels belong to the process that takes them first; children begin with the last."""
    started = [_forked(new, folder) for _ in range(children)]
    try:
        for i, one in enumerate(new):
            if _take(folder, i):
                with suppress(BuildError):
                    runtime.compiled(one.key, one.build, one.old)
        _wait(started)
    finally:
        for child in started:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    for i, one in enumerate(new):
        with suppress(OSError, BuildError):
            runtime.keep(one.key, one.old, (folder / f"{i}.o").read_bytes())


def _forked(new: Sequence[Wanted], folder: Path) -> int:
    with warnings.catch_warnings():
        # It may be said that other threads hold locks: those of ours and of Halide are seen to (see ``forks``).
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        child = os.fork()
    if child:
        return child
    try:
        _compile_share(new, folder)
    finally:
        os._exit(0)


def _compile_share(new: Sequence[Wanted], folder: Path) -> None:
    """What a child does."""
    for i in reversed(range(len(new))):
        if _take(folder, i):
            with suppress(Exception):
                part = folder / f"{i}.part"
                part.write_bytes(runtime.object_code(new[i].build, new[i].old))
                part.rename(folder / f"{i}.o")


def _take(folder: Path, number: int) -> bool:
    """Whether it is for this process to compile: for one alone it is."""
    try:
        os.close(os.open(folder / f"{number}.taken", os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    return True


def _wait(children: list[int]) -> None:
    """Until all have ended, and been taken off the list, or patience has."""
    end = time.monotonic() + _PATIENCE
    while children and time.monotonic() < end:
        for child in list(children):
            ended = child
            with suppress(ChildProcessError):  # somebody else has waited for it
                ended, _ = os.waitpid(child, os.WNOHANG)
            if ended:
                children.remove(child)
        time.sleep(0.002)
