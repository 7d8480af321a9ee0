"""Exit codes, and one line for whatever goes wrong: 0 done, 1 failed, 2 wrong arguments, 130 interrupted."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import typer

from sepconv.cli import console
from sepconv.system.interrupt import INTERRUPTED as INTERRUPTED

FAILED, WRONG_ARGUMENTS = 1, 2

# What the library raises when it is asked for something that is not there or makes no sense.
_ARGUMENT_ERRORS = (ValueError, TypeError, FileNotFoundError, ModuleNotFoundError)
_FAILURES = (OSError, RuntimeError)


class Interrupted(Exception):
    """Ctrl-C during work that leaves something behind; the message says what, and how to go on."""


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors become one line and an exit code; its option `debug` shows the traceback instead."""

    @wraps(command)
    def run(**options: Any) -> None:
        try:
            with _warnings_as_lines():
                command(**options)
                # What was written to a pipe that nobody reads any more is found out here, not when Python ends.
                sys.stdout.flush()
        except (KeyboardInterrupt, Interrupted) as error:
            console.error(str(error) or "interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # Whoever read our output has gone; the interpreter must not try to flush it at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(FAILED) from None
        except Exception as error:
            if options.get("debug") or isinstance(error, typer.Exit):
                raise
            console.error(_message(error))
            raise typer.Exit(_code(error)) from None

    return run


def _code(error: Exception) -> int:
    return WRONG_ARGUMENTS if isinstance(error, _ARGUMENT_ERRORS) else FAILED


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, (*_ARGUMENT_ERRORS, *_FAILURES)):
        return str(error)
    return f"{type(error).__name__}: {error} (a defect of sepconv; --debug shows where)"


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    def show(message: Warning | str, *where: Any, **rest: Any) -> None:
        console.note(f"sepconv: warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextmanager
def resumable(folder: Path, command: str) -> Iterator[None]:
    """Ctrl-C inside the block says what is kept and how to go on."""
    from sepconv.runs import fitted
    from sepconv.train import checkpoint

    try:
        yield
    except KeyboardInterrupt:
        kept = [*checkpoint.checkpoints(folder), *folder.glob(fitted.FILE)]
        if not kept:
            raise Interrupted("interrupted before the first epoch was over: there is no checkpoint") from None
        again = command if "--resume" in command.split() else f"{command} --resume"
        raise Interrupted(f"interrupted: {kept[0]} is kept; to go on: {again}") from None
