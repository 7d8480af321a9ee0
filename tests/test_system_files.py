"""Where a file may be written, and that whatever stood there keeps what is its own: links, modes, devices, readers."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sepconv.system import files
from sepconv.system.files import check_folder, check_output, refuse_inputs, remove_partial_files, replacing

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links, devices and pipes as POSIX has them")


def _write(path: Path, content: bytes = b"new") -> None:
    with replacing(path) as file:
        file.write(content)


class TestReplacing:
    def test_link_stays_and_its_target_is_replaced(self, tmp_path: Path) -> None:
        target, link = tmp_path / "there" / "target", tmp_path / "link"
        target.parent.mkdir()
        target.write_bytes(b"old")
        link.symlink_to("middle")
        (tmp_path / "middle").symlink_to(target)
        _write(link)
        assert link.is_symlink()
        assert target.read_bytes() == b"new"
        assert sorted(path.name for path in target.parent.iterdir()) == ["target"]

    def test_link_to_nothing_makes_what_it_names(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
        _write(tmp_path / "link")
        assert (tmp_path / "a" / "b").read_bytes() == b"new"
        assert (tmp_path / "link").is_symlink()

    @pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
    def test_mode_of_the_old_file_is_kept(self, tmp_path: Path, mode: int) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"old")
        path.chmod(mode)
        _write(path)
        assert stat.S_IMODE(path.stat().st_mode) == mode
        assert path.read_bytes() == b"new"

    def test_pipe_keeps_its_reader(self, tmp_path: Path) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        found: list[bytes] = []
        reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()), daemon=True)
        reader.start()
        check_output(pipe)
        _write(pipe)
        reader.join(10)
        assert found == [b"new"]
        assert stat.S_ISFIFO(pipe.stat().st_mode)

    def test_device_stays_a_device(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(os.devnull)
        for path in (Path(os.devnull), tmp_path / "link"):
            check_output(path)
            _write(path)
        assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)

    def test_full_device_says_so(self) -> None:
        with pytest.raises(OSError, match="cannot write /dev/full: No space left on device"):
            _write(Path("/dev/full"))
        assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)

    @pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
    def test_output_that_is_redirected_goes_on_where_it_was(self, tmp_path: Path, name: str) -> None:
        """Not cut off, not renamed away: what is printed before and after stands around it."""
        (tmp_path / "link").symlink_to("/dev/stdout")
        code = (
            "import sys, pathlib; sys.path.insert(0, sys.argv[2]); from files import check_output, replacing\n"
            "print('before', flush=True); path = pathlib.Path(sys.argv[1]); check_output(path)\n"
            "with replacing(path) as file: file.write(b'new\\n')\n"
            "print('after')"
        )
        with (tmp_path / "out").open("w") as out:
            subprocess.run(
                [sys.executable, "-c", code, name, Path(files.__file__).parent], cwd=tmp_path, stdout=out, check=True
            )
        assert (tmp_path / "out").read_text() == "before\nnew\nafter\n"

    def test_descriptor_of_a_pipe(self) -> None:
        """What a shell gives for >(command)."""
        reading, writing = os.pipe()
        path = Path(f"/dev/fd/{writing}")
        check_output(path)
        _write(path)
        os.close(writing)
        with os.fdopen(reading, "rb") as file:
            assert file.read() == b"new"

    def test_folders_above_are_made_only_for_a_whole_file(self, tmp_path: Path) -> None:
        def fail() -> None:
            with replacing(tmp_path / "a" / "b" / "file") as file:
                file.write(b"half")
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert list(tmp_path.iterdir()) == []
        _write(tmp_path / "a" / "b" / "file")
        assert (tmp_path / "a" / "b" / "file").read_bytes() == b"new"

    def test_longest_name(self, tmp_path: Path) -> None:
        for name in ("n" * 255, "ö" * 127):
            check_output(tmp_path / name)
            _write(tmp_path / name)
            assert (tmp_path / name).read_bytes() == b"new"


class TestCheckOutput:
    def test_what_can_be_written_is_left_as_it_is(self, tmp_path: Path) -> None:
        old = tmp_path / "old"
        old.write_bytes(b"old")
        for path in (old, tmp_path / "new", tmp_path / "a" / "b" / "new"):
            check_output(path)
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("old", b"old")]

    def test_folder(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path)
        for path in (tmp_path, tmp_path / "link"):
            with pytest.raises(OSError, match=f"cannot write {path}: it is a folder"):
                check_output(path)

    def test_parent_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for path in (tmp_path / "file" / "new", tmp_path / "file" / "a" / "new"):
            with pytest.raises(OSError, match=f"cannot write to the folder {path.parent}: Not a directory"):
                check_output(path)

    def test_links_in_a_circle(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to(tmp_path / "b")
        (tmp_path / "b").symlink_to(tmp_path / "a")
        with pytest.raises(OSError, match=r"cannot write .*/a: .*symbolic links"):
            check_output(tmp_path / "a")

    def test_name_that_is_too_long(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match=r"cannot write .*: File name too long"):
            check_output(tmp_path / ("n" * 256))

    def test_what_may_not_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As for anybody but root, whom modes do not hold."""
        path = tmp_path / "file"
        path.write_bytes(b"old")
        monkeypatch.setattr(files.os, "access", lambda *asked, **how: False)
        with pytest.raises(OSError, match=r"cannot write .*file: Permission denied"):
            check_output(path)

    def test_closed_descriptor(self) -> None:
        with pytest.raises(OSError, match=r"cannot write /dev/fd/987: "):
            check_output(Path("/dev/fd/987"))


class TestCheckFolder:
    def test_it_is_not_made(self, tmp_path: Path) -> None:
        check_folder(tmp_path / "a" / "b")
        assert list(tmp_path.iterdir()) == []

    def test_file_of_any_name_survives(self, tmp_path: Path) -> None:
        (tmp_path / "write-test").write_bytes(b"mine")
        check_folder(tmp_path)
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("write-test", b"mine")]

    def test_read_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*asked: object, **how: object) -> int:
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
        with pytest.raises(OSError, match=f"cannot write to the folder {tmp_path}: Read-only file system"):
            check_folder(tmp_path)

    def test_only_left_overs_of_ours_are_removed(self, tmp_path: Path) -> None:
        for name in ("film.mp4.partial", "checkpoint-00001.pt.123.partial", "x.12a.partial"):
            (tmp_path / name).touch()
        remove_partial_files(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["film.mp4.partial", "x.12a.partial"]


class TestOutputIsNoInput:
    def test_same_file_by_any_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        weights = tmp_path / "weights"
        weights.write_bytes(b"w")
        (tmp_path / "link").symlink_to(weights)
        (tmp_path / "hard").hardlink_to(weights)
        (tmp_path / "folder").symlink_to(tmp_path)
        monkeypatch.chdir(tmp_path)
        same = ("weights", "link", "hard", "folder/weights", "nowhere/../weights")
        for name in same:
            with pytest.raises(ValueError, match=f"--json {name} would overwrite the input .*weights"):
                refuse_inputs("--json", Path(name), [weights])
        refuse_inputs("--json", Path("other"), [weights, tmp_path / "absent"])

    def test_file_that_is_part_of_an_input_folder(self, tmp_path: Path) -> None:
        (tmp_path / "class").mkdir()
        (tmp_path / "class" / "1.png").touch()
        with pytest.raises(ValueError, match="would overwrite the input"):
            refuse_inputs("--json", tmp_path / "class" / "1.png", [tmp_path])
        refuse_inputs("--json", tmp_path / "new.json", [tmp_path])

    @pytest.mark.parametrize("device", ["/dev/null", "/dev/stdout"])
    def test_device_is_never_overwritten(self, device: str) -> None:
        refuse_inputs("--json", Path(device), [Path(device), Path("/dev")])
