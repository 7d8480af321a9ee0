"""Files that are either complete or absent: written under a temporary name, flushed to disk, then renamed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".partial"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that takes the name `path` only when the block ends without an exception.

    Raises:
        OSError: the folder cannot be written or the disk is full; the message names `path`, nothing is left.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder) / "note.txt") as file:
        ...         written = file.write(b"whole")
        ...     (Path(folder) / "note.txt").read_text()
        'whole'
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def name_for_libraries(path: Path) -> Iterator[str]:
    """The file's name; another one where it is not UTF-8, which some libraries refuse to open."""
    if not re.search("[\ud800-\udfff]", str(path)):
        yield str(path)
        return
    with path.open("rb") as file:
        yield f"/dev/fd/{file.fileno()}"


def make_folder(path: Path) -> Path:
    """Create the folder `path` with its parents; an OSError says in one line why it cannot be used."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with replacing(path / "write-test"):
            pass
        (path / "write-test").unlink()
    except OSError as error:
        raise OSError(error.errno, f"cannot write to the folder {path}: {error.strerror or error}") from error
    return path


def remove_partial_files(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder`."""
    for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets a folder be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
