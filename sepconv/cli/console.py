"""What the command line shows: tables on stdout, progress and errors on stderr; colours and bars on terminals only."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from sepconv.files import replacing
from sepconv.progress import OnProgress, Step, ignore

MAX_WIDTH = 80
LINE_EVERY_S = 10.0
SLOW_S = 2.0


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

    def say(self, text: str) -> None:
        if self.shows_results:
            self.out.print(text, markup=False, soft_wrap=True)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], text_columns: int = 1
    ) -> None:
        """A table whose first columns are text and whose other columns are numbers."""
        if not self.shows_results:
            return
        table = Table(
            title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, title_justify="left", title_style="bold"
        )
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number < text_columns else "right", overflow="fold")
        for row in rows:
            table.add_row(*map(str, row))
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


def error(message: str) -> None:
    """One line on stderr, whatever is in the message."""
    print("sepconv: " + " ".join(message.split()), file=sys.stderr)


def note(message: str) -> None:
    """A remark that does not belong to the result."""
    print(" ".join(message.split()), file=sys.stderr)


def _console(stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    console.width = min(console.width, MAX_WIDTH)
    return console


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description:8}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=_console(stderr=True),
    )


def _numbers(step: Step) -> str:
    loss = "" if step.loss is None else f"loss {step.loss:.3f} "
    accuracy = "" if step.accuracy is None or math.isnan(step.accuracy) else f"accuracy {step.accuracy:.1%}"
    return (loss + accuracy).rstrip()


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
    """For logs: a line where a stage ends, and otherwise at most every ten seconds."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, step: Step) -> None:
        if step.done < step.total and time.monotonic() - self.last < LINE_EVERY_S:
            return
        self.last = time.monotonic()
        note(f"{step.stage} {step.done}/{step.total} {_numbers(step)}")
