"""Work that several test files look at, done once for all test processes of a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

VARIABLE = "SEPCONV_TESTS_DIR"
"""The folder of one run of the tests, which its processes inherit; ``conftest`` makes and removes it."""


def once(name: str, make: Callable[[Path], object]) -> Path:
    """The folder that ``make(folder)`` filled in whichever process came first; the others wait for it."""
    folder = Path(os.environ[VARIABLE]) / name
    done = folder.with_suffix(".done")
    with FileLock(folder.with_suffix(".lock")):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
