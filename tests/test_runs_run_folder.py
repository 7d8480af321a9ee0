"""A run writes to a folder that is its own, or free; what it reads and what others wrote is refused before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import SMALL, converted_folder, sepconv, trained_folder
from safetensors.torch import save_file

from sepconv.cli import jobs
from sepconv.data import load
from sepconv.runs import png, run_folder
from sepconv.runs.model_file import FILE, open_model
from sepconv.runs.run_folder import CHECKPOINTS, claim, prepare
from sepconv.runs.workflow import Job, convert_model, demo
from sepconv.train import checkpoint

CONVERT = ("--data", "digits", "--budget", "1/4", "--epochs", 0)


@pytest.fixture(scope="module", autouse=True)
def _runs() -> None:
    """Made before the work is forbidden."""
    trained_folder(), converted_folder()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished training."""
    return Path(shutil.copytree(trained_folder(), tmp_path / "run"))


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def _no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused here is refused before data are read."""

    def refuse(*asked: Any, **how: Any) -> None:
        raise AssertionError("data were read")

    monkeypatch.setattr(jobs, "load", refuse)


class TestOutputIsNoInput:
    def test_the_network_of_the_folder_itself(self, run: Path, tmp_path: Path) -> None:
        before = _contents(run)
        (tmp_path / "link").symlink_to(run)
        (tmp_path / "linked.safetensors").symlink_to(run / FILE)
        for model, out in (
            ((run,), run),
            ((run,), tmp_path / "link"),
            ((tmp_path / "link",), run),
            ((run / FILE,), run),
            (("vgg_small", "--weights", run / FILE), run / "." / ""),
            (("vgg_small", "--weights", tmp_path / "linked.safetensors"), run),
        ):
            sepconv("convert", *model, *CONVERT, "--out", out).failed_with(2, "would overwrite the input", FILE)
            sepconv("train", *model, "--data", "digits", "--out", out).failed_with(2, "would overwrite the input")
        assert _contents(run) == before

    def test_a_link_in_the_folder_to_an_input(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / FILE).symlink_to(run / FILE)
        ran = sepconv("convert", run, *CONVERT, "--out", tmp_path / "out")
        ran.failed_with(2, f"--out {tmp_path}/out/{FILE} would overwrite the input")

    @pytest.mark.parametrize("out", ["photos", "photos/run", "link/run", "photos/cat", "photos/cat/../dog/a/b"])
    def test_the_folder_of_the_images(self, tmp_path: Path, out: str) -> None:
        for name in ("cat", "dog"):
            (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "link").symlink_to(tmp_path / "photos")
        ran = sepconv("train", "vgg_small", "--data", tmp_path / "photos", "--out", tmp_path / out)
        ran.failed_with(2, "lies in the folder that is read", "photos")
        assert sorted(path.name for path in (tmp_path / "photos").iterdir()) == ["cat", "dog"]

    @pytest.mark.parametrize("option", ["--onnx", "--json"])
    def test_a_file_over_the_weights(self, run: Path, tmp_path: Path, option: str) -> None:
        before = _contents(run)
        (tmp_path / "link").symlink_to(run / FILE)
        onnx = ("--onnx", tmp_path / "a.onnx") if option == "--json" else ()
        for place in (run / FILE, tmp_path / "link"):
            ran = sepconv("export", run, *onnx, option, place)
            ran.failed_with(2, f"{option} {place} would overwrite the input", FILE)
            ran = sepconv("export", "vgg_small", "--weights", run / FILE, *onnx, option, place)
            ran.failed_with(2, f"{option} {place} would overwrite the input", FILE)
        assert _contents(run) == before

    @pytest.mark.parametrize("command", ["count", "predict", "train", "convert", "bench tune"])
    def test_json_over_the_weights(self, run: Path, tmp_path: Path, command: str) -> None:
        extra = {
            "predict": (tmp_path / "a.png",),
            "train": ("--data", "digits", "--out", tmp_path / "out"),
            "convert": (*CONVERT, "--out", tmp_path / "out"),
        }
        before = _contents(run)
        ran = sepconv(*command.split(), run, *extra.get(command, ()), "--json", run / FILE)
        ran.failed_with(2, f"--json {run / FILE} would overwrite the input")
        assert _contents(run) == before

    def test_json_over_an_image_or_a_record(self, run: Path, tmp_path: Path) -> None:
        image = tmp_path / "a.png"
        image.write_bytes(png.encode(torch.zeros(1, 8, 8, dtype=torch.uint8)))
        sepconv("predict", run, image, "--json", image).failed_with(2, "would overwrite the input", "a.png")
        sepconv("report", run, "--json", run / "result.json").failed_with(2, "would overwrite the input")
        (tmp_path / "photos").mkdir()
        inside = shutil.copy(image, tmp_path / "photos" / "1.png")
        ran = sepconv("train", "vgg_small", "--data", tmp_path / "photos", "--out", tmp_path / "o", "--json", inside)
        ran.failed_with(2, "would overwrite the input")

    def test_two_outputs_at_one_place(self, run: Path, tmp_path: Path) -> None:
        place = tmp_path / "a"
        sepconv("export", run, "--onnx", place, "--json", place).failed_with(2, "--json", "--onnx is written there too")
        for name in run_folder.FILES:
            ran = sepconv("convert", run, *CONVERT, "--out", tmp_path / "out", "--json", tmp_path / "out" / name)
            ran.failed_with(2, "would be overwritten", name)
        (run / "report.html").unlink()
        sepconv("report", run, "--json", run / "report.html").failed_with(2, "would be overwritten")
        for suite in ("ops", "network"):
            ran = sepconv("bench", suite, "--json", tmp_path / "page.html")
            ran.failed_with(2, "would be overwritten")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


class TestFolderOfAnotherRun:
    @pytest.mark.parametrize(
        ("kind", "found"), [("train", "convert"), ("demo", "convert"), ("convert", "train"), ("demo", "train")]
    )
    def test_finished(self, tmp_path: Path, kind: str, found: str) -> None:
        folder = {"convert": converted_folder, "train": trained_folder}[found]()
        out = shutil.copytree(folder, tmp_path / "out")
        assert json.loads((out / "result.json").read_text())["kind"] == found
        before = _contents(out)
        command = {
            "train": ("train", *SMALL),
            "convert": ("convert", "vgg_small", *CONVERT),
            "demo": ("demo",),
        }[kind]
        ran = sepconv(*command, "--out", out)
        ran.failed_with(2, f"{kind}: {out} holds what sepconv {found} wrote: give another --out")
        assert _contents(out) == before

    @pytest.mark.parametrize("kind", run_folder.KINDS)
    def test_of_the_same_kind_it_is_its_own(self, tmp_path: Path, kind: str) -> None:
        record = {"kind": kind, "model": "m", "data": "d", "normal": {}, "versions": {}}
        (tmp_path / "result.json").write_text(json.dumps(record))
        for other in run_folder.KINDS:
            if other == kind:
                claim(tmp_path, other)
            else:
                with pytest.raises(ValueError, match=f"{other}: .* holds what sepconv {kind} wrote"):
                    claim(tmp_path, other)

    @pytest.mark.parametrize(
        ("more", "kind"),
        [({}, "train"), ({"separable": {}}, "convert"), ({"separable": {}, "command": "sepconv demo --out x"}, "demo")],
    )
    def test_of_an_earlier_version(self, tmp_path: Path, more: dict[str, Any], kind: str) -> None:
        record = {"model": "m", "data": "d", "normal": {}, "versions": {}, **more}
        (tmp_path / "result.json").write_text(json.dumps(record))
        claim(tmp_path, kind)
        with pytest.raises(ValueError, match=f"holds what sepconv {kind} wrote"):
            claim(tmp_path, "demo" if kind != "demo" else "train")

    @pytest.mark.parametrize(("place", "kind"), [(".", "train"), (CHECKPOINTS, "convert")])
    def test_interrupted(self, tmp_path: Path, place: str, kind: str) -> None:
        (tmp_path / place).mkdir(exist_ok=True)
        checkpoint.save(tmp_path / place, 1, {"identity": {}})
        claim(tmp_path, kind)
        for other in {"train", "convert", "demo"} - {kind}:
            with pytest.raises(ValueError, match=f"holds what sepconv {kind} wrote"):
                claim(tmp_path, other)

    def test_killed_while_it_wrote(self, tmp_path: Path) -> None:
        for folder, kind in ((trained_folder(), "train"), (converted_folder(), "convert")):
            (tmp_path / kind).mkdir()
            shutil.copy(folder / FILE, tmp_path / kind)
            claim(tmp_path / kind, kind)
        with pytest.raises(ValueError, match="holds what sepconv convert wrote"):
            claim(tmp_path / "convert", "train")

    def test_the_functions_refuse_it_too(self, run: Path) -> None:
        before = _contents(run)
        model, card = open_model(str(run))
        with pytest.raises(ValueError, match=r"convert: .* holds what sepconv train wrote"):
            convert_model(model, card, load("digits"), Job(recipe=None), run)
        with pytest.raises(ValueError, match=r"demo: .* holds what sepconv train wrote"):
            demo(run)
        assert _contents(run) == before


class TestFilesOfOthers:
    @pytest.mark.parametrize("kind", run_folder.KINDS)
    @pytest.mark.parametrize(
        "name", [*run_folder.FILES, "checkpoint-00001.pt", "checkpoint-best.pt", "checkpoints/checkpoint-00001.pt"]
    )
    def test_of_the_same_name(self, tmp_path: Path, kind: str, name: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b'{"mine": 1}')
        before = _contents(tmp_path)
        with pytest.raises(ValueError, match=rf"no run of sepconv wrote, .*{name.split('/')[0]}"):
            claim(tmp_path, kind)
        assert _contents(tmp_path) == before

    def test_weights_of_others(self, tmp_path: Path) -> None:
        save_file({"a": torch.zeros(1)}, tmp_path / FILE)
        with pytest.raises(ValueError, match=r"no run of sepconv wrote, model\.safetensors"):
            claim(tmp_path, "train")

    def test_other_files_are_no_obstacle_and_stay(self, tmp_path: Path) -> None:
        (tmp_path / CHECKPOINTS).mkdir()
        for name in ("notes.txt", f"{CHECKPOINTS}/epoch1.ckpt", f"{CHECKPOINTS}/film.partial"):
            (tmp_path / name).write_text("mine")
        before = _contents(tmp_path)
        for kind in run_folder.KINDS:
            claim(tmp_path, kind)
        checkpoint.save(tmp_path / CHECKPOINTS, 1, {"identity": {}})
        run_folder.remove_checkpoints(tmp_path)
        assert _contents(tmp_path) == before

    def test_checkpoints_of_ours_leave_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / CHECKPOINTS).mkdir()
        checkpoint.save(tmp_path / CHECKPOINTS, 1, {"identity": {}})
        run_folder.remove_checkpoints(tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_the_folder_of_integers_is_claimed_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "int8").mkdir()
    (tmp_path / "int8" / "model.onnx").write_bytes(b"somebody's")
    prepare(tmp_path, "convert")
    with pytest.raises(ValueError, match=r"int8 has files that no run of sepconv wrote, model.onnx"):
        prepare(tmp_path, "convert", int8=True)
