"""Object code of kernels on disk, so that a second process need not compile them again.

A file is named by a hash of everything that its code depends on: this library's kernels, activations and arithmetic as
they stand, Halide's version, the target, and the key of the kernel. It starts with a hash of the rest; one that is
damaged is made again. Machine code is taken only from a folder that belongs to this user and that nobody else can
write to.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Hashable
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import platformdirs

from sepconv import activations
from sepconv.kernels import expression
from sepconv.system.files import replacing

VARIABLE = "SEPCONV_CACHE_DIR"
MAX_FILES = 4096
_MARK = b"sepconv object code 1\n"
_DIGEST = hashlib.sha256().digest_size


def folder() -> Path | None:
    """Where the files lie: ``$SEPCONV_CACHE_DIR``, else the user's cache; None where that variable is empty."""
    chosen = os.environ.get(VARIABLE)
    if chosen == "":
        return None
    return Path(chosen or platformdirs.user_cache_dir("sepconv")) / "kernels"


def unusable() -> str:
    """Why kernels cannot be kept on disk, in a sentence; the empty string if they can."""
    place = folder()
    if place is None:
        return f"{VARIABLE} is empty"
    nearest = next(path for path in (place, *place.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        return f"{place} cannot be written"
    return _unsafe(place) if nearest == place else ""


def _unsafe(place: Path) -> str:
    """Why no machine code should be taken from a folder."""
    if not hasattr(os, "getuid"):
        return ""
    found = place.stat()
    if found.st_uid != os.getuid():
        return f"{place} belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write to {place}"
    return ""


@lru_cache(maxsize=1)
def _sources() -> str:
    """A hash of all that builds kernels."""
    total = hashlib.sha256(version("halide").encode())
    own = sorted(Path(__file__).parents[1].rglob("*.py"))
    for path in (Path(activations.__file__), Path(expression.__file__), *own):
        total.update(path.read_bytes())
    return total.hexdigest()


def path(key: Hashable, target: str) -> Path | None:
    """The file for the code of a kernel; None where none is kept. Equal keys must be equal in writing."""
    place = folder()
    if place is None:
        return None
    return place / f"{hashlib.sha256(repr((_sources(), target, key)).encode()).hexdigest()}.o"


def read(file: Path) -> bytes | None:
    """The code in a file; None where there is none, or none to be trusted."""
    try:
        if _unsafe(file.parent):
            return None
        content = file.read_bytes()
        os.utime(file)
    except OSError:
        return None
    start = len(_MARK) + _DIGEST
    code = content[start:]
    whole = content[:start] == _MARK + hashlib.sha256(code).digest()
    return code if whole else None


def write(file: Path, code: bytes) -> None:
    """Keep code in a file, if that can be done: without it the next process compiles again."""
    with suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _unsafe(file.parent):
            with replacing(file) as stream:
                stream.write(_MARK + hashlib.sha256(code).digest() + code)
            _forget_oldest(file.parent)


def _forget_oldest(place: Path) -> None:
    # Most often there is room, and to make paths of all names takes longer than to count them.
    with os.scandir(place) as names:
        count = sum(1 for _ in names)
    files = list(place.glob("*.o")) if count > MAX_FILES else []
    if len(files) > MAX_FILES:
        by_age = sorted(files, key=lambda file: file.stat().st_mtime)
        for file in by_age[: len(files) - MAX_FILES * 3 // 4]:
            file.unlink(missing_ok=True)
