"""docs/architecture.md is a map of what is there."""

from __future__ import annotations

import re
from pathlib import Path

import sepconv

ROOT = Path(sepconv.__file__).parent
TEXT = (ROOT.parent / "docs" / "architecture.md").read_text()


def _named() -> set[str]:
    """Files and folders in backticks; a bare file name means one beside another of the same sentence."""
    return {name for name in re.findall(r"`([\w/]+(?:\.py|/))`", TEXT)}


def test_every_file_and_folder_it_names_exists() -> None:
    files = {path.name for path in ROOT.rglob("*.py")}
    for name in _named():
        assert (ROOT / name).exists() or ("/" not in name and name in files), name


def test_it_names_every_folder() -> None:
    folders = {f"{path.parent.relative_to(ROOT)}/" for path in ROOT.glob("*/__init__.py")}
    assert folders - _named() == set()
    assert {path.name for path in ROOT.glob("*.py")} - {"__init__.py", "__main__.py"} <= _named()
