"""``sepconv export --c``: a library from the command line, and one clear line where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_run import sepconv as run
from device_run import native

SMALL = ("mobilenet_v1", "--set", "width_mult=0.25", "--set", "num_classes=10", "--input", "3x32x32")
MORE = ("--threads", "2", "--check", "--json", "-")


@pytest.mark.slow
def test_export_c_writes_and_checks_a_library(tmp_path: Path) -> None:
    out = tmp_path / "lib"
    ran = run("export", *SMALL, "--c", out, "--target", native(), "--name", "tiny", *MORE)
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["checked"] == "the example gives the model's answer"
    assert found["threads"] == 2
    assert found["inputs"] == [[1, 3, 32, 32]]
    names = {path.name for path in out.iterdir()}
    assert names == {"libtiny.a", "tiny.o", "tiny.h", "example.c", "CMakeLists.txt", "README.md", "manifest.json"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*SMALL,), "give --onnx FILE or --c DIR"),
        ((*SMALL, "--c", "out", "--onnx", "out.onnx"), "give --onnx FILE or --c DIR"),
        ((*SMALL, "--c", "out", "--target", "mips"), "target must be one of x86-64-linux,"),
        ((*SMALL, "--c", "out", "--precision", "int8"), "make one by sepconv quantize"),
        ((*SMALL, "--c", "out", "--precision", "half"), "--precision must be one of float32, int8"),
        ((*SMALL, "--c", "out", "--threads", "65"), "threads must be from 1 to 64, got 65"),
        ((*SMALL, "--c", "out", "--target", "wasm-32", "--threads", "2"), "threads must be 1, since wasm-32 has none"),
        ((*SMALL[:5], "--c", "out"), "give --input, such as 3x224x224"),
        ((*SMALL, "--c", "taken/out"), "cannot write to the folder"),
    ],
)
def test_one_line_where_there_is_no_library(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    ran = run("export", *arguments)
    assert ran.code != 0
    lines = [line for line in ran.err.splitlines() if line.startswith("sepconv: ")]
    assert len(lines) == 1, ran.err
    assert message in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
