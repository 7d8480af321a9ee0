"""What the site has beside the files of docs/: pages made of docstrings, of the command line and of records."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import commands
import reference
import results
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
GENERATED = {"reference.md": reference.page, "commands.md": commands.page, "results.md": results.page}
REPORT = "demo-report.html"
ELSEWHERE = {"benchmarks/README.md": "results.md", "README.md": "index.md"}
"""Files outside docs/ and the page that has their content."""


def on_config(config: Any) -> Any:
    config["nav"] = _existing(config["nav"], Path(config["docs_dir"]))
    return config


def _existing(entry: Any, docs: Path) -> Any:
    """The navigation without pages that nobody has written; None where nothing is left."""
    if isinstance(entry, str):
        return entry if entry in GENERATED or (docs / entry).exists() else None
    if isinstance(entry, list):
        return [kept for one in entry if (kept := _existing(one, docs))]
    kept = {title: found for title, one in entry.items() if (found := _existing(one, docs))}
    return kept or None


def on_files(files: Any, config: Any) -> Any:
    for name, page in GENERATED.items():
        files.append(File.generated(config, name, content=page()))
    files.append(File.generated(config, REPORT, content=results.demo_report()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links out of docs/ lead to the page with the same content, or become the path as text."""
    up = "../" * (page.file.src_uri.count("/") + 1)
    return re.sub(rf"\[([^\]]+)\]\({re.escape(up)}([\w./-]+)\)", lambda found: _link(*found.groups()), markdown)


def _link(words: str, path: str) -> str:
    if path in ELSEWHERE:
        return f"[{words}]({ELSEWHERE[path]})"
    return words if path in words else f"{words} (`{path}`)"
