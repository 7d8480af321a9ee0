"""Recipes, the training loop, distillation, evaluation; several processes count and learn as one."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_run import RECIPE, network
from torch import nn
from torch.nn import functional as F

from sepconv.data import Data, load
from sepconv.train import Distillation, Progress, Recipe, evaluate, train
from sepconv.train.average import WeightAverage


def test_training_equals_the_plain_loop(data: Data) -> None:
    """Without augmentation and averaging: the same weights as ten lines of PyTorch."""
    recipe = Recipe(epochs=2, batch_size=20, lr=0.1, schedule="constant", weight_decay=0.0, momentum=0.0)
    model, plain = network(), network().to(memory_format=torch.channels_last)
    history = train(model, data, recipe)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for epoch in range(2):
        losses = []
        for images, labels in data.train.batches(20, shuffle_seed=0, epoch=epoch, drop_last=True):
            loss = F.cross_entropy(plain(images.to(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert history.records[epoch]["train_loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_records_and_progress(data: Data, tmp_path: Path) -> None:
    events: list[Progress] = []
    model = network()
    history = train(model, data, RECIPE, tmp_path, on_progress=events.append)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == history.records
    assert [record["step"] for record in history.records] == [4, 8, 12]
    assert [(e.epoch, e.step) for e in events] == [(e, s) for e in (1, 2, 3) for s in (1, 2, 3, 4, 4)]
    assert [e.test_accuracy for e in events if e.test_accuracy is not None] == [
        record["test_accuracy"] for record in history.records
    ]
    assert events[-1].remaining == 0 < events[0].remaining
    assert events[-1].loss == history.records[-1]["train_loss"]
    assert history.accuracy == evaluate(model, data.test).accuracy
    assert history.seconds == sum(record["seconds"] for record in history.records)
    assert not model.training


def test_callers_random_state_is_left_alone(data: Data) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(36, 5, bias=False)), data, Recipe(epochs=1))
    torch.manual_seed(5)
    model = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(36, 5, bias=False))
    after = torch.get_rng_state()
    train(model, data, Recipe(epochs=1))
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), expected)


def test_bf16_trains_and_fp16_is_refused_on_cpus(data: Data) -> None:
    seen: list[torch.dtype] = []
    model = network()
    model[3].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    recipe = replace(RECIPE, mixed_precision="bf16", epochs=1)
    assert train(model, data, recipe).records[0]["train_loss"] < 2
    assert torch.bfloat16 in seen
    assert all(p.dtype == torch.float32 for p in model.parameters())
    with pytest.raises(ValueError, match=r"fp16 needs a GPU; on this CPU use bf16 or no"):
        train(model, data, replace(RECIPE, mixed_precision="fp16"))


@pytest.mark.parametrize("channels_last", [True, False])
def test_channels_last_is_what_the_recipe_says(data: Data, channels_last: bool) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 4), nn.Flatten())
    seen = []
    model[1].register_forward_hook(lambda m, i, o: seen.append(i[0].is_contiguous(memory_format=torch.channels_last)))
    train(model, data, replace(RECIPE, epochs=1, channels_last=channels_last))
    assert model[1].weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert set(seen[1:]) == {channels_last}


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (nn.Flatten(), {}, "train: the model has no trainable parameters"),
        (nn.Conv2d(3, 5, 6), {}, r"the model does not take images of shape \(1, 6, 6\): Given groups=1"),
        (nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), {}, r"output has shape \(2, 4\) but the data has 5 classes"),
        (nn.Conv2d(1, 5, 3), {}, r"output has shape \(2, 5, 4, 4\) but the data has 5 classes"),
        (network(), {"distillation": Distillation()}, "distillation needs a teacher"),
        (network(), {"resume": True}, "resume needs out"),
        (network(), {"teacher": nn.Sequential(nn.Flatten(), nn.Linear(36, 6))}, r"\(64, 5\), the teacher's \(64, 6\)"),
    ],
)
def test_what_does_not_fit_is_refused(data: Data, model: nn.Module, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("64", "61")):
        train(model, data, RECIPE, **settings)


def test_evaluate_counts_every_image_once(data: Data) -> None:
    model = network().train()
    metrics = evaluate(model, data.test, batch_size=10)
    images, labels = next(data.test.batches(1000))
    logits = model.eval()(images)
    assert metrics.accuracy == (logits.argmax(1) == labels).double().mean()
    assert metrics.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert metrics.confusion.sum() == len(data.test) == 37
    assert torch.equal(metrics.confusion.sum(1), labels.bincount(minlength=5))
    assert torch.equal(metrics.confusion.sum(0), logits.argmax(1).bincount(minlength=5))


def test_evaluate_restores_the_mode_and_needs_an_output_for_each_label(data: Data) -> None:
    model = network(norm=True).train()
    evaluate(model, data.test)
    assert model.training
    assert model[1].num_batches_tracked == 0
    with pytest.raises(ValueError, match=r"output has shape \(37, 3\) but the data has 5 classes"):
        evaluate(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), data.test)


def test_average_is_the_written_formula() -> None:
    model = nn.BatchNorm1d(2)
    average = WeightAverage(model, 0.5)
    expected = model.weight.detach().clone()
    for step in range(1, 20):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2))
            model.num_batches_tracked += 1
        average.update_parameters(model)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
        torch.testing.assert_close(average.module.weight.detach(), expected)
        assert average.module.num_batches_tracked == model.num_batches_tracked


def test_averaged_weights_are_what_is_evaluated_and_returned(data: Data) -> None:
    averaged, last = network(norm=True), network(norm=True)
    history = train(averaged, data, RECIPE)
    train(last, data, replace(RECIPE, ema=0.0))
    assert not torch.equal(averaged[0].weight, last[0].weight)
    assert history.records[-1]["test_loss"] == pytest.approx(evaluate(averaged, data.test).loss, rel=1e-6)


def test_small_network_learns_the_digits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )
    assert train(model, load("digits"), Recipe(epochs=6, batch_size=64, lr=0.1)).accuracy > 0.97


def launch(processes: int, out: Path) -> list[dict[str, Any]]:
    """Run the same training in some processes on this machine; the result of each."""
    out.mkdir()
    script = str(Path(__file__).with_name("distributed_run.py"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*(launcher if processes > 1 else [sys.executable, "-W", "error"]), script, str(out)]
    done = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    assert "Warning" not in done.stderr
    return [json.loads((out / f"result-{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_the_command_line_speaks_once(tmp_path: Path, machines: int) -> None:
    """Two processes on one machine, and one on each of two machines, which the loopback stands for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={2 // machines}"]
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=1"]
    job = ["-m", "sepconv", "train", "vgg_small", "--data", "digits", "--set", "width_mult=0.25", "--epochs", "1"]
    command = [*launcher, f"--nnodes={machines}", *meeting, *job, "--out", str(tmp_path / "run")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(machines)]
    said = "".join(process.communicate(timeout=300)[0] for process in started)
    assert [process.returncode for process in started] == [0] * machines
    assert said.count("Accuracy of 359 test images") == 1
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert sum(map(sum, record["confusion"]["normal"])) == 359
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_train_and_count_as_one(tmp_path: Path, processes: int) -> None:
    """Batches of 15 and 37 test images divide by neither 2 nor 4; the network has no batch statistics."""
    (one,) = launch(1, tmp_path / "one")
    many = launch(processes, tmp_path / "many")
    assert all(result == many[0] for result in many)
    assert many[0]["world"] == processes
    assert many[0]["confusion"] == one["confusion"]
    assert sum(map(sum, many[0]["confusion"])) == 37
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "many")]
    assert len(logs[1]) == RECIPE.epochs
    for a, b in zip(*(map(json.loads, lines) for lines in logs), strict=True):
        assert (a["epoch"], a["step"], a["lr"]) == (b["epoch"], b["step"], b["lr"])
        # Sums of at most 15 terms in another order, carried through 12 steps.
        for key in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
            assert b[key] == pytest.approx(a[key], rel=1e-5)
    assert len(list((tmp_path / "many").glob("checkpoint-*"))) == 2
