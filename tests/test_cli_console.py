"""The command line where people and programs meet it: terminals, pipes, shells, and the ends of commands."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_report_suites
from cli_run import sepconv as run

import sepconv.cli.inspect as inspect_commands
from sepconv import cli
from sepconv.cli import console, show
from sepconv.system.progress import Step


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """A table on a terminal with these environment variables."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", out := Terminal())
    console.Screen().table("Title", ("name", "number"), [("a", 1)])
    return out.getvalue()


def test_a_terminal_gets_styles_and_no_color_has_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[" in shown(monkeypatch)
    plain = shown(monkeypatch, NO_COLOR="1")
    assert not any(f"\x1b[{code}" in plain for code in (*range(30, 50), "38;", "48;"))
    assert "\x1b" not in shown(monkeypatch, TERM="dumb")


@pytest.mark.parametrize("columns", ["40", "200"])
def test_tables_fit_narrow_terminals_and_stay_readable_on_wide_ones(
    monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    out = run("count", "mobilenet_v1", "--input", "3x32x32").out
    assert max(map(len, out.splitlines())) <= min(80, max(40, int(columns)) + 40 * (columns == "40"))
    assert "".join(out.split()).count("mobilenet_v1") == 1


def test_a_bar_fits_80_columns_with_the_time_that_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stderr", err := Terminal())
    with console.Screen().progress() as on_progress:
        on_progress(Step("distil", 12, 13200, 0.123, 0.98765))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err.getvalue()).replace("\r", "\n")
    bars = [line for line in text.splitlines() if line.startswith("distil")]
    assert max(map(len, bars)) <= 80
    for part in ("12/13200", "loss 0.123 accuracy 98.8%", ":"):
        assert part in bars[-1]


def test_lines_of_a_log_say_what_remains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    lines = console._Lines()
    # Taken up where an earlier run stopped: 100 of these steps took no time now.
    for seconds, step in ((0, 100), (12, 112), (5, 117), (700, 812), (9, 1000)):
        clock[0] += seconds
        lines(Step("train", step, 1000))
    clock[0] += 20
    lines(Step("convert", 1, 10))
    clock[0] += 2000
    lines(Step("convert", 2, 10, accuracy=0.5))
    assert capsys.readouterr().err.splitlines() == [
        "train 112/1000 (15 min left)",
        "train 812/1000 (3 min left)",
        "train 1000/1000",
        "convert 1/10",
        "convert 2/10 accuracy 50.0% (267 min left)",
    ]


QUIET = {
    "count": ("count", "mobilenet_v1", "--input", "3x32x32"),
    "report": ("report", "."),
}


@pytest.mark.parametrize("words", QUIET.values(), ids=QUIET)
def test_quiet_prints_nothing_and_json_is_alone_on_the_output(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "result.json").write_text('{"model": "a_model"}')
    ran = run(*words, "--quiet", "--json", "written.json")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    written = json.loads((tmp_path / "written.json").read_text())
    alone = run(*words, "--json", "-")
    assert json.loads(alone.out).keys() == written.keys()


def test_a_command_ends_with_where_the_files_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("result.json", "report.html", "model.safetensors", "explanation.json"):
        (tmp_path / name).touch()
    show.files(console.Screen(), tmp_path, "vgg_small")
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"Written to {tmp_path}:"
    assert [line.split()[0] for line in lines] == ["report.html", "model.safetensors", "result.json"]


@pytest.mark.parametrize("kept", ["converted", "distilled"])
def test_a_distillation_that_was_undone_is_said_to_be(kept: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"name": name, "accuracy": 0.5, "seconds": 1.0} for name in ("converted", "distilled")]
    record = {"stages": rows, "kept": kept, "held_out_images": 143, "notes": []}
    show.stages(console.Screen(), record)
    said = " ".join(capsys.readouterr().out.split())
    assert ("ended below its start and was undone" in said) == (kept == "converted")
    assert "Accuracy of 143 images held out from conversion and distillation." in said
    show.stages(console.Screen(), {**record, "held_out_images": 0, "notes": ["They are too few."]})
    said = " ".join(capsys.readouterr().out.split())
    assert "They are too few." in said
    assert "held out" not in said


@pytest.mark.parametrize("suite", ["ops", "blocks"])
def test_a_benchmark_ends_with_a_table_and_its_page(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(suite: str, threads: list[int], seconds: float, match: str, path: Path, *rest: Any) -> None:
        names = {"torch": "torch-nchw"}
        rows = test_report_suites.records(suite)
        rows = [
            {**row, "contender": names.get(row["contender"], row["contender"])} for row in rows if row["threads"] == 1
        ]
        rows = [row for row in rows if row["case"] == "3x3"]
        rows += [{**row, "contender": "sepconv-bound"} for row in rows if row["contender"] == "sepconv"]
        counts = {}
        if suite == "blocks":
            rows, counts = [{**row, "case": "v1 3 b1"} for row in rows if row["pass"] == "forward"], {"v1 3 b1": 1}
        test_report_suites.benchmark(path.parent, path.name, records=rows, counts=counts)

    monkeypatch.setattr(inspect_commands, "run_suite", measured)
    ran = run("bench", suite, "--json", tmp_path / "speed.json")
    assert ran.code == 0, ran.err
    assert "Summary of speed.json" in ran.out
    assert f"Written: {tmp_path / 'speed.json'}, {tmp_path / 'speed.html'}" in ran.out
    assert max(len(line) for line in ran.out.splitlines() if not line.startswith("Written")) <= 80
    assert f"Benchmark {suite}" in (tmp_path / "speed.html").read_text()
    run("bench", suite, "--json", "-").failed_with(2, "--json must be a file")


FAILURES = {
    "no_such_command": (("convrt",), 2, "No such command"),
    "missing_argument": (("count",), 2, "Missing argument"),
    "not_a_number": (("train", "vgg_small", "--data", "digits", "--out", "o", "--epochs", "x"), 2, "--epochs"),
    "no_report": (("report", "nowhere"), 2, "there is no nowhere"),
    "nothing_to_report": (("report", "."), 2, "neither result.json nor a benchmark file"),
    "output_in_the_way": (("export", "vgg_small", "--input", "3x8x8", "--onnx", "file/x.onnx"), 1, "file"),
}


@pytest.mark.parametrize(("words", "code", "message"), FAILURES.values(), ids=FAILURES)
def test_failures_are_one_line_and_a_code(
    words: tuple[str, ...], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    run(*words).failed_with(code, message)


def test_completion_installs_and_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("shellingham.detect_shell", lambda *_: ("bash", "/bin/bash"))  # tests may run in no shell
    with pytest.raises(SystemExit) as ended:
        cli.run(["--install-completion", "bash"])
    assert ended.value.code == 0
    assert "completion installed" in capsys.readouterr().out
    script = tmp_path / ".bash_completions" / "sepconv.sh"
    assert "complete" in script.read_text()
    assert str(script) in (tmp_path / ".bashrc").read_text()
    monkeypatch.setenv("_SEPCONV_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "sepconv count mobilenet_v1")
    monkeypatch.setenv("COMP_CWORD", "2")
    with contextlib.suppress(SystemExit):
        cli.run([])
    assert capsys.readouterr().out.split() == ["mobilenet_v1", "mobilenet_v1_normal"]


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    words = "count mobilenet_v1_normal --input 3x224x224"
    command = f"{sys.executable} -m sepconv {words} | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "mobilenet_v1_normal"
    assert done.stderr == ""


def test_a_short_answer_to_a_closed_pipe_is_no_traceback_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits in the buffer, and would come to light when Python ends."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert cli.run(["count", "vgg_small", "--input", "3x32x32", "--json", "-"]) == 1
