"""Schedules that were measured on this machine to be faster than those of the rules (``sepconv bench tune``).

The table is a JSON file in the cache folder, one for each kind of processor. It holds numbers only, and what it says
about a problem counts only where it is one of the schedules that the tuner itself would try.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sepconv.kernels.case import Case
from sepconv.kernels.halide.jit import code_cache
from sepconv.kernels.halide.schedule import machine
from sepconv.system.files import replacing

Schedule = TypeVar("Schedule", bound=tuple[Any, ...])
Table = dict[str, list[Any]]

_tables: dict[str | None, Table] = {}


def path() -> Path | None:
    """The file for this machine; None where nothing is kept on disk."""
    folder = code_cache.folder()
    name = re.sub(r"\W+", "-", machine.host().name).strip("-").lower()
    return None if folder is None else folder.parent / "tuned" / f"{name}.json"


def table() -> Table:
    """Problem -> schedule, as the file says; empty where there is none that can be read."""
    place = os.environ.get(code_cache.VARIABLE)
    if place not in _tables:
        _tables[place] = _read(path())
    return _tables[place]


def _read(file: Path | None) -> Table:
    try:
        content = {} if file is None else json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    found = content.get("schedules") if isinstance(content, dict) else None
    return found if isinstance(found, dict) else {}


def key(kind: str, problem: Iterable[Any]) -> str:
    """A problem in writing."""
    return json.dumps([kind, *problem])


def choose(
    kind: str, problem: tuple[Any, ...], usual: Schedule, others: Callable[[], Iterable[Schedule]], case: Case
) -> Schedule:
    """The schedule of the table, if it is one of ``others()``; else the usual one.

    ``problem`` has to be all of the case that the schedule depends on, in numbers and words.
    """
    asked, tried = _asked.get(), _tried.get()
    if asked is not None:
        asked[key(kind, problem)] = Asked(kind, case, usual, list(others()))
    if tried is not None and tried[0] == case:
        schedule: Schedule = tried[1]
        return schedule
    known = {} if machine.targeted() else table()
    if not known or (found := known.get(key(kind, problem))) is None:
        return usual
    return next((other for other in others() if json.loads(json.dumps(other)) == found), usual)


class Asked(NamedTuple):
    """A case for which a schedule was chosen while :func:`asking`."""

    kind: str
    case: Case
    usual: Any
    others: list[Any]


_asked: ContextVar[dict[str, Asked] | None] = ContextVar("sepconv_asked", default=None)
_tried: ContextVar[tuple[Case, Any] | None] = ContextVar("sepconv_tried", default=None)


@contextmanager
def asking() -> Iterator[dict[str, Asked]]:
    """Collect what schedules are chosen for in this context, by their :func:`key`."""
    found: dict[str, Asked] = {}
    token = _asked.set(found)
    try:
        yield found
    finally:
        _asked.reset(token)


@contextmanager
def trying(case: Case, schedule: Any) -> Iterator[None]:
    """Choose this schedule for this case, in this context; nowhere else."""
    token = _tried.set((case, schedule))
    try:
        yield
    finally:
        _tried.reset(token)


def keep(found: Mapping[str, Schedule]) -> Path | None:
    """Add schedules to the table, by :func:`key`, here and on disk.

    Raises:
        OSError: the file cannot be written.
    """
    file = path()
    if file is None:
        return None
    schedules = {**_read(file), **{problem: list(schedule) for problem, schedule in found.items()}}
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as stream:
        content = {"machine": machine.host().name, "schedules": schedules}
        stream.write((json.dumps(content, indent=1) + "\n").encode())
    forget()
    return file


def forget() -> None:
    """Read the file again when a schedule is next chosen."""
    _tables.clear()
