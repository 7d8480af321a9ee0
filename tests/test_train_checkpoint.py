"""Checkpoints: whole or absent, refused by name, resumed to the bit."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_run import RECIPE, network, random_data, without_times
from torch import nn

from sepconv.system import files
from sepconv.system.files import replacing
from sepconv.train import (
    CheckpointRefused,
    Distillation,
    History,
    Progress,
    Recipe,
    TrainingStopped,
    checkpoint,
    train,
)
from sepconv.train.loop import shutil as loop_shutil

DATA = random_data()


def run(
    out: Path | None, recipe: Recipe = RECIPE, model: nn.Module | None = None, **settings: Any
) -> tuple[nn.Module, History]:
    model = network(norm=True, dropout=0.3) if model is None else model
    return model, train(model, DATA, recipe, out, **settings)


def stop_after(epoch: int, step: int = 1) -> Callable[[Progress], None]:
    """Press Ctrl-C in the step after the given epoch."""

    def press(progress: Progress) -> None:
        if (progress.epoch, progress.step) == (epoch + 1, step):
            raise KeyboardInterrupt

    return press


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_interrupted_run_resumes_to_the_bit(tmp_path: Path, optimizer: str, ema: float) -> None:
    recipe = replace(RECIPE, optimizer=optimizer, ema=ema, lr=0.01)
    undisturbed, expected = run(None, recipe)
    for epoch in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, recipe, resume=epoch > 1, on_progress=stop_after(epoch, step=2))
        assert len((tmp_path / "log.jsonl").read_text().splitlines()) == epoch
    torch.manual_seed(99)
    model, history = run(tmp_path, recipe, resume=True)
    assert history.resumed_from == 2
    assert_same_state(model, undisturbed)
    assert without_times(history.records) == without_times(expected.records)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == history.records


def test_a_running_average_of_an_older_form_is_resumed_to_the_bit(tmp_path: Path) -> None:
    recipe = replace(RECIPE, ema=0.9)
    undisturbed, _ = run(None, recipe)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, recipe, on_progress=stop_after(1))
    (newest,) = checkpoint.checkpoints(tmp_path)
    state = checkpoint.read(newest)
    number = int(state["average"].pop("n_averaged"))
    tensors = {name.removeprefix("module."): value for name, value in state["average"].items()}
    checkpoint.save(tmp_path, 1, {**state, "average": {"updates": number - 1, "tensors": tensors}})
    model, history = run(tmp_path, recipe, resume=True)
    assert history.resumed_from == 1
    assert_same_state(model, undisturbed)


def test_resume_with_a_teacher_is_exact_too(tmp_path: Path) -> None:
    teacher = network(norm=True)
    settings = dict(teacher=teacher, distillation=Distillation(features="auto"))
    undisturbed, _ = run(None, **settings)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, on_progress=stop_after(1), **settings)
    model, history = run(tmp_path, resume=True, **settings)
    assert history.resumed_from == 1
    assert_same_state(model, undisturbed)
    with pytest.raises(CheckpointRefused, match=r"distillation\.alpha is 0\.9 there and 0\.5 here"):
        run(tmp_path, resume=True, teacher=teacher, distillation=Distillation(alpha=0.5, features="auto"))


def test_finished_run_resumes_to_its_end(tmp_path: Path) -> None:
    trained, history = run(tmp_path)
    model, again = run(tmp_path, resume=True)
    assert again.records == history.records
    assert_same_state(model, trained)


def test_resume_without_checkpoints_starts_at_the_beginning(tmp_path: Path) -> None:
    model, history = run(tmp_path / "new", resume=True)
    assert history.resumed_from == 0
    assert_same_state(model, run(None)[0])


def test_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-00002.pt",
        "checkpoint-00003.pt",
        "log.jsonl",
    ]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def older_version(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"sepconv checkpoint 1", b"sepconv checkpoint 0", 1))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, r"damaged \(its checksum"),
        (flip_a_bit, r"damaged \(its checksum"),
        (older_version, "not a checkpoint of this version"),
        (empty, "not a checkpoint of this version"),
    ],
)
def test_damaged_checkpoint_is_refused_and_the_previous_used(
    tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    undisturbed, _ = run(tmp_path)
    damage(tmp_path / "checkpoint-00003.pt")
    with pytest.warns(UserWarning, match=rf"refused .*checkpoint-00003\.pt: {reason}.*using checkpoint-00002\.pt"):
        model, history = run(tmp_path, resume=True)
    assert history.resumed_from == 2
    assert_same_state(model, undisturbed)
    damage(tmp_path / "checkpoint-00003.pt")
    damage(tmp_path / "checkpoint-00002.pt")
    with pytest.raises(CheckpointRefused, match=rf"no checkpoint can be used: .*00003\.pt: {reason}.*00002\.pt"):
        run(tmp_path, resume=True)


def test_checkpoint_of_another_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(
        CheckpointRefused, match=r"00003\.pt: of another run \(recipe\.lr is 0\.05 there and 0\.1 here\)"
    ):
        run(tmp_path, replace(RECIPE, lr=0.1), resume=True)
    wide = network(norm=True, dropout=0.3)
    wide[0].stride = (2, 2)
    with pytest.raises(CheckpointRefused, match=r"model\.0 is Conv2d\(.*\) there and Conv2d\(.*stride=\(2, 2\)"):
        run(tmp_path, model=wide, resume=True)
    other_data = random_data(train=60)
    with pytest.raises(CheckpointRefused, match=r"data\.train is 61 there and 60 here"):
        train(network(norm=True, dropout=0.3), other_data, RECIPE, tmp_path, resume=True)


class Danger:
    """Unpickling this would call a function."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path("executed"),)  # type: ignore[return-value]


def test_code_in_a_checkpoint_is_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tmp_path, 1, {"identity": Danger()})
    with pytest.raises(CheckpointRefused, match=r"00001\.pt: holds something other than tensors"):
        run(tmp_path, resume=True)
    assert not (tmp_path / "executed").exists()
    checkpoint.save(tmp_path, 1, {"something": 1})
    with pytest.raises(CheckpointRefused, match=r"00001\.pt: not the state of a training run"):
        run(tmp_path, resume=True)


def test_earlier_run_is_not_overwritten(tmp_path: Path) -> None:
    run(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        run(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_nan_stops_names_the_step_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    model = network()

    def spoil(progress: Progress) -> None:
        if (progress.epoch, progress.step) == (2, 2):
            model[0].weight.data[0] = float("nan")

    with pytest.raises(TrainingStopped, match=r"the loss is nan in epoch 2, step 3 of 4 \(lr 0\.0"):
        run(tmp_path, model=model, on_progress=spoil)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-00001.pt"]
    fresh, history = run(tmp_path, model=network(), resume=True)
    assert history.resumed_from == 1
    assert_same_state(fresh, run(None, model=network())[0])


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = network()

    def spoil(progress: Progress) -> None:
        if progress.step == progress.steps:
            model[0].bias.data[0] = float("inf")

    with pytest.raises(TrainingStopped, match=r"0\.bias is not finite after epoch 1"):
        run(tmp_path, model=model, on_progress=spoil)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [None, 3, [], {}, "x", [{}], [{"epoch": 1, "seconds": "x", "test_accuracy": 1.0}]])
@pytest.mark.parametrize("part", ["model", "optimizer", "average", "records"])
def test_state_that_is_none_is_one_refusal(tmp_path: Path, part: str, value: object) -> None:
    recipe = replace(RECIPE, ema=0.5)
    run(tmp_path, recipe=recipe)
    newest, *_ = checkpoint.checkpoints(tmp_path)
    state = checkpoint.read(newest)
    for path in checkpoint.checkpoints(tmp_path):
        path.unlink()
    checkpoint.save(tmp_path, 1, {**state, part: value})
    with pytest.raises(CheckpointRefused, match="holds no state of such a training"):
        run(tmp_path, recipe=recipe, resume=True)


def test_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(progress: Progress) -> None:
        if progress.epoch == 2:
            monkeypatch.setattr(files.os, "fsync", full)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"cannot write .*checkpoint-00002\.pt: No space left on device"):
        run(tmp_path, on_progress=fill)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00001.pt", "log.jsonl"]
    assert run(tmp_path, resume=True)[1].resumed_from == 1


def test_too_little_room_is_said_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = loop_shutil.disk_usage(tmp_path)
    monkeypatch.setattr(loop_shutil, "disk_usage", lambda path: usage._replace(free=1000))
    steps: list[Progress] = []
    with pytest.raises(OSError, match=r"the checkpoints need 0 MB but .* has 0 MB left"):
        run(tmp_path, on_progress=steps.append)
    assert steps == []


def test_unwritable_folder_is_said_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    steps: list[Progress] = []
    with pytest.raises(OSError, match=r"cannot write to the folder .*file/run: Not a directory"):
        run(tmp_path / "file" / "run", on_progress=steps.append)
    assert steps == []


def test_replacing_leaves_the_old_file_on_any_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as file:
            file.write(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "old")]


def test_left_overs_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-00007.pt.123.partial").write_bytes(b"half")
    run(tmp_path, resume=True)
    assert not list(tmp_path.glob("*.partial"))


def test_checkpoint_is_deterministic_and_small_state_survives(tmp_path: Path) -> None:
    state = {"identity": {"a": 1}, "records": [{"x": 0.1}], "model": {"w": torch.randn(3, 4).t()}}
    path = checkpoint.save(tmp_path, 12, state)
    found = checkpoint.read(path)
    assert path.name == "checkpoint-00012.pt"
    assert found["records"] == state["records"]
    assert torch.equal(found["model"]["w"], state["model"]["w"])
    assert torch.load(io.BytesIO(path.read_bytes().partition(b"\n")[2]), weights_only=True).keys() == state.keys()
