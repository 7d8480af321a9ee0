"""Files that are either complete or absent: written under a temporary name, flushed to disk, then renamed.

What is no regular file (a device, a pipe, an open descriptor) cannot be renamed to and is written straight into.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".sepconv.lock"
TEMPORARY_SUFFIX = ".partial"
_TEMPORARY = re.compile(r".+\.\d+\.partial")
_DESCRIPTORS = re.compile(r"/proc/(self|\d+)(/task/\d+)?/fd|/dev/fd")
_MOST_LINKS = 40
_LONGEST_STEM = 60
"""Characters of a name that its temporary name keeps, since file systems take no more than 255 bytes."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that takes the name `path` only when the block ends without an exception.

    A link stays and what it leads to is replaced, which keeps its mode; folders that are missing are made. Devices,
    pipes and open descriptors are written straight into.

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
    try:
        place = _place(path)
        with _straight(place) if _is_special(place) else _renamed(place) as file:
            yield file
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def _straight(place: Path) -> Iterator[BinaryIO]:
    """A descriptor of this process goes on where it stands: opened anew, a redirected output would be cut off."""
    own = _DESCRIPTORS.fullmatch(str(place.parent)) and place.parent.samefile("/dev/fd")
    with os.fdopen(os.dup(int(place.name)), "wb") if own else place.open("wb") as file:
        yield file


@contextmanager
def _renamed(place: Path) -> Iterator[BinaryIO]:
    made = [folder for folder in place.parents if not folder.exists()]
    temporary = place.with_name(f"{place.name[:_LONGEST_STEM]}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            _keep_mode(place, file.fileno())
            os.fsync(file.fileno())
        temporary.replace(place)
        made = []
        _flush_folder(place.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


@contextmanager
def name_for_libraries(path: Path) -> Iterator[str]:
    """The file's name; another one where it is not UTF-8, which some libraries refuse to open."""
    if not re.search("[\ud800-\udfff]", str(path)):
        yield str(path)
        return
    with path.open("rb") as file:
        yield f"/dev/fd/{file.fileno()}"


def _keep_mode(place: Path, descriptor: int) -> None:
    """Owner and permissions of the file that is replaced, as far as this user may give them."""
    if os.name == "posix" and place.exists():
        old = place.stat()
        with suppress(OSError):
            os.fchown(descriptor, old.st_uid, old.st_gid)
        with suppress(OSError):
            os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def _place(path: Path) -> Path:
    """Where links lead; an entry of /proc/self/fd is no link that one may follow, and is returned itself."""
    for _ in range(_MOST_LINKS):
        path = Path(os.path.realpath(path.parent)) / path.name
        if _DESCRIPTORS.fullmatch(str(path.parent)) or not path.is_symlink():
            return path
        path = path.parent / path.readlink()
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _is_special(place: Path) -> bool:
    """Whether a file stands there that is to be written into, not replaced."""
    if _DESCRIPTORS.fullmatch(str(place.parent)):
        return True
    return place.exists() and not place.is_file()


def check_output(path: Path) -> None:
    """Find out before long work whether `path` can be written; nothing is left behind.

    Raises:
        OSError: it is a folder, may not be written, or stands where no file can stand.
    """
    try:
        place = _place(path)
        if _exists(place):
            if place.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder")
            if not os.access(place, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        elif _is_special(place):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    if not _is_special(place):
        _try_folder(place.parent, path.parent)


def _exists(place: Path) -> bool:
    """As ``Path.exists``, but names that cannot be are errors."""
    try:
        place.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_folder(path: Path) -> None:
    """Find out before long work whether files can be written to the folder `path`, which need not be there yet.

    Raises:
        OSError: they cannot; one line that says why.
    """
    _try_folder(path, path)


def _try_folder(folder: Path, name: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=nearest_folder(folder)):
            pass
    except OSError as error:
        raise OSError(f"cannot write to the folder {name}: {error.strerror or error}") from error


def nearest_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there.

    Raises:
        NotADirectoryError: that is a file.
    """
    found = next(folder for folder in (path, *path.absolute().parents) if _exists(folder))
    if not found.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return found


def refuse_inputs(name: str, output: Path, inputs: Iterable[Path]) -> None:
    """ValueError if writing `output`, called `name`, would replace one of `inputs` or a file in a folder of them."""
    place = Path(os.path.realpath(output))
    if not place.is_file():
        return
    for source in inputs:
        if source.exists() and (source.samefile(place) or source.resolve() in place.parents):
            raise ValueError(f"{name} {output} would overwrite the input {source}")


def remove_partial_files(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder`."""
    for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path, name: str) -> Iterator[None]:
    """Inside the block no other process is in such a block for this folder; one that dies is in none any longer.

    Where a file system or Windows knows no such locks, nothing is checked.

    Args:
        name: of the caller, for the message.

    Raises:
        ValueError: another process is.
        OSError: the folder cannot be written.
    """
    if fcntl is None:
        yield
        return
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{name}: another process is writing to {folder}: give another --out, or wait") from None
        except OSError:  # as some network file systems say
            pass
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):
                for place in made:
                    place.rmdir()  # where a run was refused, nothing is in it


def _flush_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets a folder be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
