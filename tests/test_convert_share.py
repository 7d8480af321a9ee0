"""A conversion by several processes is that of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cli_run
import pytest
import torch
from safetensors.torch import load_file

from sepconv.convert import share


def test_one_process_has_all_batches_and_leaves_sums_alone() -> None:
    batches = [torch.full((2,), float(n)) for n in range(3)]
    found = list(share.mine(batches))
    assert [int(batch[0]) for batch, _ in found] == [0, 1, 2]
    seeds = [generator.initial_seed() for _, generator in found]
    assert seeds == [0, 1, 2]
    value = torch.ones(2)
    share.add_up(value)
    share.agree(value)
    assert torch.equal(value, torch.ones(2))


def test_processes_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for rank in range(3):
        monkeypatch.setattr(share, "position", lambda rank=rank: (rank, 3))
        taken.append([(int(batch), generator.initial_seed()) for batch, generator in share.mine(torch.arange(7))])
    assert taken == [[(0, 0), (3, 3), (6, 6)], [(1, 1), (4, 4)], [(2, 2), (5, 5)]]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_convert_as_one(tmp_path: Path, processes: int) -> None:
    """With four processes the last has no batch at all."""
    script = str(Path(__file__).with_name("convert_run.py"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    for command in ([sys.executable], launcher):
        subprocess.run([*command, script, str(tmp_path)], check=True, timeout=300, capture_output=True)
    one = load_file(tmp_path / "converted-1-0.safetensors")
    for rank in range(processes):
        many = load_file(tmp_path / f"converted-{processes}-{rank}.safetensors")
        assert one.keys() == many.keys()
        assert torch.equal(one["ranks"], many["ranks"])
        for name, value in one.items():
            # Sums in another order, through solves whose condition the ridge keeps near 1e5.
            torch.testing.assert_close(many[name], value, rtol=1e-7, atol=1e-8, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.slow
def test_the_command_converts_with_two_processes_as_with_one(tmp_path: Path) -> None:
    """Without distillation, in which rounding would grow; and with it, once."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "sepconv"]
    job = ["convert", str(cli_run.trained_folder()), "--data", "digits", "--budget", "1/4", "--threads", "1"]
    said = {}
    for name, start, epochs in (
        ("one", [sys.executable, "-m", "sepconv"], 0),
        ("two", launcher, 0),
        ("learn", launcher, 1),
    ):
        command = [*start, *job, "--epochs", str(epochs), "--out", str(tmp_path / name)]
        done = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
        said[name] = done.stdout
    records = {name: json.loads((tmp_path / name / "result.json").read_text()) for name in said}
    for name, text in said.items():
        assert text.count("Accuracy of 359 test images") == 1, name
        assert sum(map(sum, records[name]["confusion"]["separable"])) == 359
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
            "explanation.json", "model.onnx", "model.safetensors", "report.html", "result.json"
        ]  # fmt: skip
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        # float32 statistics of the same images in another order, through solves whose condition the ridge keeps.
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, k=key: f"{k}: {text}")
    assert [row["rank"] for row in records["two"]["layers"]] == [row["rank"] for row in records["one"]["layers"]]
    assert [stage["name"] for stage in records["learn"]["stages"]][-1] == "distilled"
