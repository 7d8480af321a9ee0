"""Ctrl-C while the command `sepconv` still imports: one line and the exit code, where Python would show a traceback.

The imports take seconds. An exception in the middle of them would pass through other libraries, some of which turn it
into errors of their own; so the process ends at once, which loses nothing, since nothing has begun. Importing this file
does nothing in any other process.
"""

from __future__ import annotations

import os
import signal
import sys
from itertools import pairwise
from pathlib import Path
from types import FrameType

INTERRUPTED = 130


def is_command(script: str, words: list[str]) -> bool:
    """Whether a process was started as `sepconv` or `python -m sepconv`.

    Args:
        script: `sys.argv[0]`, which is "-m" while Python looks for the module.
        words: the whole command line, `sys.orig_argv`.
    """
    if script != "-m":
        return Path(script).name.removesuffix(".exe") in ("sepconv", "sepconv-script.py", "sepconv-script.pyw")
    return "-msepconv" in words or ("-m", "sepconv") in pairwise(words)


def begin() -> None:
    """From now on Ctrl-C ends the process, if this is the command and nobody else has decided about Ctrl-C."""
    ours = is_command(sys.argv[0] if sys.argv else "", sys.orig_argv)
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def over() -> None:
    """Ctrl-C is an exception again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"sepconv: interrupted\n")
    os._exit(INTERRUPTED)


begin()
