"""The names of splits, in any case: which of several folders, files or tables are for training and which are not."""

from __future__ import annotations

import re
from collections.abc import Iterable

WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
}
_WORD = f"({'|'.join(WORDS)})(?:[ _.-]?(?:set|data|images?|split))?"
_NAME = re.compile(rf"(.*[ _.-])?{_WORD}([ _.-]?\d+)?", re.IGNORECASE | re.DOTALL)
_BEGINNING = re.compile(rf"{_WORD}(?![a-z])", re.IGNORECASE)


def splits_among(names: Iterable[str]) -> dict[str, list[str]]:
    """The names that are of splits, by kind: "train", "test" and "val".

    A name with more before or behind, such as seg_train or train2017, counts only beside another split that has the
    same: bullet_train alone is a class.

    Example:
        >>> splits_among(["Training", "Test_Set", "cat", "bullet_train"])
        {'train': ['Training'], 'test': ['Test_Set']}
    """
    groups: dict[str, dict[str, list[str]]] = {}
    for name in names:
        if match := _NAME.fullmatch(name):
            kinds = groups.setdefault(((match[1] or "") + (match[3] or "")).lower(), {})
            kinds.setdefault(WORDS[match[2].lower()], []).append(name)
    found: dict[str, list[str]] = {}
    for more, kinds in groups.items():
        if not more or ("train" in kinds and len(kinds) > 1):
            for kind, named in kinds.items():
                found.setdefault(kind, []).extend(named)
    return found


def split_at_beginning(stem: str) -> str | None:
    """The split that the name of a file begins with, such as test-00000-of-00001.

    Example:
        >>> split_at_beginning("test-00000-of-00001"), split_at_beginning("devices")
        ('test', None)
    """
    match = _BEGINNING.match(stem)
    return match and WORDS[match[1].lower()]


def roles(train: tuple[str, int], test: tuple[str, int], val: tuple[str, int] | None) -> str:
    """Which split, with so many images, serves for what."""
    said = f"{train[0]} ({train[1]} images) is for training, {test[0]} ({test[1]}) for testing"
    return said if val is None else f"{said}; {val[0]} ({val[1]}) is kept apart from both"
