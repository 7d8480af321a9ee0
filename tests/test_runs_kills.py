"""Kill -9 at any moment loses at most an epoch, and never a file that was complete."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed_run
import pytest
import torch
import workflow_run
from distributed_run import without_times
from safetensors.torch import load_file

from sepconv.runs.model_file import FILE
from sepconv.runs.run_folder import CHECKPOINTS, RESULT
from sepconv.train import checkpoint

Start = Callable[..., Any]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts a function in a process of its own, from one that has imported everything: in milliseconds."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distributed_run", "workflow_run"])

    def begin(work: Callable[..., None], *arguments: Any) -> Any:
        process = context.Process(target=work, args=arguments)
        process.start()
        return process

    return begin


def ended(*processes: Any) -> None:
    for process in processes:
        process.join()
        assert process.exitcode == 0


def kill(process: Any) -> None:
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)


@pytest.mark.slow
def test_a_training_killed_at_random_moments_resumes_to_the_bit(tmp_path: Path, start: Start) -> None:
    """50 times between a new checkpoint and a tenth of a second (about two epochs) later."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    epochs = 300
    undisturbed = start(distributed_run.main, whole, epochs)
    moments = random.Random(0)
    for _ in range(50):
        before = checkpoint.checkpoints(killed)
        process = start(distributed_run.main, killed, epochs)
        while checkpoint.checkpoints(killed) == before:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.1))
        kill(process)
        assert process.exitcode == -signal.SIGKILL
    ended(undisturbed, start(distributed_run.main, killed, epochs))
    expected, found = (checkpoint.read(folder / f"checkpoint-{epochs:05d}.pt") for folder in (whole, killed))
    assert without_times(found["records"]) == without_times(expected["records"])
    for key, value in expected["model"].items():
        assert torch.equal(value, found["model"][key]), key
    assert not list(killed.glob("*.partial"))


@pytest.mark.slow
def test_a_conversion_killed_at_random_moments_ends_the_same(tmp_path: Path, start: Start) -> None:
    """Conversion, distillation, measurement and writing: what stands in the folder is whole whenever one looks."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    begin = time.monotonic()
    ended(start(workflow_run.main, whole))
    seconds = time.monotonic() - begin
    moments = random.Random(0)
    stages = set()
    for _ in range(12):
        process = start(workflow_run.main, killed)
        process.join(moments.uniform(0, seconds))
        kill(process)
        checkpoints = checkpoint.checkpoints(killed / CHECKPOINTS)
        stages.add("distilling" if checkpoints else "converting")
        for path in killed.glob("*.json"):
            json.loads(path.read_text())
        if (killed / FILE).exists():
            stages.add("written")
            load_file(killed / FILE)
    assert {"converting", "distilling"} <= stages
    ended(start(workflow_run.main, killed))
    expected, found = (load_file(folder / FILE) for folder in (whole, killed))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key
    records = [json.loads((folder / RESULT).read_text()) for folder in (whole, killed)]
    assert without_times(records[0]["curves"]) == without_times(records[1]["curves"])
    assert without_times(records[0]["stages"]) == without_times(records[1]["stages"])
    assert len(records[0]["curves"]) == workflow_run.EPOCHS
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in whole.iterdir())


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_and_a_restart_continues(tmp_path: Path) -> None:
    """Two processes, the second killed after a checkpoint: the launcher says so, and at most an epoch is lost."""
    epochs = 400
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, distributed_run.__file__, str(tmp_path), str(epochs)]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while len(checkpoint.checkpoints(tmp_path)) < 2:
        assert first.poll() is None
        time.sleep(0.01)
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
    said = first.communicate(timeout=120)[1]
    assert first.returncode != 0
    assert "SIGKILL" in said or "Signal 9" in said
    done = checkpoint.read(checkpoint.checkpoints(tmp_path)[0])["records"]
    assert 2 <= len(done) < epochs
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    records = checkpoint.read(tmp_path / f"checkpoint-{epochs:05d}.pt")["records"]
    assert records[: len(done)] == done
    assert len(records) == epochs
