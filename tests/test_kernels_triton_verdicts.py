"""What is remembered of proofs: in memory, and in files that hold numbers and nothing else."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_checks import depthwise_case

from sepconv.kernels.case import Case
from sepconv.kernels.halide.jit import code_cache
from sepconv.kernels.triton import proof, verdicts
from sepconv.kernels.triton.events import Times
from sepconv.kernels.triton.proof import Verdict

_SLOW, _FAST = Times(0.04, 0.05), Times(0.01, 0.02)


@pytest.fixture(autouse=True)
def verdict_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(code_cache.VARIABLE, str(tmp_path))
    verdicts.forget()
    yield tmp_path
    verdicts.forget()


def _case(dtype: torch.dtype = torch.float32, activation: str = "", channels: int = 5) -> Case:
    x, weight = torch.randn(2, channels, 7, 6).to(dtype), torch.randn(channels, 1, 3, 3).to(dtype)
    return depthwise_case("forward", x, weight, (1, 1), ((1, 1), (1, 1)), (1, 1), activation)


def test_verdicts_are_remembered_on_disk(verdict_files: Path) -> None:
    case, found = _case(), Verdict(2, _FAST, _SLOW)
    assert verdicts.find(case, 3) is None
    verdicts.keep(case, found)
    [file] = (verdict_files / "gpu").iterdir()
    for _ in range(2):
        assert verdicts.find(case, 3) == found
        verdicts.forget()
    assert verdicts.find(case, 2) is None, "there is no third tile any more"
    assert verdicts.find(_case(channels=6), 3) is None
    assert verdicts.find(_case(torch.bfloat16), 3) is None
    assert verdicts.find(_case(activation="relu"), 3) is None
    assert json.loads(file.read_text()).keys() == {"case", "schedule", "ours", "pytorch", "fault"}


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (torch.backends.cudnn, "benchmark", True),
        (torch.backends.cudnn, "allow_tf32", False),
        # Once this is set PyTorch refuses to tell allow_tf32.
        (torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_change_pytorchs_kernel_are_part_of_a_verdict(where: Any, name: str, value: Any) -> None:
    case, before = _case(), getattr(where, name)
    verdicts.keep(case, Verdict(0, _FAST, _SLOW))
    verdicts.forget()
    setattr(where, name, value)
    try:
        assert verdicts.find(case, 1) is None
    finally:
        setattr(where, name, before)
    assert verdicts.find(case, 1) is not None


def test_a_folder_that_cannot_be_written_is_no_error(verdict_files: Path) -> None:
    (verdict_files / "gpu").write_text("a file where the folder should be")
    case = _case()
    verdicts.keep(case, Verdict(0, _FAST, _SLOW))
    assert verdicts.find(case, 1) is not None
    verdicts.forget()
    assert verdicts.find(case, 1) is None


def test_tritons_version_is_that_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its package has other names in builds for AMD."""
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.9.9+rocm"))
    assert verdicts.triton_version() == "3.9.9+rocm"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert verdicts.triton_version() == ""


def test_a_verdict_is_of_these_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that they are made of is in the name of its file."""
    read, names = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda path: names.append("/".join(path.parts[-2:])) or read(path))
    verdicts._sources.cache_clear()
    verdicts._sources()
    programs = {"triton/tiles.py", "triton/plan.py", "triton/proof.py"}
    compiled = {"compiled/gather.py", "compiled/filters.py", "compiled/curves.py"}
    assert programs | compiled | {"sepconv/activations.py"} <= set(names)
    weighed_against = {"torch/prepared.py", "torch/aten.py", "kernels/case.py", "system/timing.py"}
    assert weighed_against <= set(names)


_CARD = {"name": "Imaginary 1000", "major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 2**36}


@pytest.mark.parametrize(
    "change",
    [
        *({name: value} for name, value in [("name", "Imaginary 2000"), ("minor", 3), ("multi_processor_count", 66)]),
        {"total_memory": 2**35},
        {"driver": "NVRM version: 590.12"},
        {"torch": "9.9.9"},
        {"triton": "9.9.9"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_verdict_is_of_one_kind_of_device_its_driver_and_versions(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A second card of the same kind needs no proof of its own, another kind does."""
    card, driver = dict(_CARD), tmp_path / "version"
    driver.write_text("NVRM version: 580.95")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**card))
    monkeypatch.setattr(verdicts, "_DRIVERS", (driver, tmp_path / "not there"))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.7.1"))

    def on(index: int) -> Case:
        """As another process has it."""
        verdicts.forget()
        verdicts._device.cache_clear()
        case = _case()
        return replace(case, x=case.x._replace(device=torch.device("cuda", index)))

    verdicts.keep(on(0), Verdict(0, _FAST, _SLOW))
    assert verdicts.find(on(1), 1) is not None
    card |= {name: value for name, value in change.items() if name in card}
    driver.write_text(change.get("driver", driver.read_text()))
    monkeypatch.setattr(torch, "__version__", change.get("torch", torch.__version__))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=change.get("triton", "3.7.1")))
    assert verdicts.find(on(0), 1) is None
    verdicts._device.cache_clear()


def _keep(folder: str, number: int) -> None:
    os.environ[code_cache.VARIABLE] = folder
    for _ in range(20):
        verdicts.keep(_case(), Verdict(0, Times(0.01 * number, 0.02), _SLOW))


@pytest.mark.slow
def test_two_processes_write_the_same_file(verdict_files: Path) -> None:
    """Whoever comes last; it is whole at any time, and nothing else stays."""
    processes = [
        multiprocessing.get_context("spawn").Process(target=_keep, args=(str(verdict_files), n)) for n in (1, 2)
    ]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        verdicts.forget()
        found = verdicts.find(_case(), 1)
        if (verdict_files / "gpu").exists() and list((verdict_files / "gpu").glob("*.json")):
            found = verdicts.find(_case(), 1)
            assert found is not None
    assert [process.exitcode for process in processes] == [0, 0]
    [file] = (verdict_files / "gpu").iterdir()
    assert file.suffix == ".json"
    assert found is not None
    assert found.ours.device in (0.01, 0.02)


def test_what_may_come_out_otherwise_is_not_kept_on_disk(verdict_files: Path) -> None:
    case = _case()
    verdicts.keep(case, proof.refused("there is no memory"))
    assert verdicts.find(case, 1) is not None
    assert not (verdict_files / "gpu").exists()


@pytest.mark.parametrize(
    "change",
    [
        b"",
        b"[" * 100_000,
        b"[]",
        {"schedule": 3},
        {"schedule": True},
        {"schedule": "0"},
        {"ours": [0.1]},
        {"ours": [float("nan"), 0.1]},
        {"ours": ["0.1", "0.1"]},
        {"ours": [0.0, 0.1]},
        {"pytorch": None},
        {"fault": 5},
        {"case": "another"},
    ],
    ids=lambda change: str(change)[:20],
)
def test_a_file_that_is_not_as_it_should_be_is_no_verdict(change: Any, verdict_files: Path) -> None:
    case = _case()
    verdicts.keep(case, Verdict(0, _FAST, _SLOW))
    [file] = (verdict_files / "gpu").iterdir()
    content = change if isinstance(change, bytes) else json.dumps(json.loads(file.read_text()) | change).encode()
    file.write_bytes(content)
    verdicts.forget()
    assert verdicts.find(case, 3) is None


def test_verdicts_have_bounds(monkeypatch: pytest.MonkeyPatch, verdict_files: Path) -> None:
    monkeypatch.setattr(verdicts, "MAX_VERDICTS", 3)
    monkeypatch.setattr(verdicts, "MAX_FILES", 4)
    for channels in range(1, 9):
        verdicts.keep(_case(channels=channels), Verdict(0, _FAST, _SLOW))
        assert len(verdicts._known) <= 3
        assert len(list((verdict_files / "gpu").iterdir())) <= 4


def test_without_a_folder_a_verdict_lasts_as_long_as_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(code_cache.VARIABLE, "")
    case = _case()
    verdicts.keep(case, Verdict(0, _FAST, _SLOW))
    assert verdicts.find(case, 1) is not None
    verdicts.forget()
    assert verdicts.find(case, 1) is None
