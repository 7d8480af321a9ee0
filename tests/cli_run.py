"""The command line as tests call it: in this process, with its output."""

from __future__ import annotations

import contextlib
import io
import signal
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import shared

from sepconv import cli

SMALL = ("vgg_small", "--data", "digits", "--set", "width_mult=0.25", "--batch-size", 64)


@dataclass
class Ran:
    code: int
    out: str
    err: str

    def failed_with(self, code: int, *parts: str) -> None:
        """The exit code, and one line on stderr that holds every part; nothing of a traceback."""
        assert self.code == code, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("sepconv: ") and "warning" not in line]
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0]
        for part in parts:
            assert part in lines[0]
        assert "Traceback" not in self.err + self.out


def sepconv(*arguments: object) -> Ran:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run([str(argument) for argument in arguments])
    return Ran(code, out.getvalue(), err.getvalue())


@cache
def trained_folder() -> Path:
    """A small network trained on the digits for three epochs, by the command line; made once for all tests."""
    return shared.once("trained", _train)


def _train(folder: Path) -> None:
    ran = sepconv("train", *SMALL, "--epochs", 3, "--lr", 0.05, "--out", folder, "--json", folder / "copy.json")
    assert ran.code == 0, ran.err


@cache
def converted_folder() -> Path:
    """That network after the main job, by the command line; made once for all tests."""
    return shared.once("converted", _convert)


def _convert(folder: Path) -> None:
    options = ("--data", "digits", "--budget", "1/4", "--epochs", 1, "--batch-size", 64, "--batch", 2)
    ran = sepconv("convert", trained_folder(), *options, "--out", folder)
    assert ran.code == 0, ran.err


def heed_interrupts() -> None:
    """In a new process, before its program: shells start what is in the background with interrupts ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
