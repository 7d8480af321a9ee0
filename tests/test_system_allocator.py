"""Memory that is freed and asked for again is the same memory, once that was asked for."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from sepconv.cli import jobs
from sepconv.cli.app import run
from sepconv.system import allocator

_FAULTS = """
import ctypes, resource, sys
from sepconv.system.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size = 256 << 20
for step in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", _FAULTS, how], capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_stays_with_the_process() -> None:
    pages = (256 << 20) // 4096
    assert _faults("give back") >= pages // 512  # as few as that where pages are huge
    assert _faults("keep") < pages // 1024


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    assert not allocator.keep_freed_memory()


@pytest.mark.parametrize(
    "command",
    [
        ["demo"],
        ["train", "vgg_small", "--data", "digits"],
        ["convert", "vgg_small", "--data", "digits", "--epochs", "0"],
    ],
    ids=lambda command: command[0],
)
def test_commands_that_train_ask_for_it(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> bool:
        raise OSError("asked")

    monkeypatch.setattr(jobs, "keep_freed_memory", asked)
    with pytest.raises(OSError, match="asked"):
        run([*command, "--out", str(tmp_path / "out"), "--debug"])
