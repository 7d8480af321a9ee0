"""Names that users give to classes, files and folders: printed as they are, whatever is in them, and never an error."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_run import sepconv as run
from test_cli_screen import Terminal
from test_data_dataset import png, write_images

from sepconv.cli import console, show
from sepconv.runs.predict import Prediction
from sepconv.system.progress import Step

NAMES = {
    "markup": ("[bold]x[/bold]", "[bold]x[/bold]"),
    "closing_tag": ("a[/]b", "a[/]b"),
    "emoji": (":cat:", ":cat:"),
    "line": ("a\nb", "a\\nb"),
    "escape": ("\x1b[31mred", "\\x1b[31mred"),
    "old_bytes": ("caf\udce9", "caf\\xe9"),
    "surrogate": ("a\ud800b", "a\\ud800b"),
    "direction": ("a\u202egnp.exe", "a\\u202egnp.exe"),
    "hebrew": ("\u05e9\u05dc\u05d5\u05dd", "\u05e9\u05dc\u05d5\u05dd"),
    "wide": ("\u732b\u72ac", "\u732b\u72ac"),
    "dash": ("-x", "-x"),
    "spaces": ("a  b", "a  b"),
}


@pytest.mark.parametrize(("name", "expected"), NAMES.values(), ids=NAMES)
def test_names_are_printed_as_they_are(name: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    screen = console.Screen()
    screen.table(name, (name, "n"), [(name, 1)])
    screen.say(name)
    show.predictions(screen, [Prediction(name, [name, name], [0.75, 0.25])])
    console.note(name)
    console.error(name)
    printed = capsys.readouterr()
    on_one_line = expected.replace("\\n", " ")
    assert printed.err == f"{on_one_line}\nsepconv: {on_one_line}\n"
    assert printed.out.count(expected) == 7
    title, header, rule, row, _, said, *_ = (line.rstrip() for line in printed.out.splitlines())
    assert (title, said) == (expected, expected)
    assert header.startswith(expected)
    assert row.startswith(expected)
    assert rule.isprintable()


def test_names_of_stages_are_printed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", err := Terminal())
    with console.Screen().progress() as on_progress:
        on_progress(Step("[/b]:cat:", 1, 2, 0.5, 0.5))
    assert "[/b]:cat:" in err.getvalue()


@pytest.mark.parametrize("columns", ["0", "1", "7", "-3", "x", "\N{SUPERSCRIPT TWO}", "1" + "0" * 12, "9" * 5000])
def test_any_width_prints_a_readable_table(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("LINES", columns)
    monkeypatch.setenv("TERMINAL_WIDTH", columns)
    ran = run("count", "mobilenet_v1", "--input", "3x32x32")
    assert ran.code == 0
    for part in ("mobilenet_v1", "1,048,576", "multiply-adds", "0.112", "pointwise", "4,231,976"):
        assert part in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80
    helped = run("count", "--help").out
    assert "Parameters and" in helped
    assert max(map(len, helped.splitlines())) <= 400


def test_a_long_name_beside_numbers_is_folded_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    name = "".join(chr(ord("a") + i % 26) for i in range(300))
    show.predictions(console.Screen(), [Prediction(name, [name, name], [0.75, 0.25])])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert printed.count("z") == 3 * name.count("z")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes whose names are markup, lines and bytes of an old encoding, in such a folder."""
    images = [png(value, (8, 8)) for value in range(6)]
    return write_images(tmp_path / "d\udcff[x]", {"caf\udce9 [b]\n": images, ":cat: [b]": images})


def test_a_training_with_such_names_ends_with_its_page(photos: Path, tmp_path: Path) -> None:
    (photos / "note\udce9.t\udce9t").touch()
    out = tmp_path / "out\udce9 [b]"
    words = ("vgg_small", "--data", photos, "--set", "width_mult=0.25", "--epochs", 1, "--out", out)
    ran = run("train", *words, "--json", out / "copy.json")
    assert ran.code == 0, ran.err
    assert "12 images, 1 ignored: .t\\xe9t 1" in ran.out
    assert "vgg_small on d\\xff[x]" in ran.out
    record = json.loads((out / "result.json").read_text())
    assert record["classes"] == [":cat: [b]", "caf\\xe9 [b]\n"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "caf\\xe9 [b]" in page
    ran = run("predict", out, photos, "--json", tmp_path / "answers.json")
    assert ran.code == 0, ran.err
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert [Path(answer["image"]) for answer in answers] == sorted(photos.rglob("*.png"))
    assert ran.out.count("caf\\xe9") > 6


def test_streams_that_lack_a_letter_get_its_code(tmp_path: Path) -> None:
    (tmp_path / "\u732b").mkdir()
    words = [sys.executable, "-m", "sepconv", "count", str(tmp_path / "\u732b"), "--debug"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(words[:-1], capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"sepconv: the folder .*\\u732b has no model.safetensors.*\n", done.stderr)
