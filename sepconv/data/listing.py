"""Files below a folder, links followed; what is passed over is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from sepconv.data.images import readable_suffixes

# What systems and programs put beside the files of a user, in lower case; and every name that begins with a dot.
HIDDEN = frozenset(
    {"__macosx", "@eadir", "@recycle", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
    | {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__pycache__"}
)
HIDDEN_NAMES, SEEN, BROKEN_LINKS, NO_FILES = "hidden", "folders linked again", "broken links", "no regular files"
MOST_KINDS = 8


class Ignored(Counter[str]):
    """How many names of each kind were passed over."""

    def __str__(self) -> str:
        """Such as "9 ignored: .heic 5, hidden 4"."""
        kinds = [f"{kind} {count}" for kind, count in self.most_common(MOST_KINDS)]
        rest = self.total() - sum(count for _, count in self.most_common(MOST_KINDS))
        return f"{self.total()} ignored: {', '.join(kinds + [f'others {rest}'] * (rest > 0))}"


def entries(folder: Path, ignored: Ignored) -> list[Path]:
    """What is in a folder, by name, without the hidden names."""
    shown = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() in HIDDEN:
            ignored[HIDDEN_NAMES] += 1
        else:
            shown.append(path)
    return shown


def files_below(folder: Path, suffixes: Collection[str], ignored: Ignored) -> Iterator[Path]:
    """The files with one of these suffixes in a folder and in its subfolders, ordered by their paths.

    A folder that links lead to again is visited once and those above `folder` never, so that no circle is endless.
    """
    above = (*folder.absolute().parents, *folder.resolve().parents)
    return _walk(folder, suffixes, ignored, {_identity(place) for place in above})


def ignore_file(path: Path, ignored: Ignored) -> None:
    """Count what is neither a folder nor wanted."""
    if path.is_file():
        ignored[path.suffix.lower() or "without suffix"] += 1
    else:
        ignored[BROKEN_LINKS if path.is_symlink() else NO_FILES] += 1


def image_files(paths: Iterable[str | Path], ignored: Ignored | None = None) -> list[Path]:
    """The images that files and folders stand for: a folder for all images in and below it, ordered by their paths.

    Args:
        ignored: counts what is passed over.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a folder without images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        passed_over = Ignored()
        below = list(files_below(path, readable_suffixes(), passed_over))
        if not below:
            raise ValueError(f"image_files: {no_images(path, passed_over)}")
        found += below
        if ignored is not None:
            ignored.update(passed_over)
    missing = next((path for path in found if not path.is_file()), None)
    if missing is not None:
        raise FileNotFoundError(f"image_files: no such file or folder: {missing}")
    return found


def no_images(folder: Path, ignored: Ignored) -> str:
    """That a folder holds no images, and what it holds instead."""
    return f"no images in {folder}" + (f" ({ignored})" if ignored else "")


def _walk(folder: Path, suffixes: Collection[str], ignored: Ignored, visited: set[tuple[int, int]]) -> Iterator[Path]:
    if (identity := _identity(folder)) in visited:
        ignored[SEEN] += 1
        return
    visited.add(identity)
    for path in entries(folder, ignored):
        if path.suffix.lower() in suffixes and path.is_file():
            yield path
        elif path.is_dir():
            yield from _walk(path, suffixes, ignored, visited)
        else:
            ignore_file(path, ignored)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
