"""The commands of docs/deploy.md, as far as this machine has what they need."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from cli_run import converted_folder
from cli_run import sepconv as run

TEXT = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
ELSEWHERE = ("scp",)


@pytest.mark.slow
def test_every_command_does_what_the_guide_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(converted_folder(), tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    done = []
    for line in COMMANDS:
        program, *arguments = shlex.split(line)
        if program == "sepconv":
            if "wasm-32" in arguments and not shutil.which("node"):
                continue
            ran = run(*arguments, "--quiet")
            assert ran.code == 0, (line, ran.err)
        elif program not in ELSEWHERE and shutil.which(program):
            subprocess.run([program, *arguments], check=True)
        else:
            continue
        done.append(program)
    assert done.count("sepconv") >= 5
    assert (tmp_path / "digits-pi" / "digits.h").exists()


@pytest.mark.slow
def test_c_of_the_guide_compiles(tmp_path: Path) -> None:
    """The program around the network; that of Android needs its own headers."""
    if not shutil.which("gcc"):
        pytest.skip("there is no gcc here")
    [source] = [block for block in re.findall(r"```c\n(.*?)```", TEXT, re.DOTALL) if "jni.h" not in block]
    (tmp_path / "app.c").write_text(source)
    ran = run("export", converted_folder(), "--c", tmp_path / "lib", "--name", "digits")
    assert ran.code == 0, ran.err
    subprocess.run(["gcc", "-Wall", "-Wextra", "-Werror", "-c", "app.c", "-Ilib"], cwd=tmp_path, check=True)


def test_every_target_of_the_guide_exists() -> None:
    from sepconv.device.targets import TARGETS

    named = set(re.findall(r"--target ([\w-]+)", TEXT))
    assert named
    assert named <= set(TARGETS)
