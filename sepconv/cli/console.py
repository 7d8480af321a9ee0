"""What the command line shows: tables on stdout, progress and errors on stderr; colours and bars on terminals only."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from threading import Timer
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from sepconv.data.parts import readable
from sepconv.system.files import replacing
from sepconv.system.progress import OnProgress, Step, ignore

MIN_WIDTH, MAX_WIDTH = 40, 80
WIDEST = 400
NARROWEST, GAP = 8, 3
LINE_EVERY_S = 10.0
SLOW_S = 2.0
# Letters of a name may say which way the rest of the line runs; a terminal would obey.
DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
CONTROLS = frozenset({"Cc", "Zl", "Zp"})


class Screen:
    """The output of one command; of several processes of one run, the first speaks.

    Args:
        quiet: show nothing but errors.
        json_file: where the result goes for machines as well; "-" is stdout, which then holds nothing else.
    """

    def __init__(self, quiet: bool = False, json_file: Path | None = None) -> None:
        # What torchrun and accelerate launch set, known before anything is imported or connected.
        first = os.environ.get("RANK", "0") == "0"
        self.json_file = json_file if first else None
        self.shows_progress = first and not quiet
        self.shows_results = first and not quiet and json_file != Path("-")
        self.out = _console(stderr=False)
        self.width = self.out.width

    def say(self, text: str) -> None:
        if self.shows_results:
            self.out.print(plain(text), soft_wrap=True)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], text_columns: int = 1
    ) -> None:
        """A table whose first columns are text and whose other columns are numbers."""
        if not self.shows_results:
            return
        lines = [[plain(str(cell)) for cell in line] for line in (columns, *rows)]
        width = _least_width(lines, text_columns)
        table = Table(
            title=plain(title),
            box=SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            title_justify="left",
            title_style="bold",
        )
        for number, column in enumerate(lines[0]):
            is_text = number < text_columns
            table.add_column(
                column,
                justify="left" if is_text else "right",
                overflow="fold",
                no_wrap=not is_text and width <= MAX_WIDTH,
            )
        for line in lines[1:]:
            table.add_row(*line)
        self.out.width = min(max(self.width, width), MAX_WIDTH)
        self.out.print(table)
        self.out.print()

    def result(self, record: Any) -> None:
        """The result for machines, if a file was asked for."""
        if self.json_file is None:
            return
        text = json.dumps(record, indent=2, default=str, allow_nan=False) + "\n"
        if self.json_file == Path("-"):
            sys.stdout.write(text)
            return
        # The file may be this output under another name, such as /dev/stdout.
        sys.stdout.flush()
        with replacing(self.json_file) as file:
            file.write(text.encode())

    @contextmanager
    def says_if_slow(self, words: str) -> Iterator[None]:
        """Says what is being done, in a block that takes longer than a moment and has no progress to show."""
        timer = Timer(SLOW_S, note, [f"{words} ..."])
        # It must not keep the process from ending.
        timer.daemon = True
        if self.shows_progress:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()

    @contextmanager
    def progress(self) -> Iterator[OnProgress]:
        """A bar for each stage on a terminal, else a line now and then."""
        if not self.shows_progress:
            yield ignore
        elif sys.stderr.isatty():
            with _bars() as bars:
                yield _Bars(bars)
        else:
            yield _Lines()


def _least_width(lines: Sequence[Sequence[str]], text_columns: int) -> int:
    """What a table needs so that its numbers stay whole; a narrower terminal breaks the lines, not the numbers."""
    widths = [max(map(cell_len, column)) for column in zip_longest(*lines, fillvalue="")]
    texts, numbers = widths[:text_columns], widths[text_columns:]
    return sum(min(width, NARROWEST) for width in texts) + sum(numbers) + GAP * (len(widths) - 1)


def error(message: str) -> None:
    """One line on stderr, whatever is in the message."""
    print("sepconv: " + _one_line(message), file=sys.stderr)


def note(message: str) -> None:
    """A remark that does not belong to the result."""
    print(_one_line(message), file=sys.stderr)


def _one_line(message: str) -> str:
    return plain(" ".join(filter(None, map(str.strip, message.splitlines()))))


def plain(text: str) -> str:
    """The text on one line, with an escape for whatever would command the terminal, or is in no encoding.

    Example:
        >>> plain("a\\nb"), plain("caf\\udce9")
        ('a\\\\nb', 'caf\\\\xe9')
    """
    return "".join(_escaped(letter) for letter in readable(text))


def _escaped(letter: str) -> str:
    commands = unicodedata.category(letter) in CONTROLS or letter in DIRECTIONS
    return letter.encode("unicode_escape").decode() if commands else letter


def set_up_terminal() -> None:
    """Make widths that nothing fits into, or that are no numbers, harmless; and letters that the output lacks."""
    for name, least in (("COLUMNS", MIN_WIDTH), ("TERMINAL_WIDTH", MIN_WIDTH), ("LINES", 1)):
        if name in os.environ:
            given = os.environ.pop(name)
            if given.isascii() and given.isdigit() and len(given) < 10 and int(given) > 0:
                os.environ[name] = str(min(max(int(given), least), WIDEST))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _console(stderr: bool) -> Console:
    # Names are never markup: a class may be called [b] or :cat:.
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    console.width = min(max(console.width, MIN_WIDTH), MAX_WIDTH)
    return console


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description:8}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=_console(stderr=True),
    )


def _numbers(step: Step) -> str:
    loss = "" if step.loss is None else f"loss {step.loss:.3f} "
    accuracy = "" if step.accuracy is None or math.isnan(step.accuracy) else f"accuracy {step.accuracy:.1%}"
    error = "" if step.error is None else f"output error {step.error:.3g}"
    return (loss + accuracy + error).rstrip()


class _Bars:
    """One bar a stage; finished ones stay."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, step: Step) -> None:
        if step.stage not in self.tasks:
            self.tasks[step.stage] = self.bars.add_task(step.stage, numbers="")
        self.bars.update(self.tasks[step.stage], completed=step.done, total=step.total, numbers=_numbers(step))


class _Lines:
    """For logs: a line where a stage ends, and otherwise at most every ten seconds, with the time that remains."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self.stage, self.done, self.since = "", 0, self.last

    def __call__(self, step: Step) -> None:
        now = time.monotonic()
        if step.stage != self.stage:
            # Where it is first heard of: what was done before an interruption took no time now.
            self.stage, self.done, self.since = step.stage, step.done, now
        if step.done < step.total and now - self.last < LINE_EVERY_S:
            return
        self.last = now
        note(" ".join(filter(None, [step.stage, f"{step.done}/{step.total}", _numbers(step), self._left(step, now)])))

    def _left(self, step: Step, now: float) -> str:
        done = step.done - self.done
        if done <= 0 or step.done >= step.total:
            return ""
        seconds = (now - self.since) / done * (step.total - step.done)
        return f"({max(1, round(seconds))} s left)" if seconds < 100 else f"({round(seconds / 60)} min left)"
