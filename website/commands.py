"""The reference of the command line: the help of every command."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout
from unittest import mock

import typer

from sepconv.cli.app import app, run

INTRODUCTION = """# Command line

Every command has `--help` with an example and `--json FILE` for machines; `--quiet` prints nothing but errors,
`--debug` shows where an error came from. Results go to standard output, progress and errors to standard error;
`NO_COLOR` and pipes are respected. Exit codes: 0 done, 1 failed, 2 wrong arguments, 130 interrupted.
`sepconv --install-completion` teaches your shell to complete commands and options.
"""


def page() -> str:
    parts = [INTRODUCTION]
    for words in _commands():
        parts += [f"## sepconv {' '.join(words)}", "", "```text", _help(words), "```", ""]
    return "\n".join(parts)


def _commands() -> list[list[str]]:
    found = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        found += [[name, sub] for sub in getattr(command, "commands", {})] or [[name]]
    return found


def _help(words: list[str]) -> str:
    """What ``sepconv WORDS --help`` prints into a pipe of 80 columns."""
    text = io.StringIO()
    with redirect_stdout(text), mock.patch.dict(os.environ, {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}):
        run([*words, "--help"])
    return "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())
