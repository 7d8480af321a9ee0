"""Object code: what it may call, what it is kept under on disk, and what is not taken from there."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sepconv
from sepconv.kernels.halide.jit import code_cache, machine_code, runtime
from sepconv.kernels.halide.jit.buffers import Buffer, buffer
from sepconv.ops import call

if runtime.missing():
    pytest.skip(runtime.missing(), allow_module_level=True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache on disk, and none in memory."""
    monkeypatch.setenv(code_cache.VARIABLE, str(tmp_path))
    runtime.clear_cache()
    return tmp_path / "kernels"


class _Halving:
    """A kernel with a number and a tile on the heap, that counts how often it is built."""

    def __init__(self) -> None:
        self.built = 0

    def __call__(self) -> tuple[Any, list[Any]]:
        import halide as hl

        self.built += 1
        x, y, n = hl.Var("x"), hl.Var("y"), hl.Param(hl.Int(32), "n")
        factor = hl.Param(hl.Float(32), "factor")
        source, tile, out = hl.ImageParam(hl.Float(32), 2, "source"), hl.Func("tile"), hl.Func("out")
        tile[x, y] = source[x, y] * factor
        out[x, y] = tile[x, y] + tile[n - 1 - x, y]
        tile.compute_root().store_in(hl.MemoryType.Heap)
        runtime.parallel(out, y)
        return out, [source, n, factor]

    def right(self) -> bool:
        source, out = torch.randn(5, 16), torch.full((5, 16), float("nan"))
        runtime.compiled("halving", self)(buffer(source), 16, 0.5, buffer(out))
        return torch.equal(out, (source + source.flip(1)) / 2)


def test_code_is_kept_and_taken_by_the_next_process(folder: Path) -> None:
    build = _Halving()
    assert build.right()
    assert len(list(folder.iterdir())) == 1
    assert folder.stat().st_mode & 0o077 == 0
    runtime.clear_cache()
    assert build.right()
    assert build.built == 1


def test_a_kernel_for_more_threads_is_another(folder: Path) -> None:
    build, before = _Halving(), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert build.right()
    finally:
        torch.set_num_threads(before)
    assert build.built == len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-7],
        lambda content: content[:3],
        lambda content: b"",
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: content.replace(b"code 1", b"code 0", 1),
    ],
    ids=["truncated", "almost empty", "empty", "one bit", "another format"],
)
def test_damaged_code_is_made_again(folder: Path, damage: Any) -> None:
    build = _Halving()
    assert build.right()
    [file] = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    runtime.clear_cache()
    assert build.right()
    assert build.built == 2
    assert code_cache.read(file) is not None


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system has no owners of files")
def test_nothing_is_taken_from_a_folder_that_others_can_write_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = _Halving()
    assert build.right()
    folder.chmod(0o777)
    assert "others can write" in code_cache.unusable()
    runtime.clear_cache()
    assert build.right()
    assert build.built == 2
    folder.chmod(0o755)
    assert code_cache.unusable() == ""
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    assert "belongs to another user" in code_cache.unusable()
    runtime.clear_cache()
    assert build.right()
    assert build.built == 3


def test_without_a_folder_kernels_are_compiled_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for place, reason in (("", "is empty"), (str(tmp_path / "file"), "cannot be written")):
        monkeypatch.setenv(code_cache.VARIABLE, place)
        runtime.clear_cache()
        assert reason in code_cache.unusable()
        assert _Halving().right()


def test_the_folder_is_the_users_unless_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(code_cache.VARIABLE)
    assert code_cache.folder() == Path(code_cache.platformdirs.user_cache_dir("sepconv")) / "kernels"


def test_the_files_are_bounded_and_the_oldest_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_cache, "MAX_FILES", 8)
    files = []
    for number in range(9):
        file = code_cache.path(("kernel", number), "some-target")
        assert file is not None
        code_cache.write(file, b"code")
        os.utime(file, (number, number))
        files.append(file)
        if number == 7:
            assert code_cache.read(files[0]) == b"code"  # read: not old any more
    assert len(list(folder.iterdir())) == 6
    assert [file.exists() for file in files] == [True, False, False, False] + [True] * 5


def test_the_name_follows_from_all_that_the_code_depends_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def name() -> Any:
        return code_cache.path(("key", True), "target")

    first = name()
    assert name() == first
    assert code_cache.path(("key", False), "target") != first
    assert code_cache.path(("key", True), "other") != first
    code_cache._sources.cache_clear()
    monkeypatch.setattr(code_cache, "version", lambda package: "0.0")
    try:
        assert name() != first
    finally:
        code_cache._sources.cache_clear()


@pytest.mark.parametrize("module", ["sepconv.activations", "sepconv.kernels.expression"])
def test_the_name_follows_from_what_expressions_are_made_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    first = code_cache.path("key", "target")
    code_cache._sources.cache_clear()
    monkeypatch.setattr(sys.modules[module], "__file__", __file__)
    try:
        assert code_cache.path("key", "target") != first
    finally:
        code_cache._sources.cache_clear()


_CASE = """
import torch, sepconv
from sepconv.kernels.halide.jit import code_cache
x, w = torch.ones(8, 64, 31, 31), torch.ones(64, 1, 7, 7)
print(float(sepconv.depthwise_conv2d(x, w, None, 1, 3).sum()), sorted(p.name for p in code_cache.folder().iterdir()))
"""


def test_names_are_the_same_in_every_process(folder: Path) -> None:
    run = [subprocess.run([sys.executable, "-c", _CASE], capture_output=True, text=True, check=True) for _ in range(2)]
    assert run[0].stdout == run[1].stdout
    assert run[0].stdout.count(".o'") == 1


def test_code_that_calls_what_is_not_there_is_refused(folder: Path) -> None:
    file = folder / "some.o"
    code_cache.write(file, b"[]\n\0halide_device_free\0halide_malloc\0halide_error_of_a_new_kind\0")
    missing = "the code calls halide_device_free, halide_error_of_a_new_kind, for which there is no function"
    with pytest.raises(RuntimeError, match=missing):
        machine_code.Kernel(code_cache.read(file) or b"")


def test_a_moved_buffer_shows_other_memory() -> None:
    import halide as hl

    def build() -> tuple[Any, list[Any]]:
        x = hl.Var("x")
        source, out = hl.ImageParam(hl.Float(32), 1, "source"), hl.Func("out")
        out[x] = source[x]
        return out, [source]

    first, second, out = torch.randn(7), torch.randn(7), torch.empty(7)
    source = Buffer((7,), (1,), first.data_ptr())
    run = runtime.compiled("copying", build).bind(source, buffer(out))
    for given in (first, second):
        source.move(given.data_ptr())
        run()
        assert torch.equal(out, given)


def test_a_full_disk_leaves_the_work_to_pytorch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    call.forget()
    monkeypatch.setattr(machine_code.tempfile, "TemporaryDirectory", full)
    x, weight = torch.randn(8, 32, 61, 61), torch.randn(32, 1, 7, 7)
    [choice] = sepconv.explain(sepconv.depthwise_conv2d, x, weight, None, 1, 3)
    assert choice.kernel == "torch"
    assert "No space left on device" in choice.reasons["halide"]
    monkeypatch.undo()
    call.forget()
    [choice] = sepconv.explain(sepconv.depthwise_conv2d, x, weight, None, 1, 3)
    assert choice.kernel == "halide"


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="knows its addresses")
def test_free_memory_in_small_pieces_is_enough(folder: Path) -> None:
    """LLVM ends the process where the parts of an object lie too far from each other."""
    script = Path(__file__).with_name("fragmented.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr[-2000:]
