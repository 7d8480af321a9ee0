"""``sepconv bench training``: verified first, then timed; memory; tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trainable import always, network

from sepconv.bench import trained, training, training_tables
from sepconv.bench import trainee as trainees
from sepconv.bench.tables import read
from sepconv.bench.trained import CASES, ConvNeXtBlock, TrainingCase, in_pytorch
from sepconv.layers import SeparableConv2d

__all__ = ["always"]
TINY = TrainingCase("tiny", network, 12, 2)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CASES", (TINY,))
    monkeypatch.setattr(training, "_FEWEST", 2)


def _run(path: Path, **changes: Any) -> list[Any]:
    given = {
        "threads": [1], "time_s": 1e-3, "match": "tiny", "names": ["sepconv", "torch-nhwc", "torch-nchw"],
        "precisions": ["float32", "bfloat16"], "memory": False, "path": path, "command": "test",
    }  # fmt: skip
    return training.run(**{**given, **changes}, progress=lambda what: None)


@pytest.mark.usefixtures("tiny", "always")
def test_records_and_tables(tmp_path: Path) -> None:
    found = _run(tmp_path / "training.json")
    assert [(r.contender, r.layout, r.precision) for r in found] == [
        (contender, layout, precision)
        for precision in ("float32", "bfloat16")
        for contender, layout in (("sepconv", "nhwc"), ("torch", "nhwc"), ("torch", "nchw"))
    ]
    for row in found:
        assert row.forward_ms > 0
        assert row.images_per_second == pytest.approx(2e3 / row.median_ms, rel=0.01)
    content = read(tmp_path / "training.json")
    content["memory"] = [
        {"case": TINY.name, "contender": contender, "layout": layout, "precision": "float32", "bytes": held}
        for contender, layout, held in (("sepconv", "nhwc", 5), ("torch", "nhwc", 10), ("torch", "nchw", 20))
    ]
    first, second = training_tables.summary(content).rows
    times = {r.contender + r.layout: r.median_ms for r in found if r.precision == "float32"}
    assert first[:3] == [TINY.name, "float32", "1"]
    assert first[4:] == [f"{min(times['torchnhwc'], times['torchnchw']) / times['sepconvnhwc']:.2f}", "", "0.50"]
    assert second[-1] == ""
    assert len(training_tables.parts(content).rows) == 4


@pytest.mark.usefixtures("tiny")
def test_a_contender_that_computes_something_else_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module) -> None:
        with torch.no_grad():
            model[1].weight.mul_(1.1)

    monkeypatch.setattr(trainees, "replace_layers", wrong)
    with pytest.raises(ValueError, match=r"bench training: sepconv on tiny-12 b2 errs by"):
        _run(tmp_path / "training.json")
    assert not (tmp_path / "training.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"match": "nothing"}, "there is no case with 'nothing', only tiny-12 b2"),
        ({"names": ["jax"]}, "there is no contender 'jax', only sepconv, torch-nhwc, torch-nchw, torch.compile"),
        ({"precisions": ["int8"]}, "there is no precision 'int8', only float32, bfloat16"),
        ({"threads": [0]}, "threads must be positive"),
        ({"time_s": 0.0}, "seconds above 0"),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_wrong_arguments(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _run(tmp_path / "training.json", **changes)


@pytest.mark.usefixtures("tiny", "always")
def test_a_compiler_that_fails_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: nn.Module) -> nn.Module:
        def refuse(x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no compiler\nmore")

        model.forward = refuse
        return model

    monkeypatch.setattr(torch, "compile", fails)
    _run(tmp_path / "t.json", names=["torch-nhwc", "torch.compile"], precisions=["float32"])
    absent = json.loads((tmp_path / "t.json").read_text())["absent"]
    assert [*absent] == ["torch.compile, tiny-12 b2 in float32"]


def test_networks_in_plain_pytorch_are_the_same() -> None:
    model = nn.Sequential(nn.Sequential(SeparableConv2d(3, 4, 3, norm="batch", activation="relu")), nn.Conv2d(4, 4, 1))
    plain = in_pytorch(model)
    assert {type(m) for m in plain.modules()} == {nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.ReLU}
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_cases_are_those_that_are_promised() -> None:
    assert [case.name for case in CASES] == [
        "mobilenet_v1_0.5-96 b32", "mobilenet_v1_1.0-224 b8", "mobilenet_v2_1.0-96 b32", "convnext_stage-56 b8",
        "vgg_quick_bottleneck-32 b128", "vgg_quick_separable-32 b128",
        "resnet_quick_bottleneck-32 b128", "resnet_quick_separable-32 b128",
    ]  # fmt: skip
    assert ConvNeXtBlock(8)(torch.randn(2, 8, 7, 7)).shape == (2, 8, 7, 7)
    assert trained.CASES_BY_NAME[CASES[0].name] is CASES[0]


def test_memory_of_a_step_is_that_of_its_tensors() -> None:
    """In a process of its own: what others hold and let go there counts, too."""
    program = (
        "import torch; from sepconv.bench.training_memory import held_by_a_step; "
        "print(held_by_a_step(lambda: torch.ones(8 << 20)) or 0)"
    )
    held = int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    assert not held or 30 << 20 <= held <= 64 << 20
