"""A measurement on disk: what was measured, where, and with which versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sepconv.system import environment
from sepconv.system.files import replacing

RESULTS = Path(__file__).parent / "results"


def stamped(**content: Any) -> dict[str, Any]:
    """The content with the machine and the versions of everything that took part."""
    return {"machine": environment.machine(), "versions": environment.versions(), **content}


def path(name: str) -> Path:
    return RESULTS / f"{name}.json"


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path(name).read_text())
    return found


def save(name: str, record: dict[str, Any]) -> None:
    """Write `results/NAME.json`; a process that is killed meanwhile leaves the old file."""
    RESULTS.mkdir(exist_ok=True)
    with replacing(path(name)) as file:
        file.write((json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
