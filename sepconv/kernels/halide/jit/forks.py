"""Nothing that is half done crosses a fork.

A forked child has one thread, the one that forked. What another one was doing stays as it was for ever, with its locks
held. Locks of ours are made anew in the child; those inside Halide and LLVM cannot be, so that a fork waits until no
other thread compiles or loads code, which takes a second or two.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_changed = threading.Condition()
_busy: dict[int, int] = {}
_forking: int | None = None


@contextmanager
def undivided() -> Iterator[None]:
    """Work that is done before another thread forks, or after it."""
    me = threading.get_ident()
    with _changed:
        while _forking not in (None, me) and me not in _busy:
            _changed.wait()
        _busy[me] = _busy.get(me, 0) + 1
    try:
        yield
    finally:
        with _changed:
            _busy[me] -= 1
            if not _busy[me]:
                del _busy[me]
            _changed.notify_all()


def in_child(renew: Callable[[], None]) -> Callable[[], None]:
    """Call this in every forked child."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=renew)
    return renew


def _before() -> None:
    global _forking
    _changed.acquire()
    _forking = me = threading.get_ident()
    while any(thread != me for thread in _busy):
        _changed.wait()


def _in_parent() -> None:
    global _forking
    _forking = None
    _changed.notify_all()
    _changed.release()


def _in_child() -> None:
    global _changed, _forking
    _changed, _forking = threading.Condition(), None
    for thread in [thread for thread in _busy if thread != threading.get_ident()]:
        del _busy[thread]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
