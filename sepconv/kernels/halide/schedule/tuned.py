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
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

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


def choose(kind: str, problem: tuple[Any, ...], usual: Schedule, others: Callable[[], Iterable[Schedule]]) -> Schedule:
    """The schedule of the table, if it is one of ``others()``; else the usual one.

    ``problem`` has to be all that the schedule depends on, in numbers and words.
    """
    if _asked is not None:
        _asked[key(kind, problem)] = Asked(kind, problem, usual, list(others()))
    if _tried:
        return _tried[0]
    known = table()
    if not known or (found := known.get(key(kind, problem))) is None:
        return usual
    return next((other for other in others() if json.loads(json.dumps(other)) == found), usual)


class Asked(NamedTuple):
    """A problem for which a schedule was chosen while :func:`asking`."""

    kind: str
    problem: tuple[Any, ...]
    usual: Any
    others: list[Any]


_asked: dict[str, Asked] | None = None
_tried: list[Any] = []


@contextmanager
def asking() -> Iterator[dict[str, Asked]]:
    """Collect the problems for which schedules are chosen, by their :func:`key`."""
    global _asked
    _asked = {}
    try:
        yield _asked
    finally:
        _asked = None


@contextmanager
def trying(schedule: Any) -> Iterator[None]:
    """Choose this schedule, whatever the problem."""
    _tried.append(schedule)
    try:
        yield
    finally:
        _tried.clear()


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
