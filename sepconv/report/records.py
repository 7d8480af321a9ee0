"""The files of a run, read and checked: what they hold is outside data and may be anything."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BEYOND = 1e30
RESULT, EXPLANATION, LIVE, LOG = "result.json", "explanation.json", "live.json", "log.jsonl"


@dataclass(frozen=True)
class Run:
    """What the files of a run say; only `result` is always there, with a name under "model"."""

    result: dict[str, Any]
    explanation: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    benchmarks: list[dict[str, Any]] = field(default_factory=list)
    live: dict[str, Any] = field(default_factory=dict)


def read(source: Path) -> Run:
    """Everything the page is made of: a folder with result.json, or benchmark files in a folder or alone.

    Raises:
        ValueError: there is nothing to show, or one of the files is damaged; one line that names the file.
    """
    if not source.exists():
        raise ValueError(f"write_report: there is no {source}")
    if source.is_file():
        return _benchmarks(source, [source])
    others = sorted(path for path in source.glob("*.json") if path.name not in (RESULT, EXPLANATION, LIVE))
    if not (source / RESULT).is_file():
        return _benchmarks(source, others)
    result = _read_object(source / RESULT)
    if not isinstance(result.get("model"), str):
        raise ValueError(f'write_report: {source / RESULT} has no name under "model", so it is not a result')
    explanation = _read_object(source / EXPLANATION) if (source / EXPLANATION).is_file() else {}
    benchmarks = [content for path in others if records_of(content := _read_json(path))]
    live = _read_object(source / LIVE) if (source / LIVE).is_file() else {}
    return Run(result, explanation, _read_rows(source / LOG), benchmarks, live)


def _benchmarks(source: Path, paths: list[Path]) -> Run:
    """A run of benchmarks alone; what they all say of machine and versions is the first one's."""
    found = [content for path in paths if records_of(content := _read_json(path))]
    if not found:
        missing = "no benchmark records" if source.is_file() else f"neither {RESULT} nor a benchmark file"
        raise ValueError(
            f"write_report: {source} has {missing}; demo, convert and train write the one, bench the other"
        )
    names = dict.fromkeys(text(row.get("suite")) for content in found for row in records_of(content))
    about = {key: found[0].get(key) for key in ("machine", "versions", "command")}
    return Run({"model": "Benchmark " + ", ".join(filter(None, names)), **about}, benchmarks=found)


def records_of(content: Any) -> list[dict[str, Any]]:
    """The records of a benchmark file; none if it is something else."""
    return dicts(content.get("records")) if isinstance(content, dict) else []


def number(value: Any) -> int | float | None:
    """The value if it is a finite number, and not beyond anything that is measured or counted."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _BEYOND:
        return None
    return value


def text(value: Any) -> str:
    """The value if it is a string or a number, as a string; empty otherwise."""
    return str(value) if isinstance(value, (str, int, float)) else ""


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is an object; an empty one otherwise."""
    return value if isinstance(value, dict) else {}


def items(value: Any) -> list[Any]:
    """The value if it is a list; an empty one otherwise."""
    return value if isinstance(value, list) else []


def dicts(value: Any) -> list[dict[str, Any]]:
    """The objects in a list; none if the value is no list."""
    return [row for row in items(value) if isinstance(row, dict)]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"write_report: {path} is damaged ({_one_line(error)})") from error


def _read_object(path: Path) -> dict[str, Any]:
    content = _read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"write_report: {path} is damaged (not an object but {type(content).__name__})")
    return content


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line that a stopped process left half-written is not one."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number_of_line, line in enumerate(lines[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"write_report: {path} is damaged in line {number_of_line} ({_one_line(error)})"
            ) from error
    return dicts(rows)


def _one_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
