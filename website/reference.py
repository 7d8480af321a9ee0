"""The Python reference: signatures and docstrings of the public names as one page of Markdown."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from typing import Any

MODULES = {
    "sepconv": "",
    "sepconv.models": "Networks as the papers describe them.",
    "sepconv.train": "Training and distillation, in one process or many.",
    "sepconv.data": "Data sets as batches.",
    "sepconv.leaves": "What networks take and give, whatever its structure.",
    "sepconv.quantize": "Networks of 8-bit integers, and what was done to make them.",
    "sepconv.reference": "The mathematics in plain PyTorch: what every kernel is tested against, in float64.",
    "sepconv.runs.model_file": "Networks as files.",
    "sepconv.runs.onnx_file": "Networks as ONNX.",
    "sepconv.report": "The page of a run.",
}
SECTION = re.compile(r"^([A-Z][A-Za-z ]*):(.*)$")
CODE = ("Shape", "Example", "Examples")
NAMED = ("Args", "Attributes", "Raises")


def page() -> str:
    parts = ["# Python reference", "Made from the docstrings of the version this site was built with.", ""]
    for name, words in MODULES.items():
        module = importlib.import_module(name)
        parts += [f"## {name}", words or str(inspect.getdoc(module)), ""]
        for public, thing in _public(module):
            parts += [f"### {public} {{ #{name}.{public} }}", _signature(public, thing), markdown(_doc(thing)), ""]
    return "\n".join(parts)


def _public(module: Any) -> list[tuple[str, Any]]:
    """Functions and classes that belong to the module: its own, or those a package takes from its files."""
    family = module.__name__ if module.__name__ != "sepconv" else "sepconv."
    found = {
        name: thing
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(thing) or inspect.isclass(thing))
        and str(thing.__module__).startswith(family)
    }
    return sorted(found.items(), key=lambda item: item[0].lower())


def _signature(name: str, thing: Any) -> str:
    if inspect.isclass(thing) and issubclass(thing, BaseException):
        return ""
    # Annotations are strings in these files; the quotes around defaults are theirs.
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", f"{name}{inspect.signature(thing)}")
    if len(text) > 90:
        text = re.sub(r", (?=\*|\w+:|\w+=)", ",\n    ", text.replace("(", "(\n    ", 1))
        text = re.sub(r"\)( -> .*)?$", r"\n)\1", text)
    return f"```python\n{text}\n```"


def _doc(thing: Any) -> str:
    doc = inspect.getdoc(thing) or ""
    return "" if inspect.isclass(thing) and doc == inspect.getdoc(thing.__mro__[1]) else doc


def markdown(doc: str) -> str:
    """A docstring as Markdown: its sections become headings, arguments a list, shapes and examples code."""
    parts: list[str] = []
    lines = doc.splitlines()
    while lines:
        line = lines.pop(0)
        section = SECTION.match(line)
        if not section or section[1] not in (*CODE, *NAMED, "Returns", "Reference"):
            parts.append(_words(line))
            continue
        first, body = section[2].strip(), []
        while lines and (not lines[0].strip() or lines[0].startswith(" ")):
            body.append(lines.pop(0))
        parts += ["", f"**{section[1]}**", "", *_section(section[1], _dedented(first, body))]
    return "\n".join(parts)


def _dedented(first: str, body: list[str]) -> list[str]:
    return f"{first}\n{textwrap.dedent(chr(10).join(body))}".strip("\n").splitlines()


def _section(name: str, lines: list[str]) -> list[str]:
    if name in CODE:
        return [f"```{'text' if name == 'Shape' else 'pycon'}", *lines, "```", ""]
    if name in NAMED:
        return [*(re.sub(r"^(\*{0,2}\w[^:]*):", r"- **`\1`**:", _words(line)) for line in lines), ""]
    return [*map(_words, lines), ""]


def _words(line: str) -> str:
    """Roles and double backticks of docstrings as Markdown has them."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", line).replace("``", "`")
