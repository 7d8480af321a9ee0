"""Ctrl-C at any time before a command begins: one line, exit code 130, no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_run import heed_interrupts
from cli_run import sepconv as run

from sepconv.cli import app
from sepconv.system import interrupt

# Stops in the first module of that name, as Ctrl-C would find it, and says that it does.
STOP = """
import sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            sys.meta_path.remove(self)
            print("here", flush=True)
            import time; time.sleep(60)
sys.meta_path.insert(0, Stop())
"""
SCRIPT = "import sys\nfrom sepconv.cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n"


@pytest.mark.parametrize(
    ("started", "module"), [("script", "torch"), ("module", "torch"), ("script", "sepconv.cli.inspect")]
)
def test_while_importing(started: str, module: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(STOP.format(module=module))
    (tmp_path / "sepconv").mkdir()
    script = tmp_path / "sepconv" / "sepconv"
    script.write_text(SCRIPT)
    root = Path(interrupt.__file__).parents[1]
    words = [str(script)] if started == "script" else ["-m", "sepconv"]
    with subprocess.Popen(
        [sys.executable, *words, "count", "vgg_small"],
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"},
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts if os.name == "posix" else None,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=90)
    assert (process.returncode, out, err) == (130, "", "sepconv: interrupted\n")


@pytest.mark.parametrize("error", [KeyboardInterrupt, "abort"])
def test_before_a_command_begins(monkeypatch: pytest.MonkeyPatch, error: object) -> None:
    def interrupted(_: object) -> None:
        raise app.typer.Abort if error == "abort" else KeyboardInterrupt

    monkeypatch.setattr(app.typer.main, "get_command", interrupted)
    run("count").failed_with(130, "interrupted")


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        ("/usr/bin/sepconv", ["python", "/usr/bin/sepconv", "train"], True),
        ("C:/Scripts/sepconv.exe", ["python", "C:/Scripts/sepconv.exe"], True),
        ("-m", ["python", "-u", "-m", "sepconv", "train"], True),
        ("-m", ["python", "-msepconv"], True),
        ("-m", ["python", "-m", "pytest", "sepconv"], False),
        ("", ["python"], False),
        ("-c", ["python", "-c", "import sepconv"], False),
        ("/home/me/train.py", ["python", "train.py"], False),
        ("/home/me/sepconv/train.py", ["python", "sepconv/train.py", "-m", "sepconv"], False),
    ],
)
def test_only_the_command_decides_about_ctrl_c(script: str, words: list[str], expected: bool) -> None:
    assert interrupt.is_command(script, words) == expected


def test_an_import_leaves_the_handler_alone_and_a_command_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupt.begin()
    assert signal.getsignal(signal.SIGINT) is before
    try:
        monkeypatch.setattr(sys, "argv", ["/usr/bin/sepconv"])
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        interrupt.begin()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as under nohup
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupt.begin()
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        interrupt.over()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
